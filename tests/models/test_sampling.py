"""Sampling is honest, and a pure function of request, sample and step."""

from __future__ import annotations

import pytest
import torch

from models.engine import sampling
from models.engine.sampling import choose, gumbel, seed_of


def test_the_noise_is_gumbel_and_sampling_follows_the_distribution() -> None:
    noise = gumbel(torch.arange(20_000), torch.full((20_000,), 3), vocabulary=4)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    chosen = (probability.log() + noise).argmax(-1).bincount(minlength=4) / len(noise)
    assert chosen.tolist() == pytest.approx(probability.tolist(), abs=0.012)


def test_the_noise_repeats_by_key_step_and_token() -> None:
    keys, steps = torch.tensor([5, -9, 1 << 62]), torch.tensor([2, 3, 2])
    assert torch.equal(gumbel(keys, steps, 7)[1], gumbel(keys[1:2], steps[1:2], 7)[0])
    assert torch.equal(gumbel(keys, steps, 7), gumbel(keys, steps, 9)[:, :7])
    assert not torch.equal(gumbel(keys, steps, 7)[0], gumbel(keys, steps + 1, 7)[0])


def test_the_noise_is_what_it_was() -> None:
    """Another noise would give other samples to everybody who resumes a run."""
    keys, steps = torch.tensor([seed_of("0/1/abc/principle", 3)]), torch.tensor([0])
    expected = [1.627066, -0.502674, -0.017244]
    assert gumbel(keys, steps, 3)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 70_000), (1000, 300), (1, 1)])
def test_the_noise_on_the_cpu_is_that_of_other_devices(rows: int, vocabulary: int) -> None:
    seeds = torch.arange(rows) * sampling._GOLDEN + (1 << 62)
    found = sampling._bits_on_cpu(seeds, vocabulary)
    assert torch.equal(found, sampling._bits(seeds, vocabulary))
    assert 0 <= found.min() <= found.max() < 1 << 23


def test_rows_sample_greedily_or_within_their_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.9, -5.0]]).repeat(300, 1)
    keys, steps = torch.arange(300), torch.zeros(300, dtype=torch.long)
    warm = torch.cat([torch.zeros(100), torch.ones(200)])
    narrow = torch.cat([torch.ones(200), torch.full((100,), 0.5)])
    chosen = choose(logits, keys, steps, warm, narrow).token
    assert set(chosen[:100].tolist()) == {0} == set(chosen[200:].tolist())
    assert {0, 1} <= set(chosen[100:200].tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, bad], [0.0, 1.0, float("-inf")]])
    keys, steps = torch.tensor([1, 2]), torch.tensor([0, 0])
    for temperature in (None, torch.ones(2)):
        logprob = choose(logits, keys, steps, temperature).logprob
        assert logprob.isnan().tolist() == [True, False]
