"""The base model: the planted one travels with the record, a directory is known by its contents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from servers import mlflow_server

from constitutions.errors import UserError
from models.planted import pretrain
from models.policy import PolicySettings
from tasks.policies.base import folder_digest, kept_model, resolve_model
from tasks.record.record import Record

PLANTED = PolicySettings(model="planted")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(
        pretrain.Recipe(), hidden=32, layers=1, heads=2, intermediate=64, words=64, clean=64, noisy=64, rows=16
    )  # fmt: skip
    monkeypatch.setitem(pretrain.RECIPES, "planted", recipe)


@pytest.mark.usefixtures("tiny")
def test_the_planted_model_comes_from_the_record(
    tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty disk elsewhere fetches it: another machine might make another one."""
    shutil.copy(migrated_database, tmp_path / "server.db")
    with mlflow_server(tmp_path) as server:
        one, two = tmp_path / "one", tmp_path / "two"
        assert kept_model(PLANTED, 0, one, Record("e", one, server.url)).path == ""
        made = resolve_model(PLANTED, 0, one, Record("e", one, server.url))

        monkeypatch.setattr(pretrain, "planted_model", lambda *_: pytest.fail("made again"))
        found = resolve_model(PLANTED, 0, two, Record("e", two, server.url))
        assert found.digest == made.digest
        assert Path(found.path).is_relative_to(two)
        assert (Path(found.path) / "model.safetensors").is_file()

        (Path(found.path) / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(UserError, match="damaged"):
            resolve_model(PLANTED, 0, two, Record("e", two, server.url))


def test_a_folder_is_known_by_its_contents(tmp_path: Path) -> None:
    folder, home = tmp_path / "model", tmp_path / "home"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = folder_digest(folder, home)
    (folder / "config.json").touch()
    assert folder_digest(folder, home) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert folder_digest(tmp_path / "copy", home) == first
    (folder / "config.json").write_text("[]")
    assert folder_digest(folder, home) != first
