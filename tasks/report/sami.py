"""The report's chapter of a SAMI experiment: its constitution, and how its policies follow it.

`document` calls `parts`; `page/sami.html` shows them. No stage is run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from constitutions.constitution import Principle
from models.policy import NO_ANSWER, Message
from models.worlds.registry import WORLDS
from tasks.benchmarks.base import Column
from tasks.benchmarks.rows import spread
from tasks.report.exhibits import outcome_word
from tasks.report.figures import ARMS, information_limit
from tasks.report.recorded import Recorded, cell, cells, nats
from tasks.rows import Comparison, Prompt, Response
from tasks.sami.draw import pool_of

EXAMPLES = 10

_FIGURES = (
    Column("with constitution, vs iteration 0", "win_rate/constitution_vs_0"),
    Column("… at equal lengths", "win_rate/constitution_vs_0_length_controlled"),
    Column("with constitution, vs previous", "win_rate/constitution_vs_previous"),
    Column("with held-out principles or antitheses, vs iteration 0", "win_rate/held_out_vs_0"),
    *(Column(f"{label}, vs iteration 0", f"win_rate/{arm}_vs_0") for arm, label in ARMS.items()),
    Column("information, of mean log-probabilities per token, nats", "mi/per_token", form="nats"),
    Column("information, of whole responses, nats", "mi/whole", form="nats"),
    *(
        Column(f"{world}: {words}, {done}", f"{world}/{metric}_{arm}")
        for world in WORLDS
        for metric, done in (("obeyed", "followed"), ("core", "answered"))
        for arm, words in ARMS.items()
    ),
)
_LENGTHS = tuple(
    Column(words, f"answers/{arm}_characters", form="count") for arm, words in ARMS.items()
)


class PrinciplePair(NamedTuple):
    """A principle of the constitution, and its antithesis, "" without."""

    principle: Principle
    held_out: bool
    """Whether no training constitution holds it."""


class ResponseExhibit(NamedTuple):
    """A held-out prompt, a constitution, and the responses of two policies to both."""

    number: int
    """Its place among all held-out prompts, from 1."""
    source: str
    prompt: tuple[Message, ...]
    arm: str
    """In words."""
    principles: tuple[str, ...]
    before: str
    after: str
    outcome: str
    """ "win", "tie", "loss" or "not judged" of the trained policy, or a figure between."""
    failure: str


def parts(e: Recorded) -> dict[str, Any]:
    """What `page/sami.html` shows beside what every chapter has."""
    limit = information_limit(e.history)
    return {
        "kind": "sami",
        "sections": {
            "lengths": "Lengths",
            "constitution": "The constitution",
            "examples": "Before and after",
        },
        "rates": cells(e, _FIGURES),
        "limit": None if limit is None else nats(limit),
        "lengths": cells(e, _LENGTHS),
        "constitution": constitution(e),
        "rejected": e.history.get(0, {}).get("write/rejected", 0),
        "examples": _examples(e),
    }


def beside(e: Recorded) -> str:
    """What else was measured of the last policy, in sentences."""
    metrics = e.history.get(e.last_evaluated or 0, {})
    more = {
        "win_rate/held_out_vs_0": "Under principles and antitheses that were never trained on",
        e.held_out_rate: "Without constitution, against the initial policy's answers",
    }
    return " ".join(
        f"{words}: {' '.join(cell(metrics, name)).strip()}."
        for name, words in more.items()
        if name in metrics
    )


def constitution(e: Recorded) -> list[PrinciplePair]:
    """Its principles, those that are trained on first; empty before the stage "write"."""
    written = e.attempts.get(0, {}).get("write")
    if written is None:
        return []
    pool = pool_of(written)
    return [PrinciplePair(p, False) for p in pool.trained] + [
        PrinciplePair(p, True) for p in pool.held_out
    ]


def _examples(e: Recorded) -> tuple[int, int, list[ResponseExhibit]]:
    """(iteration, its held-out prompts, the chosen ones) of the last policy that was trained."""
    last, first = e.last_evaluated, e.attempts.get(0, {})
    if not last or not {"prompts", "evaluate"} <= first.keys():
        return 0, 0, []
    prompts = first["prompts"].read("prompts", Prompt)
    evaluated = e.attempts[last]["evaluate"]
    chosen = examples(
        evaluated.read("responses", Response),
        first["evaluate"].read("responses", Response),
        evaluated.read("comparisons", Comparison),
        prompts,
    )
    return last, len(prompts), chosen


def examples(
    responses: Iterable[Response],
    initial: Iterable[Response],
    comparisons: Iterable[Comparison],
    prompts: Sequence[Prompt],
    count: int = EXAMPLES,
) -> list[ResponseExhibit]:
    """Prompts evenly spaced in the order of their ids, a hash; kinds of constitutions in turn.

    Neither the responses nor the judgements influence the choice. A prompt to which either policy
    has no response is left out.
    """
    after = {(r.prompt_id, r.arm): r for r in responses if r.principles}
    before = {(r.prompt_id, r.arm): r for r in initial}
    judged: dict[tuple[str, str], Comparison] = {}
    for row in comparisons:
        if row.against == 0:
            judged.setdefault((row.prompt_id, row.answer), row)  # of several judges, the first
    there = {arm for _, arm in after}
    arms = cycle(arm for arm in ARMS if arm in there)
    ordered = sorted(prompts, key=lambda p: p.prompt_id)
    found = []
    chosen = spread(list(enumerate(ordered, start=1)), count)
    for arm, (number, prompt) in zip(arms, chosen, strict=False):
        key = prompt.prompt_id, arm
        if key in after and key in before:
            found.append(_example(number, prompt, before[key], after[key], judged.get(key)))
    return found


def _example(
    number: int, prompt: Prompt, before: Response, after: Response, judged: Comparison | None
) -> ResponseExhibit:
    return ResponseExhibit(
        number=number,
        source=prompt.source,
        prompt=prompt.prompt,
        arm=ARMS[after.arm],
        principles=after.principles,
        before=_text(before),
        after=_text(after),
        outcome=outcome_word(judged.outcome if judged else None),
        failure=(judged.failure or "") if judged else "there is no comparison",
    )


def _text(row: Response) -> str:
    return f"({NO_ANSWER[row.finish]})" if row.finish in NO_ANSWER else row.response
