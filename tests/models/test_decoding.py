"""The engine's parts that a test of whole answers cannot tell apart."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from models.engine.base import Sample
from models.engine.decoding import Decoder
from models.engine.families import Family, PromptSamples
from models.engine.graphs import Steps
from models.engine.shared_prefix import PrefixCache, _Call
from models.policy import Request


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**gpu.SHAPES["tiny"], "initializer_range": 0.1}
    return Decoder(LlamaForCausalLM(LlamaConfig(**shape)).eval())


def begun(decoder: Decoder) -> PrefixCache:
    """Five rows of two prompts, with three, three, three, five and five private tokens."""
    long, short = (Family(tuple(range(3, 3 + n)), (PromptSamples(0, (7, 8, 9)[:t], (0,)),))
                   for n, t in ((9, 3), (4, 1)))  # fmt: skip
    cache = decoder._prefixes([long.prefix, short.prefix])
    cache.seat(torch.tensor([0, 1]))
    decoder._extend(cache, [long.asks[0].tail, short.asks[0].tail], [range(2, 3), range(1)])
    cache.select(torch.tensor([0, 0, 0, 1, 1]))
    return cache


@torch.inference_mode()
def test_a_recorded_step_gives_the_logits_of_a_launched_one(decoder: Decoder) -> None:
    """What a CUDA graph would play: fixed shapes, all places of the rows, lengths moved on."""
    launched, tokens = begun(decoder), torch.tensor([11, 12, 13, 14, 15])
    decoder._one_more(launched, tokens)
    recorded, before = copy.deepcopy(launched), launched.shape
    expected = decoder._one_more(launched, tokens)
    with recorded.recording():
        found = decoder._one_more(recorded, tokens)
    assert recorded.shape == before and recorded.room == launched.room + 1
    recorded.moved()
    assert recorded.room == launched.room
    assert found == pytest.approx(expected, abs=1e-4)
    assert torch.equal(recorded.lengths, launched.lengths)


@torch.inference_mode()
def test_a_recorded_step_is_never_played_for_another_batch(decoder: Decoder) -> None:
    """Two batches often have equal shapes; a recording computes on the tensors of its own."""
    steps = Steps(decoder._one_more, {torch.device("cpu")})
    steps.possible = True
    played = list[PrefixCache]()
    tokens = torch.tensor([11, 12, 13, 14, 15])

    def record(cache: PrefixCache, tokens: torch.Tensor) -> None:
        steps._tokens, steps._logits = tokens, torch.empty(0)
        steps._graph = SimpleNamespace(replay=lambda: played.append(cache))  # type: ignore[assignment]

    steps._record = record  # type: ignore[method-assign]
    one, other = begun(decoder), begun(decoder)
    for _ in range(5):
        steps.step(one, tokens)
    assert played == [one, one] and one.shape != other.shape
    expected = decoder._one_more(begun(decoder), tokens)
    assert torch.equal(steps.step(other, tokens), expected) and len(played) == 2


@torch.inference_mode()
def test_layers_on_another_device_see_the_same(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model lies on several GPUs: every layer asks for what is on its device."""
    expected = decoder._one_more(begun(decoder), torch.tensor([11, 12, 13, 14, 15]))
    here, asked = _Call.on, list[_Call]()

    def elsewhere(self: _Call, device: torch.device) -> _Call:
        asked.append(here(self, torch.device("cpu", 0)))  # not equal to "cpu", and the same
        assert asked[-1] is not self
        return asked[-1]

    monkeypatch.setattr(_Call, "on", elsewhere)
    found = decoder._one_more(begun(decoder), torch.tensor([11, 12, 13, 14, 15]))
    assert torch.equal(found, expected) and len({*map(id, asked)}) == 2  # made once a pass


def test_a_family_that_does_not_fit_is_split() -> None:
    family = Family((1, 2), (PromptSamples(0, (3,), (0, 1, 2)), PromptSamples(1, (4,), (0, 1))))
    first, second = family.split(4)
    assert [(a.request, a.samples) for a in first.asks] == [(0, (0, 1, 2)), (1, (0,))]
    assert [(a.request, a.samples) for a in second.asks] == [(1, (1,))]
    assert (first.rows, second.rows) == (4, 1)


def test_rows_that_end_make_room_for_the_next_families(decoder: Decoder) -> None:
    decoder.decoding.rows, decoder.steps = 8, 0
    prompts = [[3 + i, 4, 5] for i in range(8)]
    requests = [
        Request(messages="", key=str(i), n=4, max_tokens=4 + 12 * (i % 2)) for i in range(8)
    ]
    done: list[Sample] = []
    decoder.sample(prompts, requests, done.append)
    assert sorted((s.request, s.number) for s in done) == [
        (i, n) for i in range(8) for n in range(4)
    ]
    assert decoder.steps < 4 * 16  # in four batches of two prompts, one after the other
    decoder.decoding.rows = None
