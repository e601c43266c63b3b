"""What the pages show: an experiment of two iterations on the planted world, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_loop
from conftest import Once

from flows.experiment import note_settings
from flows.settings import load_settings
from models.planted import pretrain

SETTINGS = """
extends: planted
experiment: small
iterations: 2
policy: {{model: {model}}}
prompts: {{first: 80, later: 80, held_out: 20}}
cluster: {{picture: svd, max_principles: 6}}
evaluate: {{resamples: 200}}
"""
RECIPE = pretrain.Recipe(words=2_000, clean=4_500, noisy=2_000)
"""A third of the usual pretraining: what the model says is still readable."""


@contextmanager
def home(folder: Path) -> Iterator[None]:
    """The folder as the working directory with its own home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        yield


@pytest.fixture(scope="session")
def small(once: Once, migrated_database: Path) -> Path:
    """The folder of the finished experiment "small": copy it (`small_loop.copy_finished`)."""

    def make(folder: Path) -> None:
        (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
        model = pretrain.planted_model(folder, 0, recipe=RECIPE)
        (folder / "small.yaml").write_text(SETTINGS.format(model=model))
        with home(folder):
            settings = load_settings("small.yaml")
            note_settings(settings)
            small_loop.run(settings)

    return once("small", make)
