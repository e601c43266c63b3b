"""Groups prompts into families, whose common beginning is computed once.

`models/engine/decoding.py` samples and scores family by family.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from models.engine.base import Tokens


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """One prompt of a family, and the samples that are wanted of it."""

    request: int
    """Index of its request."""
    tail: tuple[int, ...]
    """The prompt's tokens after the family's prefix, at least one."""
    samples: tuple[int, ...]
    """Numbers of the wanted samples."""


@dataclass(frozen=True, slots=True)
class Family:
    """Prompts that share their beginning, the prefix."""

    prefix: tuple[int, ...]
    asks: tuple[PromptSamples, ...]

    @property
    def rows(self) -> int:
        """The number of samples of all its prompts."""
        return sum(len(ask.samples) for ask in self.asks)

    def starting(self, end: int) -> Family:
        """The same prompts with a prefix of at most `end` - 1 tokens; the tails get the rest."""
        keep = min(len(self.prefix), end - 1)
        rest = self.prefix[keep:]
        asks = tuple(replace(ask, tail=(*rest, *ask.tail)) for ask in self.asks)
        return Family(self.prefix[:keep], asks)

    def split(self, rows: int) -> tuple[Family, Family]:
        """A family with the first `rows` samples, and one with the others."""
        first, others = [], []
        for ask in self.asks:
            first.append(replace(ask, samples=ask.samples[:rows]))
            others.append(replace(ask, samples=ask.samples[rows:]))
            rows = max(0, rows - len(ask.samples))
        made = [tuple(ask for ask in asks if ask.samples) for asks in (first, others)]
        return Family(self.prefix, made[0]), Family(self.prefix, made[1])


def families(prompts: Sequence[Tokens], wanted: Sequence[Collection[int]]) -> list[Family]:
    """Group the prompts that share at least half of their tokens with a neighbour in sorted order.

    Args:
        prompts: token ids, at least one each.
        wanted: the sample numbers of each prompt; a prompt without any is left out.

    Returns:
        The families, those with the longest prefix first.
    """
    order = sorted((i for i, w in enumerate(wanted) if w), key=lambda i: list(prompts[i]))
    groups: list[tuple[int, list[int]]] = []
    for i in order:
        # the last token stays in the tail: a sample begins with its logits
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
    """The families in consecutive parts of at most so many tokens, padding included; a part has at
    least one family."""
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
