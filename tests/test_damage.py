"""Files of ours, damaged in every way: one message that names the file and the way out, or the
file made anew and a line that says so. Never a traceback, never another result.

Shards and what a killed stage left: `tasks/test_work.py`; checkpoints: `models/test_training.py`;
the database: `tasks/test_database.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_loop
from command import staple

from flows.experiment import note_settings, record_of
from flows.settings import load_settings
from tasks.record import locks
from tasks.record.record import SUMMARY

Damage = Callable[[Path], object]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit of one letter or digit."""
    content = bytearray(path.read_bytes())
    at = next(i for i in range(len(content) // 2, len(content)) if chr(content[i]).isalnum())
    content[at] ^= 1
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x9c" * 64)


def a_list(path: Path) -> None:
    path.write_text("[]")


def null(path: Path) -> None:
    path.write_text("null")


def other_types(path: Path) -> None:
    path.write_text('{"a": [1, {"b": null}], "experiment": 3}')


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


ALL: tuple[Damage, ...] = (
    *(empty, truncated, flipped, garbage, a_list, null, other_types, deep, missing, a_folder),
    dangling,
)


@dataclass(frozen=True)
class Place:
    """A finished experiment; `summary` holds its own files."""

    folder: Path
    summary: Path

    def output(self, stage: str, name: str, iteration: int = 1) -> Path:
        return record_of("lineage").needs(stage, iteration).path(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, lineage: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("finished")
    small_loop.copy_finished(lineage, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        note_settings(load_settings("lineage.yaml"))
        record = record_of("lineage")
        run = record.client.get_run(record.iteration_run(SUMMARY))
        yield Place(folder, Path(run.info.artifact_uri.removeprefix("file://")))


@contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[None]:
    """The file damaged for a while."""
    kept = path.with_name(f"kept-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text('{"sha256": "0", "value": {"nothing": "yet"}}')
    shutil.copy(path, kept)
    damage(path)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        kept.replace(path)


@pytest.mark.parametrize("damage", [d for d in ALL if d not in (missing, dangling)])
def test_recorded_settings(made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    with damaged(made.summary / "settings.yaml", damage):
        ran = staple(capsys, "status", "lineage")
    assert ran.code == 2, ran.err
    assert "settings.yaml" in ran.err and "damaged" in ran.err
    assert "staple run FILE --set experiment=lineage" in ran.err
    assert "Traceback" not in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("damage", [missing, dangling])
def test_recorded_settings_that_are_gone(
    made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.summary / "settings.yaml", damage):
        ran = staple(capsys, "status", "lineage")
    assert ran.code == 2, ran.err
    assert "lineage" in ran.err and "staple run" in ran.err


@pytest.mark.parametrize("damage", [truncated, a_folder])
def test_recorded_settings_are_written_again(
    made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.summary / "settings.yaml", damage):
        note_settings(load_settings("lineage.yaml"))  # as every run does
        said = capsys.readouterr().err
        assert "settings.yaml: the file is damaged" in said and "written again" in said
        assert staple(capsys, "status", "lineage").code == 0


@pytest.mark.parametrize("damage", ALL)
@pytest.mark.parametrize("name", ["manifest.json", "constitution.yaml"])
def test_what_a_stage_wrote(
    made: Place, name: str, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.output("cluster", "constitution.yaml").with_name(name), damage):
        ran = staple(capsys, "constitution", "show", "lineage")
    names_it(ran.err, ran.code, name, "staple stage cluster --experiment lineage --iteration 1")


def test_a_manifest_of_another_stage(made: Place, capsys: pytest.CaptureFixture[str]) -> None:
    other = made.output("filter", "trajectories.parquet").with_name("manifest.json")
    with damaged(made.output("cluster", "manifest.json"), lambda p: shutil.copy(other, p)):
        ran = staple(capsys, "constitution", "show", "lineage")
    names_it(ran.err, ran.code, "manifest.json", "staple stage cluster")


@pytest.mark.parametrize("damage", ALL)
def test_what_an_attempt_was_made_from(
    made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made.output("cluster", "constitution.yaml").with_name("derivation.json")
    with damaged(file, damage):
        ran = staple(capsys, "compare", "lineage:1:cluster", "lineage:1:cluster")
    names_it(ran.err, ran.code, "derivation.json", "staple stage cluster")


@pytest.mark.parametrize("name", ["provenance.json", "adapter_config.json"])
@pytest.mark.parametrize("damage", [empty, flipped, garbage, a_list, missing, a_folder])
def test_an_adapter(
    made: Place, name: str, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.output("train", "adapter") / name, damage):
        ran = staple(capsys, "ask", "lineage", "What?")
    names_it(ran.err, ran.code, f"adapter/{name}", "staple stage train")


def names_it(said: str, code: int, file: str, way_out: str) -> None:
    assert code == 2, said
    assert file in said and way_out in said and "--force" in said
    assert "Traceback" not in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("damage", ALL)
def test_the_digests_of_models_are_a_cache(
    made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = staple(capsys, "status", "lineage")
    with damaged(made.folder / ".staple" / "digests.json", damage):
        ran = staple(capsys, "status", "lineage")
        assert staple(capsys, "status", "lineage").err == ""
    assert (ran.code, ran.out) == (0, clean.out)
    gone = damage in (missing, dangling)
    assert ("digests.json" in ran.err and "is replaced" in ran.err) != gone


@pytest.mark.parametrize("damage", [*ALL[:8], a_folder])
@pytest.mark.parametrize("command", [("status", "lineage"), ("down",)])
def test_the_note_of_services(
    made: Place, command: tuple[str, ...], damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.folder / ".staple" / "services" / "services.json", damage):
        ran = staple(capsys, *command)
    assert ran.code == 0, ran.err
    expected = damage is not a_list  # nothing was noted: nothing is up
    assert ("services.json" in ran.err) == expected
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("damage", [empty, truncated, garbage, missing])
def test_the_journal_is_for_people(
    made: Place, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record_of("lineage").needs("filter", 1).digest
    with damaged(made.folder / ".staple" / "work" / "journal.jsonl", damage):
        ran = staple(
            capsys, "stage", "filter", "--experiment", "lineage", "--iteration", "1", "--force"
        )
    assert ran.code == 0, ran.err
    assert record_of("lineage").needs("filter", 1).digest == before


def test_a_journal_that_is_a_folder_is_named(
    made: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.folder / ".staple" / "work" / "journal.jsonl", a_folder):
        ran = staple(
            capsys, "stage", "filter", "--experiment", "lineage", "--iteration", "1", "--force"
        )
    assert ran.code == 2, ran.err
    assert "journal.jsonl: Is a directory" in ran.err and "move it away" in ran.err


@pytest.mark.parametrize("place", [".staple/work", ".staple"])
def test_a_read_only_folder_is_named(
    made: Place, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.folder / place
    bind = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(bind, capture_output=True, check=False).returncode != 0:
        pytest.skip("making a folder read-only needs root's mounts, or another user than root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        ran = staple(
            capsys, "stage", "filter", "--experiment", "lineage", "--iteration", "1", "--force"
        )
        down = staple(capsys, "down")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert ran.code == 2, ran.err
    assert str(folder) in ran.err and "Read-only file system" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" not in down.err


def test_a_file_that_may_not_be_read(made: Place, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file = made.output("cluster", "constitution.yaml")
    with damaged(file, lambda path: path.chmod(0)):
        ran = staple(capsys, "constitution", "show", "lineage")
    names_it(ran.err, ran.code, "constitution.yaml", "staple stage cluster")


@pytest.mark.parametrize("damage", ALL)
def test_the_note_of_who_holds_a_lock(tmp_path: Path, damage: Damage) -> None:
    """It is for the message only: the lock itself is the system's."""
    lock = tmp_path / "a.lock"
    with locks.held(lock, "mine of iteration 1"):
        damage(lock.with_suffix(".holder"))
        said = locks.holder(lock)
        assert said == "another process" or f"process {os.getpid()}" in said or damage is flipped
        if lock.with_suffix(".holder").is_dir():
            shutil.rmtree(lock.with_suffix(".holder"))
    a = lock.with_suffix(".holder")
    a.write_text("left by a process that was killed")
    damage(a)
    with locks.held(lock, "next"):
        assert f"process {os.getpid()}: next" in locks.holder(lock)
