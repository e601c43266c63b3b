"""The prompts of the house-style world, with golds.

A prompt is an everyday request with one to three cues, each of which calls for a rule of the
house. Its golds are answers of the model's own, edited by those rules. A seed draws the prompts and
`DRAWN` of the rules.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal

from models.house_style import house
from models.house_style.answers import answers
from models.house_style.requests import LENGTH, BaseRequest, Pool, base_requests
from models.house_style.rules import Rule

Combinations = Literal["seen", "held"]

DRAWN = (10, 4)
"""Rules that a seed draws: of those that say something, and of those of form."""
MOST = 100_000
"""Prompts of one sample at most."""
_PATIENCE = 2_000
"""Repeated prompts in a row after which there are taken to be no others."""
_CALLED = (1, 2, 3)
_WEIGHTS = (0.5, 0.35, 0.15)
"""How often a prompt calls for so many rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StyledExample:
    """A prompt with its gold, and the truth behind them."""

    prompt: str
    gold: str
    other_golds: tuple[str, ...]
    """The same edits, in other words, of the request's other answers."""
    plain: str
    """The answer that the gold is an edit of."""
    needed: frozenset[str]


def drawn(seed: int) -> tuple[str, ...]:
    """The rules of the house that a seed's prompts call for, in the order of editing."""
    rng = random.Random(f"{seed}/rules")
    said = [name for name, rule in house.RULES.items() if not rule.form]
    form = [name for name, rule in house.RULES.items() if rule.form]
    chosen = {*rng.sample(said, DRAWN[0]), *rng.sample(form, DRAWN[1])}
    return tuple(name for name in house.RULES if name in chosen)


def sample_examples(
    n: int, seed: int, pool: Pool = "train", combined: Combinations = "seen"
) -> list[StyledExample]:
    """`n` examples with distinct prompts; the same arguments give the same examples.

    The first examples of a longer sample are those of a shorter one.

    Args:
        pool: the requests that they ask.
        combined: "seen" prompts call for one rule, or for rules of which no pair is held out;
            "held" prompts call for such a pair.

    Raises:
        ValueError: there are fewer than `n` such prompts, or `n` is more than `MOST`.
    """
    if n > MOST:
        raise ValueError(f"{n:,} prompts were asked for; the world gives up to {MOST:,}")
    rng = random.Random(f"{seed}/{pool}/{combined}")
    called = _combinations(drawn(seed), combined)
    found: dict[str, StyledExample] = {}
    repeated = 0
    while len(found) < n and repeated < _PATIENCE:
        example = _example(rng, pool, called)
        if example is None or example.prompt in found:
            repeated += 1
            continue
        repeated = 0
        found[example.prompt] = example
    if len(found) < n:
        raise ValueError(f"{n:,} distinct {pool} prompts were asked for; there are {len(found):,}")
    return list(found.values())


def edited(answer: str, rules: Iterable[Rule], rng: random.Random) -> str:
    """The answer that obeys the rules of the house, in their order of editing."""
    names = {rule.name for rule in rules}
    for name, rule in house.RULES.items():
        answer = rule.edit(answer, rng) if name in names else answer
    return answer


def _example(
    rng: random.Random, pool: Pool, called: dict[int, list[tuple[str, ...]]]
) -> StyledExample | None:
    """One example, or None where no answer to its request lacks all that it calls for."""
    sizes = [size for size in _CALLED if called.get(size)]
    size = rng.choices(sizes, [_WEIGHTS[size - 1] for size in sizes])[0]
    rules = [house.RULES[name] for name in rng.choice(called[size])]
    request = rng.choice(answered(pool))
    cues = [rng.choice(rule.cues) for rule in rules]
    plain = [a for a in answers()[request.text] if not any(rule.check(a) for rule in rules)]
    if not plain:
        return None
    answer = rng.choice(plain)
    prompt = asked(request.text, cues, rng)
    others = [other for other in dict.fromkeys(plain) if other != answer]
    return StyledExample(
        prompt=prompt,
        gold=edited(answer, rules, rng),
        other_golds=tuple(edited(o, rules, random.Random(f"{prompt}/{o}")) for o in others),
        plain=answer,
        needed=frozenset(rule.name for rule in rules),
    )


def asked(request: str, said: Sequence[str], rng: random.Random) -> str:
    """The prompt: the request, what the user says of themselves before or after it, the length."""
    before: list[str] = []
    after: list[str] = []
    for sentence in rng.sample(said, len(said)):
        (before if rng.random() < 0.5 else after).append(sentence)
    return " ".join([*before, request, *after, LENGTH])


@cache
def answered(pool: Pool) -> list[BaseRequest]:
    """The requests of a pool to which the model has a kept answer."""
    return [r for r in base_requests() if r.pool == pool and answers().get(r.text)]


@cache
def _combinations(rules: tuple[str, ...], wanted: Combinations) -> dict[int, list[tuple[str, ...]]]:
    """The sets of rules that one prompt may call for, by their size.

    At most one of them is of form, and "concise", which leaves no room for a sentence more, stands
    alone. A quarter of the pairs is held out.
    """
    place = {name: i for i, name in enumerate(house.RULES)}
    found: dict[int, list[tuple[str, ...]]] = {}
    for size in _CALLED:
        for names in combinations(rules, size):
            forms = sum(house.RULES[name].form for name in names)
            if forms > 1 or ("concise" in names and size > 1):
                continue
            held = any((place[a] + place[b]) % 4 == 0 for a, b in combinations(names, 2))
            if held == (wanted == "held"):
                found.setdefault(size, []).append(names)
    return found
