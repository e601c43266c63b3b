"""What a killed stage left behind: found again when it is intact, made again when it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from in_turn import in_turn

from constitutions.errors import UserError
from tasks.record.work import Workspace, manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    value: int
    text: str


SHARDS = [[10], [20], [30]]


def sharded(folder: Path) -> tuple[list[int], list[int]]:
    """The values of all rows, and those that had to be computed."""
    computed: list[int] = []

    def one(shard: list[int]) -> list[Number]:
        computed.extend(shard)
        return [Number(value=value, text="x" * 500) for value in shard]

    work = Workspace(folder)
    rows = work.table(work.sharded("n", Number, SHARDS, in_turn(one), found=lambda _: None))
    return [row.value for row in rows], computed


def part(folder: Path, number: int) -> Path:
    (found,) = (folder / "parts").glob(f"n-{number:05}-{number + 1:05}.*")
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def another_shard(path: Path) -> None:
    shutil.copy(part(path.parent.parent, 2), path)


def renamed_shard(path: Path) -> None:
    other = part(path.parent.parent, 2)
    shutil.copy(other, path.with_name(other.name.replace("-00002-00003.", "-00001-00002.")))
    path.unlink()


def without_digest(path: Path) -> None:
    path.rename(path.with_name("n-00001-00002.parquet"))


@pytest.mark.parametrize(
    "damage",
    [flip, truncate, empty, folder_instead, another_shard, renamed_shard, without_digest],
)
def test_a_damaged_shard_is_done_again(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    clean, _ = sharded(tmp_path)
    whole = manifest(tmp_path / "outputs")
    damage(part(tmp_path, 1))
    assert sharded(tmp_path) == (clean, [20])
    assert manifest(tmp_path / "outputs") == whole
    (said,) = capsys.readouterr().err.splitlines()
    assert "n-00001-00002." in said and "was damaged; this shard is computed again" in said
    assert sharded(tmp_path) == (clean, [])


def test_a_disk_that_forgets_is_named(tmp_path: Path) -> None:
    work = Workspace(tmp_path)

    def one(shard: list[int]) -> list[Number]:
        if shard == [20]:
            flip(part(tmp_path, 0))
        return [Number(value=value, text="x") for value in shard]

    with pytest.raises(UserError, match="n-00000-00001: a finished shard was damaged while"):
        work.table(work.sharded("n", Number, SHARDS, in_turn(one), found=lambda _: None))


def finished(folder: Path) -> Workspace:
    work = Workspace(folder)
    work.write("numbers", [Number(value=1, text="x" * 500)], Number)
    work.finish({"sum": 1.25}, 3.0)
    return work


def test_what_was_finished_is_found_again(tmp_path: Path) -> None:
    done = finished(tmp_path).finished()
    assert done is not None
    assert (done.metrics, done.seconds) == ({"sum": 1.25}, 3.0)
    assert done.manifest == manifest(tmp_path / "outputs")


def other_figure(path: Path) -> None:
    path.write_text(path.read_text().replace("1.25", "7.25"))


def null(path: Path) -> None:
    path.write_text("null")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [other_figure, truncate, empty, null, no_text, folder_instead])
def test_a_damaged_note_that_it_was_finished_counts_for_nothing(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path)
    damage(tmp_path / "done.json")
    assert Workspace(tmp_path).finished() is None
    said = capsys.readouterr().err
    assert f"{tmp_path / 'done.json'}: the file is damaged" in said and "computed again" in said
    assert finished(tmp_path).finished() is not None


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_damaged_outputs_are_made_again(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    work = finished(tmp_path)
    damage(work.outputs / "numbers.parquet")
    assert work.finished() is None
    assert f"{work.outputs} was damaged; it is computed again" in capsys.readouterr().err
    assert list(work.outputs.iterdir()) == []
