"""A planted model for the pages, once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.planted import pretrain


@pytest.fixture(scope="session")
def readable_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the usual pretraining: what it says is still readable."""
    recipe = pretrain.Recipe(words=2_000, clean=4_500, noisy=2_000)
    return pretrain.planted_model(tmp_path_factory.mktemp("readable"), 0, recipe=recipe)
