"""What goes wrong around us: what the user is told, and what is kept.

Real servers that die, a real full disk, damaged files, a clock that goes back.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import small_loop
from command import staple
from in_turn import in_turn
from servers import free_port, mlflow_server, prefect_api

from constitutions.errors import UserError
from models.settings import Settings
from tasks.record import locks
from tasks.record import slot as slots
from tasks.record.record import HEARTBEAT, Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import JOURNAL, Metrics, Workspace, shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    value: int


class NoSettings(Settings):
    pass


def slot(home: Path, uri: str | None = None) -> Slot:
    return Slot(Record("faults", home, uri), 1, seed=0)


def count(at: Slot, compute: Callable[[Workspace], Metrics]) -> Attempt:
    return at.attempt("count", NoSettings(), {}, compute)


def numbers(*values: int) -> Callable[[Workspace], Metrics]:
    """A stage that writes one shard for each value."""

    def compute(work: Workspace) -> Metrics:
        parts = work.sharded(
            "numbers",
            Number,
            shards(values, 1),
            in_turn(lambda shard: [Number(value=v) for v in shard]),
            found=lambda _: None,
        )
        return {"sum": float(sum(row.value for row in work.table(parts)))}

    return compute


def events(home: Path) -> list[str]:
    lines = (home / "work" / JOURNAL).read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


# MLflow --------------------------------------------------------------------------------------


def test_mlflow_is_not_there_at_the_start(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{port}")
    started = time.monotonic()
    ran = staple(capsys, "status", "planted")
    assert time.monotonic() - started < 90, "MLflow's own retries take two minutes"
    assert ran.code == 2
    assert "MLflow does not answer" in ran.err
    assert f"127.0.0.1:{port}" in ran.err
    assert "secret" not in ran.err
    assert "Traceback" not in ran.err


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


@pytest.fixture
def server_folder(tmp_path: Path, migrated_database: Path) -> Path:
    """Where an MLflow server starts without creating its tables first."""
    shutil.copy(migrated_database, tmp_path / "server.db")
    return tmp_path


@pytest.mark.usefixtures("impatient", "server_folder")
def test_mlflow_goes_away_in_the_middle(tmp_path: Path) -> None:
    """What was computed is kept beside the record, and recorded when MLflow is back."""
    from flows.commands.failures import explained

    home, port = tmp_path / "home", free_port()
    with mlflow_server(tmp_path, port) as server:
        at = slot(home, server.url)

        def compute(work: Workspace) -> Metrics:
            metrics = numbers(1, 2)(work)
            server.kill()
            return metrics

        with pytest.raises(Exception, match="Max retries") as gone:
            count(at, compute)
        assert "MLflow stopped answering" in str(explained(gone.value))
    assert events(home) == ["begun", "shard", "shard", "computed"]

    with mlflow_server(tmp_path, port) as server:
        again = slot(home, server.url)
        assert again.record.current("count", 1) is None, "half an attempt counts for nobody"
        done = count(again, compute)
        assert done.read("numbers", Number) == [Number(value=1), Number(value=2)]
        assert done.metrics["sum"] == 3.0
        (left,) = [run for run in again.record.runs() if run.status == "KILLED"]
        assert left.tags["failure"] == "interrupted"
    assert events(home)[4:] == ["begun", "recorded"], "nothing was computed again"


# The disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    """Write to a file until nothing more fits."""
    with suppress(OSError), path.open("wb", buffering=0) as sink:
        while True:
            sink.write(b"0" * 4096)


def test_the_disk_is_full(small_disk: Path, workplace: Path) -> None:
    from flows.commands.failures import explained

    ballast = small_disk / "ballast"

    def compute(work: Workspace) -> Metrics:
        def shard(values: list[int]) -> list[Number]:
            if values[0] == 2 and not ballast.exists():
                fill(ballast)
            return [Number(value=v) for v in values]

        split = shards([1, 2], 1)
        work.table(work.sharded("numbers", Number, split, in_turn(shard), found=lambda _: None))
        return {}

    at = slot(small_disk / "home")
    with pytest.raises(OSError, match="No space left") as full:
        count(at, compute)
    message, code = explained(full.value) or ("", 0)
    assert message.startswith("the disk is full; free some space;") and code == 1
    (left,) = [p.name for p in (small_disk / "home" / "work").rglob("numbers-*")]
    assert left.startswith("numbers-00000-00001."), (
        "the finished shard is kept, half a shard is not"
    )

    ballast.unlink()
    ballast.touch()
    assert len(count(at, compute).read("numbers", Number)) == 2
    shards_written = [e for e in events(small_disk / "home") if e == "shard"]
    assert len(shards_written) == 2, "the first one was found again"


# Damage --------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_artefact_is_named(workplace: Path) -> None:
    at = slot(workplace / "home")
    done = count(at, numbers(1))
    damage(done.path("numbers.parquet"))
    with pytest.raises(UserError) as found:
        at.record.needs("count", 1).read("numbers", Number)
    said = str(found.value)
    assert "numbers.parquet" in said
    assert "stage count of iteration 1" in said
    assert "--force" in said
    forced = count(replace(at, mode=lambda _: "force"), numbers(1))
    assert forced.read("numbers", Number) == [Number(value=1)]
    assert forced.digest == done.digest, "what follows stays valid"


@pytest.mark.parametrize("content", ["", "{", '{"numbers.parquet": {"sha256": "0"}}'])
def test_a_damaged_manifest_is_named(workplace: Path, content: str) -> None:
    at = slot(workplace / "home")
    done = count(at, numbers(1))
    (done.path("numbers.parquet").parent / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        at.record.needs("count", 1).path("numbers.parquet")


@pytest.mark.usefixtures("server_folder")
def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        count(slot(tmp_path / "one", server.url), numbers(1))
        other = slot(tmp_path / "two", server.url).record
        copy = other.needs("count", 1).path("numbers.parquet")
        assert copy.is_relative_to(tmp_path / "two" / "cache")
        damage(copy)
        assert other.needs("count", 1).read("numbers", Number) == [Number(value=1)]
        kept = next((tmp_path / "artifacts").rglob("numbers.parquet"))
        damage(kept)
        damage(copy)
        with pytest.raises(UserError, match=r"numbers\.parquet"):
            other.needs("count", 1).read("numbers", Number)


def test_outputs_that_changed_before_they_were_recorded_are_made_again(workplace: Path) -> None:
    at = slot(workplace / "home")
    computed: list[int] = []

    def compute(work: Workspace) -> Metrics:
        computed.append(1)
        return numbers(1)(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slot, "_log", _refuse)
        with pytest.raises(ConnectionError):
            count(at, compute)
    damage(next((workplace / "home" / "work").rglob("outputs/numbers.parquet")))
    assert count(at, compute).read("numbers", Number) == [Number(value=1)]
    assert len(computed) == 2


def _refuse(*_: object) -> None:
    raise ConnectionError("gone")


# Several processes ---------------------------------------------------------------------------

HOLD = """
    import sys, time
    from pathlib import Path
    from tasks.record.locks import device, held
    name = sys.argv[1]
    lock = device("cuda", "train of iteration 1 of other") if name == "device" else held(
        Path(name), "train of iteration 1 of other")
    with lock:
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def holder(name: str, seconds: float, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), name, str(seconds)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_waits_and_is_told_for_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "a.lock"
    with holder(str(lock), 1.0) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert locks.is_held(lock)
        with locks.held(lock, "mine of iteration 1"):
            pass
        assert other.wait() == 0
    assert (
        f"waiting for process {other.pid}: train of iteration 1 of other" in capsys.readouterr().err
    )
    assert not locks.is_held(lock)


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with holder(str(lock), 60.0) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.kill()
    with locks.held(lock, "next"):
        assert locks.is_held(lock)


