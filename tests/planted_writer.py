"""A planted model that was taught little but to write: in a quarter of a minute on one core."""

from __future__ import annotations

from models.planted.pretrain import Recipe

WRITER = Recipe(
    hidden=64, layers=2, heads=2, intermediate=192,
    words=0, clean=7_000, noisy=0, rows=32, writes=1.0, constitutions=0.01,
)  # fmt: skip
