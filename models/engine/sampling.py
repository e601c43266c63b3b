"""Chooses tokens as a pure function of the logits and of (request key, sample, step).

The noise is a hash of those three and not the state of a generator, so that no sample depends on
another one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

Tensor = torch.Tensor


class NextTokens(NamedTuple):
    """The next token of each row (int64), and its log-probability at temperature 1 (nats).

    The log-probability is NaN where the logits are not finite: the token then means nothing.
    """

    token: Tensor
    logprob: Tensor


def choose(
    logits: Tensor,
    keys: Tensor,
    steps: Tensor,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
) -> NextTokens:
    """The next token of each row: argmax of logits / T + Gumbel noise within the top-p tokens.

    That is a sample of the softmax (the Gumbel-max trick).

    Args:
        logits: (rows, vocabulary), float32.
        keys, steps: (rows,), int64: the row's `seed_of`, and the number of its tokens so far.
        temperature: (rows,); 0 is greedy. None: 0 for all rows.
        top_p: (rows,), in (0, 1]. None: 1 for all rows.
    """
    token = (
        logits.argmax(-1)
        if temperature is None
        else _sample(logits, gumbel(keys, steps, logits.shape[-1]), temperature, top_p)
    )
    normaliser = logits.logsumexp(-1)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - normaliser
    return NextTokens(token, logprob.masked_fill(~normaliser.isfinite(), torch.nan))


def _sample(logits: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor | None) -> Tensor:
    sampled = temperature > 0
    scaled = logits / torch.where(sampled, temperature, 1.0)[:, None]
    if top_p is not None:
        scaled = _nucleus(scaled, top_p)
    return noise.mul_(sampled[:, None]).add_(scaled).argmax(-1)


def seed_of(key: str, sample: int) -> int:
    """A seed of 64 bits for sample number `sample` of a request."""
    digest = hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel(keys: Tensor, steps: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise (rows, vocabulary), float32: a pure function of (key, step, token).

    A counter-based generator (the SplitMix64 finaliser) in wrapping arithmetic of 64 bits: the same
    numbers on every device, whatever the batch.
    """
    seeds = _mix(keys + (steps + 1) * _GOLDEN)
    bits = (_bits_on_cpu if keys.device.type == "cpu" else _bits)(seeds, vocabulary)
    # 23 bits and a half: exact in float32, never 0 and never 1
    uniform = bits.add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _bits(seeds: Tensor, vocabulary: int) -> Tensor:
    """23 random bits (rows, vocabulary) as whole numbers in float32."""
    return _shift(_mix(seeds[:, None] + _counters(vocabulary, seeds.device)), 41).float()


def _bits_on_cpu(seeds: Tensor, vocabulary: int) -> Tensor:
    """As `_bits`, by NumPy and a few rows at a time, which stay in the cache: torch shifts integers
    of 64 bits one by one there, and took seven times as long."""
    found = torch.empty(len(seeds), vocabulary)
    counters = _counters(vocabulary, seeds.device).numpy().view(np.uint64)
    rows = max(1, _CACHED // vocabulary)
    for start in range(0, len(seeds), rows):
        x = seeds[start : start + rows, None].numpy().view(np.uint64) + counters
        shifted = np.empty_like(x)
        for by, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
            np.bitwise_xor(x, np.right_shift(x, by, out=shifted), out=x)
            np.multiply(x, np.uint64(factor % (1 << 64)), out=x)
        found.numpy()[start : start + rows] = np.right_shift(x, 41, out=x)
    return found


_CACHED = 1 << 16
"""Integers of 64 bits that a core's cache holds twice."""


@lru_cache(maxsize=4)
def _counters(vocabulary: int, device: torch.device) -> Tensor:
    return torch.arange(vocabulary, dtype=torch.int64, device=device) * _GOLDEN


def _signed(x: int) -> int:
    """An integer modulo 2^64, as int64 holds it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift(x, 31))


def _nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of tokens whose probability reaches top_p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    outside = (before >= top_p[:, None]).scatter(-1, order, before >= top_p[:, None])
    return logits.masked_fill(outside, float("-inf"))
