"""The model's own first answers to the base requests, from which the golds are edited.

`answers.jsonl` holds them. Anybody can make them again from the same weights:

    python -m models.house_style.answers SmolLM2-135M-Instruct.Q4_1.gguf

An answer is the first two sentences of what the model says, as far as they are complete within
`MOST_TOKENS`. It is kept where nothing but plain sentences stands there (no lists, no quotes, no
marks of emphasis) of three words or more, and none is said twice: a rule, not a matter of taste.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from models.files import file_sha256
from models.house_style.requests import LENGTH, base_requests
from models.house_style.rules import sentences

ANSWERS = Path(__file__).with_name("answers.jsonl")
DIGEST = "d8937232fed02868ed0c7c15ff5dba4b4dd999355b063d31aeb05e38d4c23c02"
"""Of the file: what depends on the answers depends on this line, and so on the code's version."""
SAMPLES = 2
"""Answers that are sampled for each request; those kept are 0 to `SAMPLES`."""
TEMPERATURE = 0.5
MOST_TOKENS = 48
SEED = 0

_PLAIN = re.compile(r"[A-Z][\w ,;:'’()/&%°-]+[.!?]")


def first_answer(text: str) -> str | None:
    """The first sentences, at most two, of what the model said; None where they are not fit."""
    found = [sentence for sentence in sentences(text)[:2] if sentence[-1] in ".!?"]
    fit = found and len(set(found)) == len(found) and all(map(_fit, found))
    return " ".join(found) if fit else None


def _fit(sentence: str) -> bool:
    return bool(_PLAIN.fullmatch(sentence)) and len(sentence.split()) > 2


@cache
def answers() -> Mapping[str, tuple[str, ...]]:
    """The kept answers of each base request that has any, by the request's text.

    Raises:
        UserError: the file is not the one of which `DIGEST` is the sha256.
    """
    if file_sha256(ANSWERS) != DIGEST:
        raise UserError(
            "the file holds other answers than those that the code names",
            where=str(ANSWERS),
            expected=f"sha256 {DIGEST}",
            fix="restore it; after making it anew, set DIGEST in models/house_style/answers.py",
        )
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    return {row["request"]: tuple(row["answers"]) for row in rows[1:]}


def make(model: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample the answers from a model: the head of the file, and a row for each request kept."""
    from models.engine.local import load_policy
    from models.policy import PolicySettings, Request, user

    settings = PolicySettings(
        model=str(model), quantization="none", dtype="float32", device="cpu", threads=1
    )
    asked = list(base_requests())
    requests = [
        Request(
            messages=(user(f"{request.text} {LENGTH}"),),
            key=f"{SEED}/{request.text}",
            n=SAMPLES,
            temperature=TEMPERATURE,
            max_tokens=MOST_TOKENS,
        )
        for request in asked
    ]
    said = load_policy(settings, model, None).generate(requests)
    rows = []
    for request, completions in zip(asked, said, strict=True):
        kept = dict.fromkeys(filter(None, (first_answer(c.text) for c in completions)))
        if kept:
            rows.append({"request": request.text, "answers": list(kept)})
    head = {
        "requests": len(asked),
        "samples": SAMPLES,
        "temperature": TEMPERATURE,
        "max_tokens": MOST_TOKENS,
        "seed": SEED,
        "ending": LENGTH,
        "kept": sum(len(row["answers"]) for row in rows),
    }
    return head, rows


def write(origin: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `answers.jsonl`: where the answers come from, then a row for each request."""
    lines = [json.dumps(row, ensure_ascii=False) for row in (origin, *rows)]
    ANSWERS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    weights = Path(sys.argv[1])
    head, rows = make(weights)
    origin = {"model": weights.name, "sha256": file_sha256(weights), "licence": "Apache-2.0"}
    write({**origin, **head}, rows)
    print(f"{head['kept']} answers; DIGEST = {file_sha256(ANSWERS)!r}")