PARENT = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "device", sys.argv[2]])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_the_device_stays_with_the_child_of_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flow process outlives its worker: whoever comes next waits for it, and is told."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), textwrap.dedent(HOLD), "3"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        assert worker.stdout.readline() == "held\n"
        worker.kill()
    outlived = psutil.Process(child)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with locks.device("cuda", "next"):
        outlived.wait(timeout=600)  # it let go of the device, and has only its own end left
    assert f"waiting for process {child}: train of iteration 1 of other" in capsys.readouterr().err


def test_the_cpu_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with locks.device("cpu", "one"), locks.device("cpu", "two"):
        assert list(tmp_path.iterdir()) == []


def test_another_machine_sees_that_an_attempt_is_alive(workplace: Path) -> None:
    """Two homes share a record, not their file locks: the heartbeat tells."""
    here, there = slot(workplace / "here"), slot(workplace / "there")

    def compute(work: Workspace) -> Metrics:
        (running,) = [run for run in here.record.runs(kind="stage") if run.status == "RUNNING"]
        assert here.record.is_alive(running) and there.record.is_alive(running)
        return numbers(1)(work)

    done = count(here, compute)
    assert count(there, numbers(1)).run_id == done.run_id
    assert not (workplace / "there" / "work" / JOURNAL).exists(), "it computed nothing"


