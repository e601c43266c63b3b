"""An experiment that an earlier version recorded is shown, compared, reported, exported, accepted.

`records/staple-0.1.tar.xz` was made by `staple run` before code was recorded by module: the small
loop of `small_loop.py` in two iterations ("lineage") and SAMI on the same rows ("taught"), with the
random model that both began from. Paths in it begin with /old-record.
"""

from __future__ import annotations

import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from command import staple

from flows.experiment import record_of

RECORD = Path(__file__).parent / "records" / "staple-0.1.tar.xz"
PATHS = (("runs", "artifact_uri"), ("experiments", "artifact_location"), ("tags", "value"))
Typed = Callable[..., str]
"""Runs `staple` with some words and an expected exit code; what it printed, as one line."""
EARLIER = "recorded by an earlier version of staple: code not comparable by module"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The record, unpacked and moved to a working directory of its own."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(RECORD) as packed:
        packed.extractall(folder, filter="data")
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        for table, column in PATHS:
            moved = f"update {table} set {column} = replace({column}, '/old-record', ?)"
            database.execute(moved, (str(folder),))
        database.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        yield folder


@pytest.fixture
def typed(place: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    def go(*words: str, code: int = 0) -> str:
        ran = staple(capsys, *words)
        assert ran.code == code, ran.err
        assert "Traceback" not in ran.err
        return " ".join((ran.out + ran.err).split())

    return go


def test_status(typed: Typed) -> None:
    shown = typed("status", "lineage")
    for stage in ("mine", "score", "filter", "cluster", "train", "evaluate"):
        assert f"{stage} 1 is stale: " in shown and f"{stage} 2 is stale: " in shown
    assert shown.count(EARLIER) == 16, "each stage of iterations 0, 1 and 2"
    assert "missing" not in shown and "failed" not in shown
    assert typed("status", "taught").count(EARLIER) == 7


def test_constitutions(typed: Typed) -> None:
    assert "nestay" in typed("constitution", "show", "lineage")
    assert "m ho" in typed("constitution", "show", "lineage", "--iteration", "1")
    taught = typed("constitution", "show", "taught")
    assert "Say <b>why</b>. Never say <b>why</b>." in taught and "held out" in taught


def test_compare(typed: Typed) -> None:
    shown = typed("compare", "lineage:1", "lineage:2")
    assert "constitution size 10 4" in shown and "trajectories 10 4" in shown
    assert "added 1" in shown and "dropped 1" in shown
    shown = typed("compare", "lineage:1:cluster", "lineage:2:cluster")
    assert "input trajectories" in shown
    assert "method staple sami" in typed("compare", "lineage", "taught")


def test_report(typed: Typed, place: Path) -> None:
    typed("report", "lineage", "taught", "--out", "report.html")
    text = (place / "report.html").read_text()
    for experiment, stage in (("lineage", "cluster"), ("taught", "sample")):
        attempt = record_of(experiment).needs(stage, 1)
        assert attempt.fingerprint in text
        assert attempt.provenance().code_digest in text
    assert "Never say &lt;b&gt;why&lt;/b&gt;" in text and "What is " in text


@pytest.mark.parametrize("experiment", ["lineage", "taught"])
def test_export(typed: Typed, place: Path, experiment: str) -> None:
    shown = typed("export", experiment, "--out", f"exported-{experiment}")
    assert "transformers and peft, the base as it was trained on 0 0 100.0%" in shown
    assert (place / f"exported-{experiment}" / "adapter_model.safetensors").is_file()


def test_accept(typed: Typed) -> None:
    """filter reads no setting that has changed since: only its code differs."""
    filtered = ("accept", "filter:1", "--experiment", "lineage")
    assert "Accepted filter 1" in typed(*filtered, "--by", "ann")
    shown = typed("status", "lineage")
    assert "filter 1: ann accepted changed code at 20" in shown
    assert EARLIER not in shown.partition("filter 1 is ")[2].partition("cluster 1 is ")[0]
    assert "nothing to accept" in typed(*filtered, code=2)

    record = record_of("lineage")
    record.change(1, {"filter.keep_truncated": False})
    said = typed(*filtered, code=2)
    assert "more than code differs: filter.keep_truncated True → False" in said
    record.unchange(1, ["filter.keep_truncated"])
    assert "nothing to accept" in typed(*filtered, code=2)
    assert "no finished attempt" in typed("accept", "review:1", "--experiment", "lineage", code=2)
