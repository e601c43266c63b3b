"""Which checkpoint a training goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.files import write_sealed
from models.training import resumable


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "inside").mkdir(parents=True)
    (made / "optimizer.pt").write_bytes(b"moments" * 20)
    (made / "inside" / "weights").write_bytes(b"weights" * 20)
    if sealed:
        write_sealed(made / resumable.SEAL, resumable._digests(made))
    return made


def test_the_one_before_is_removed_when_the_next_is_whole(tmp_path: Path) -> None:
    first, second = (checkpoint(tmp_path, step, sealed=step == 50) for step in (50, 100))
    assert resumable.newest(tmp_path) == first, "the second is not finished"
    resumable.keep(second)
    assert list(tmp_path.iterdir()) == [second]
    assert resumable.newest(tmp_path) == second


def cut(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"mom")


def changed(folder: Path) -> None:
    (folder / "inside" / "weights").write_bytes(b"weightS" * 20)


def gone(folder: Path) -> None:
    (folder / "inside" / "weights").unlink()


def no_seal(folder: Path) -> None:
    (folder / resumable.SEAL).write_bytes(b"{")


@pytest.mark.parametrize("damage", [cut, changed, gone, no_seal])
def test_a_damaged_one_is_dropped_and_said(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = checkpoint(tmp_path, 50), checkpoint(tmp_path, 100)
    damage(second)
    resumable.drop_damaged(tmp_path)
    assert resumable.newest(tmp_path) == first
    assert capsys.readouterr().err == (
        f"{second} was damaged; the training goes on after step 50\n"
    )
    damage(first)
    resumable.drop_damaged(tmp_path)
    assert resumable.newest(tmp_path) is None
    assert "goes on at the first step" in capsys.readouterr().err


def test_there_may_be_none(tmp_path: Path) -> None:
    resumable.drop_damaged(tmp_path / "nowhere")
    assert resumable.newest(tmp_path / "nowhere") is None
