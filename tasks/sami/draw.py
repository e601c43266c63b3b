"""Constitutions drawn from a pool of principles and antitheses.

A query's C constitutions hold the same principles; which of them stand as antitheses differs, and
so does the order. `sample` draws them for training, `evaluate` for its arms.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

from constitutions.constitution import Principle, load
from constitutions.errors import UserError
from tasks.record.record import Attempt


class DrawnConstitution(NamedTuple):
    """A constitution as it stands in a prompt."""

    identifiers: tuple[str, ...]
    """ "pos ID" or "neg ID", in order."""
    principles: tuple[str, ...]


class PrinciplePool(NamedTuple):
    """The principles of an experiment."""

    trained: tuple[Principle, ...]
    """Those that training constitutions are drawn from."""
    held_out: tuple[Principle, ...]
    """Those that no training constitution holds."""


HELD_OUT = "held_out.json"


def pool_of(written: Attempt) -> PrinciplePool:
    """The principles that the stage "write" kept.

    Raises:
        UserError: its files are damaged.
    """
    constitution = load(written.path("constitution.yaml"))
    apart = set(json.loads(written.path(HELD_OUT).read_text("utf-8")))
    return PrinciplePool(
        trained=tuple(p for p in constitution.principles if p.id not in apart),
        held_out=tuple(p for p in constitution.principles if p.id in apart),
    )


def mixed(
    principles: Sequence[Principle], asked: Sequence[bool], rng: random.Random
) -> DrawnConstitution:
    """A constitution of the principles, in random order; those not `asked` as antitheses."""
    pairs = [
        (f"pos {p.id}", p.text) if wanted else (f"neg {p.id}", p.antithesis)
        for p, wanted in zip(principles, asked, strict=True)
    ]
    rng.shuffle(pairs)
    return DrawnConstitution(tuple(id for id, _ in pairs), tuple(text for _, text in pairs))


def draw(
    pool: Sequence[Principle], *, constitutions: int, principles: int, rng: random.Random
) -> list[DrawnConstitution]:
    """C constitutions of the same principles, no two with the same antitheses.

    Args:
        constitutions: C.
        principles: how many each holds; all where the pool has fewer.

    Raises:
        UserError: too few of the pool have an antithesis for C different mixtures.
    """
    size = min(principles, len(pool))
    needed = (constitutions - 1).bit_length()
    two_sided = [p for p in pool if p.antithesis]
    if len(two_sided) < needed or size < needed:
        raise UserError(
            f"{len(two_sided)} principles have an antithesis, and a constitution holds {size}",
            where="settings 'sample.constitutions', 'sample.principles'",
            expected=f"at least {needed} with one in each, for {constitutions} constitutions that "
            "differ",
            fix="staple constitution write words antitheses; or lower sample.constitutions",
        )
    chosen = rng.sample(two_sided, needed)
    chosen += rng.sample([p for p in pool if p not in chosen], size - needed)
    sides = [p for p in chosen if p.antithesis]
    mixtures = rng.sample(range(2 ** len(sides)), constitutions)
    return [mixed(chosen, _asked(chosen, mixture), rng) for mixture in mixtures]


def _asked(principles: Sequence[Principle], mixture: int) -> list[bool]:
    """Which stand as principles: a bit of the mixture for each that has an antithesis."""
    asked = []
    for principle in principles:
        asked.append(not principle.antithesis or not mixture & 1)
        mixture >>= bool(principle.antithesis)
    return asked