def test_what_another_machine_left_running_is_marked_and_computed_again(workplace: Path) -> None:
    here, there = slot(workplace / "here"), slot(workplace / "there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_give_up", lambda *_: None)  # as after kill -9: it stays RUNNING
        with pytest.raises(KeyboardInterrupt):
            count(here, _interrupted)
    (dead,) = [run for run in here.record.runs(kind="stage") if run.status == "RUNNING"]
    assert not here.record.is_alive(dead), "its lock is free"
    here.record.client.set_tag(dead.run_id, HEARTBEAT, str(time.time() - 3600))
    dead_now = there.record.reader.run(dead.run_id)
    assert not there.record.is_alive(dead_now), "its heartbeat is an hour old"
    assert count(there, numbers(1)).metrics["sum"] == 1.0
    assert there.record.reader.run(dead.run_id).status == "KILLED"


def _interrupted(_: Workspace) -> Metrics:
    raise KeyboardInterrupt


# The clock -----------------------------------------------------------------------------------


def test_the_clock_is_set_back(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = slot(workplace / "home")
    first = count(at, numbers(1))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    second = count(replace(at, seed=1), numbers(2))
    assert at.record.needs("count", 1).run_id == second.run_id
    count(at, numbers(1))
    assert at.record.needs("count", 1).run_id == first.run_id, "asked for again: current again"


# Prefect -------------------------------------------------------------------------------------


def test_prefect_goes_away_in_the_middle(
    tmp_path: Path, migrated_database: Path, prefect_home: Path
) -> None:
    """The stage at work is finished and recorded; the next run goes on after it."""
    small_loop.make(tmp_path, migrated_database)
    shutil.copytree(prefect_home, tmp_path / "prefect")
    with prefect_api(tmp_path) as server:
        quick = {"PREFECT_API_URL": server.url, "PREFECT_CLIENT_MAX_RETRIES": "1"}
        process = typed(tmp_path, "run", "lineage.yaml", **quick)
        journal = tmp_path / ".staple" / "work" / JOURNAL
        while process.poll() is None and not (journal.exists() and '"mine"' in journal.read_text()):
            time.sleep(0.01)
        server.kill()
        said, _ = process.communicate(timeout=1200)
    assert process.returncode == 1, said
    assert "Prefect's server does not answer" in said
    assert "finished work is kept" in said
    assert "Traceback" not in said
    kept = recorded(journal)
    assert ("mine", 1) in kept

    process = typed(tmp_path, "run", "lineage", "--resume")
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    assert f"{len(kept)} reused" in said
    assert len(recorded(journal)) == len(set(recorded(journal)))


SIDE_BY_SIDE = [("--set", f"experiment={name}") for name in ("one", "one", "two")]


def test_runs_side_by_side(tmp_path: Path, migrated_database: Path, prefect_home: Path) -> None:
    """Two processes on one experiment compute each stage once; another one is not in their way."""
    small_loop.make(tmp_path, migrated_database)
    shutil.copytree(prefect_home, tmp_path / "prefect")
    with prefect_api(tmp_path) as server:
        runs = [
            typed(tmp_path, "run", "lineage.yaml", *words, PREFECT_API_URL=server.url)
            for words in SIDE_BY_SIDE
        ]
        said = [process.communicate(timeout=1200)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0, 0], said
    done = recorded(tmp_path / ".staple" / "work" / JOURNAL)
    assert sorted(done) == sorted(2 * list(dict.fromkeys(done))), "once for each experiment"
    told = [": staple run one, on " in text for text in said]  # other waits are for one stage
    assert sum(told[:2]) <= 1 and not told[2], said


def typed(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`staple` as people type it in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.commands.cli", *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "STAPLE_HOME": str(folder / ".staple"),
            "PREFECT_HOME": str(folder / "prefect"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def recorded(journal: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, journal.read_text().splitlines())
    return [(x["stage"], x["iteration"]) for x in lines if x["event"] == "recorded"]
