"""A planted model for the pages, once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Once

from models.planted import pretrain


@pytest.fixture(scope="session")
def readable_model(once: Once) -> Path:
    """A third of the usual pretraining: what it says is still readable."""
    recipe = pretrain.Recipe(words=2_000, clean=4_500, noisy=2_000)
    folder = once("readable", lambda made: pretrain.planted_model(made, 0, recipe=recipe))
    return next(folder.glob("planted-*"))
