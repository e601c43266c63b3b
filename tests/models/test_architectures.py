"""Every architecture of transformers that is tried: exact by an engine, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.architectures import PAGE, architectures, build, page
from constitutions.errors import UserError
from models.engine.base import Sample
from models.engine.by_length import ByLength
from models.engine.decoding import Decoder
from models.engine.exact import open_engine
from models.policy import Request

PROMPTS = ([9, 8, 7, 6, 5, 30, 31, 32], [9, 8, 7, 6, 5, 40], [50, 51, 52])
NEW = 20
"""Enough to leave the tiny windows behind."""


def alone(model: Any, prompt: Sequence[int], cached: bool) -> tuple[list[int], float]:
    """What transformers generates from one unpadded prompt, and its log-probability in one pass."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=cached,
        min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    logits = model(made, use_cache=False).logits[0].float().log_softmax(-1)
    new = made[0, len(prompt) :]
    steps = logits[len(prompt) - 1 : -1].gather(-1, new[:, None])
    return new.tolist(), float(steps.sum())


@pytest.mark.parametrize("name", architectures())
@torch.inference_mode()
def test_an_architecture_is_sampled_from_exactly(name: str) -> None:
    warnings.simplefilter("ignore")
    expected = architectures()[name]["engine"]
    model = build(name)
    if expected == "refused":
        with pytest.raises(UserError, match=r"ForCausalLM cannot be sampled from exactly"):
            open_engine(model)
        return
    answers = [alone(model, prompt, expected != "recomputed") for prompt in PROMPTS]
    engine = open_engine(model)
    kind = {Decoder: "shared", ByLength: "shared"}.get(type(engine)) or engine.batching  # type: ignore[attr-defined]
    assert kind == expected
    requests = [Request(messages="", key=str(i), n=2, temperature=0, max_tokens=NEW)
                for i in range(len(PROMPTS))]  # fmt: skip
    samples: list[Sample] = []
    engine.sample(PROMPTS, requests, samples.append)
    assert len(samples) == 2 * len(PROMPTS)
    for sample in samples:
        tokens, logprob = answers[sample.request]
        assert sample.tokens == tokens
        assert sample.logprob == pytest.approx(logprob, abs=1e-3 * NEW)
    assert len({tuple(tokens) for tokens, _ in answers}) == len(PROMPTS)


def test_the_page_says_what_is_asserted_here() -> None:
    found = {name: entry["engine"] for name, entry in architectures().items()}
    assert len(found) >= 90 and [*found.values()].count("shared") >= 50
    assert PAGE.read_text("utf-8") == page(found)
