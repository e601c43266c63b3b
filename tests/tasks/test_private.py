"""Folders for one user: nobody else's, and no link that leads elsewhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from constitutions.errors import UserError
from tasks.record import locks, private


def test_a_folder_is_its_owners_alone(tmp_path: Path) -> None:
    open_to_all = tmp_path / "a" / "b"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    assert private.folder(open_to_all) == open_to_all
    assert stat.S_IMODE(open_to_all.stat().st_mode) == 0o700
    made = private.folder(tmp_path / "new" / "folder")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_there_instead_is_named(tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = tmp_path / "place"
    if kind == "link":
        place.symlink_to(elsewhere)
    else:
        place.touch()
    with pytest.raises(UserError, match="place"):
        private.folder(place)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(UserError, match="another user"):
        private.folder(tmp_path)
    os.chown(tmp_path, 0, 0)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        open(tmp_path / "log", "wb", opener=private.opener)  # noqa: SIM115
    with open(tmp_path / "new", "wb", opener=private.opener):
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_the_locks_of_devices_are_in_no_folder_that_others_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, home = tmp_path / "shared", tmp_path / "home"
    for place in (shared, home):
        place.mkdir()
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with locks.device("cuda", "train"):
        (lock,) = home.rglob("device-3.lock")
        assert locks.is_held(lock)
        assert stat.S_IMODE(lock.parent.stat().st_mode) == 0o700
    assert list(shared.iterdir()) == []
