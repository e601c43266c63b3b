"""Prompts in families: what several prompts begin with is computed once.

`models/engine/decoding.py` samples and scores family by family.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from models.engine.base import Tokens


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """What is sampled from one prompt: the samples' numbers, of a request with this number."""

    request: int
    tail: tuple[int, ...]
    """The prompt after the family's prefix: one token at least."""
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Prompts with a common beginning."""

    prefix: tuple[int, ...]
    asks: tuple[PromptSamples, ...]

    @property
    def rows(self) -> int:
        """Samples of all its prompts."""
        return sum(len(ask.samples) for ask in self.asks)

    def starting(self, end: int) -> Family:
        """The same prompts with a prefix that ends before place `end` - 1."""
        keep = min(len(self.prefix), end - 1)
        rest = self.prefix[keep:]
        asks = tuple(replace(ask, tail=(*rest, *ask.tail)) for ask in self.asks)
        return Family(self.prefix[:keep], asks)

    def split(self, rows: int) -> tuple[Family, Family]:
        """The first `rows` samples, and the others."""
        ends = list(accumulate(len(ask.samples) for ask in self.asks))
        cuts = [max(0, min(len(a.samples), rows - end + len(a.samples)))
                for a, end in zip(self.asks, ends, strict=True)]  # fmt: skip
        halves = [(replace(a, samples=a.samples[:c]), replace(a, samples=a.samples[c:]))
                  for a, c in zip(self.asks, cuts, strict=True)]  # fmt: skip
        first, second = (tuple(a for a in half if a.samples) for half in zip(*halves, strict=True))
        return replace(self, asks=first), replace(self, asks=second)


def families(prompts: Sequence[Tokens], wanted: Sequence[Collection[int]]) -> list[Family]:
    """Group prompts that share at least half of their tokens; the longest prefix first.

    Args:
        prompts: token ids, one at least.
        wanted: the sample numbers of each.
    """
    order = sorted((i for i, w in enumerate(wanted) if w), key=lambda i: list(prompts[i]))
    groups: list[tuple[int, list[int]]] = []
    for i in order:
        # the last token stays out: its logits are what a sample begins with
        whole = len(prompts[i]) - 1
        if groups:
            common, members = groups[-1]
            shared = min(common, whole, _common(prompts[members[-1]], prompts[i]))
            if 2 * shared >= max(len(prompts[j]) for j in (i, members[0], members[-1])):
                groups[-1] = (shared, [*members, i])
                continue
        groups.append((whole, [i]))
    found = [
        Family(
            tuple(prompts[members[0]][:common]),
            tuple(
                PromptSamples(i, tuple(prompts[i][common:]), tuple(sorted(wanted[i])))
                for i in members
            ),
        )
        for common, members in groups
    ]
    return sorted(found, key=lambda f: len(f.prefix), reverse=True)


def _common(first: Tokens, second: Tokens) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def within(all_: Sequence[Family], tokens: int) -> Iterator[list[Family]]:
    """Families in consecutive parts of at most so many padded tokens, but one family at least."""
    part: list[Family] = []
    for family in all_:
        wider = [*part, family]
        if part and _padded_tokens(wider) > tokens:
            yield part
            wider = [family]
        part = wider
    if part:
        yield part


def _padded_tokens(part: Sequence[Family]) -> int:
    prefixes = len(part) * max(len(f.prefix) for f in part)
    tails = [len(ask.tail) for f in part for ask in f.asks]
    return max(prefixes, len(tails) * max(tails))
