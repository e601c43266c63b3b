"""The record, against a real MLflow on SQLite: what counts, what is reused, what is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from command import staple
from in_turn import in_turn

from constitutions.errors import UserError
from models.settings import Settings
from tasks.record.artifacts import Artifacts
from tasks.record.preview import SHOWN
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace, shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    value: int


class AddSettings(Settings):
    plus: int = 1


class Crash(RuntimeError):
    pass


@pytest.fixture
def slot(workplace: Path) -> Slot:
    return Slot(Record("an-experiment", workplace / "home"), 1, seed=7)


def adding(plus: int, calls: list[int]) -> Callable[[Workspace], Metrics]:
    def compute(work: Workspace) -> Metrics:
        calls.append(plus)
        work.write("numbers", [Number(value=plus)], Number)
        return {"sum": float(plus)}

    return compute


def run(slot: Slot, plus: int, calls: list[int], **inputs: Attempt) -> Attempt:
    return slot.attempt("add", AddSettings(plus=plus), inputs, adding(plus, calls))


def test_the_same_again_is_reused(slot: Slot) -> None:
    calls: list[int] = []
    first, second = run(slot, 1, calls), run(slot, 1, calls)
    assert calls == [1]
    assert (first.run_id, first.reused, second.reused) == (second.run_id, False, True)
    assert second.read("numbers", Number) == [Number(value=1)]
    assert second.metrics["sum"] == 1.0


def test_mlflow_shows_settings_and_tables(slot: Slot) -> None:
    class Named(AddSettings):
        name: str = "sum"
        unset: str | None = None

    done = slot.attempt("add", Named(), {}, adding(1, []))
    shown = slot.record.client.get_run(done.run_id).data
    assert shown.params == {"plus": "1", "name": "sum"}
    assert json.loads(shown.tags[SHOWN]) == [{"path": "numbers.json", "type": "table"}]
    table = json.loads(slot.record.artifacts.path(done.run_id, "numbers.json").read_bytes())
    assert table == {"columns": ["value"], "data": [[1]]}


def test_libraries_are_prepared_for_what_is_computed(slot: Slot) -> None:
    calls: list[Any] = []
    prepared = replace(slot, warm=calls.append)
    run(prepared, 1, calls)
    run(prepared, 1, calls)
    assert calls == ["add", 1], "before its clock starts, and not for what the record has"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, seed=8),
        lambda s: replace(s, iteration=2),
        lambda s: replace(s, notes={"base": "another model"}),
        lambda s: replace(s, mode=lambda _: "force"),
    ],
    ids=["seed", "iteration", "notes", "force"],
)
def test_what_makes_it_compute_again(slot: Slot, change: Callable[[Slot], Slot]) -> None:
    calls: list[int] = []
    run(slot, 1, calls)
    assert not run(change(slot), 1, calls).reused
    assert calls == [1, 1]


def test_another_setting_or_input_computes_again(slot: Slot) -> None:
    calls: list[int] = []
    one, two = run(slot, 1, calls), run(slot, 2, calls)
    run(slot, 3, calls, upstream=one)
    run(slot, 3, calls, upstream=two)
    run(slot, 3, calls, upstream=one)
    assert calls == [1, 2, 3, 3]


def test_an_older_attempt_that_is_asked_for_becomes_current(slot: Slot) -> None:
    calls: list[int] = []
    one = run(slot, 1, calls)
    assert run(slot, 2, calls).run_id == slot.record.needs("add", 1).run_id
    run(slot, 1, calls)
    assert slot.record.needs("add", 1).run_id == one.run_id
    assert run(slot, 3, calls).run_id == slot.record.needs("add", 1).run_id


def test_a_failed_attempt_does_not_count(slot: Slot) -> None:
    def fail(work: Workspace) -> Metrics:
        work.write("numbers", [Number(value=1)], Number)
        raise Crash("halfway")

    with pytest.raises(Crash):
        slot.attempt("add", AddSettings(), {}, fail)
    assert slot.record.current("add", 1) is None
    (failed,) = slot.record.runs(stage="add")
    assert failed.status == "FAILED"
    assert failed.tags["failure"] == "Crash: halfway"
    with pytest.raises(
        UserError, match="staple stage add --experiment an-experiment --iteration 1"
    ):
        slot.record.needs("add", 1)


def test_finished_shards_survive_a_crash(slot: Slot) -> None:
    computed: list[int] = []
    found: list[int] = []

    def compute(stop_at: int) -> Callable[[Workspace], Metrics]:
        def one(shard: list[int]) -> list[Number]:
            if shard[0] == stop_at:
                raise Crash("killed")
            computed.append(shard[0])
            return [Number(value=v) for v in shard]

        def whole(work: Workspace) -> Metrics:
            groups = shards(range(6), 2)
            parts = work.sharded(
                "n", Number, groups, in_turn(one), found=lambda s: found.append(s[0])
            )
            work.table(parts)
            return {}

        return whole

    with pytest.raises(Crash):
        slot.attempt("add", AddSettings(), {}, compute(stop_at=4))
    done = slot.attempt("add", AddSettings(), {}, compute(stop_at=-1))
    assert computed == [0, 2, 4]
    assert found == [0, 2]
    assert [n.value for n in done.read("n", Number)] == [0, 1, 2, 3, 4, 5]


def test_what_a_killed_process_left_half_written_is_no_output(slot: Slot) -> None:
    calls: list[int] = []
    clean = run(slot, 1, calls)

    def halfway(work: Workspace) -> Metrics:
        (work.outputs / "numbers.123.tmp").write_bytes(b"PAR1")
        raise Crash("killed")

    twin = replace(slot, mode=lambda _: "force")
    with pytest.raises(Crash):
        twin.attempt("add", AddSettings(plus=1), {}, halfway)
    assert list((slot.record.home / "work").rglob("*.tmp"))
    assert run(twin, 1, calls).digest == clean.digest


def test_the_manifest_tells_outputs_apart_and_nothing_else(slot: Slot) -> None:
    calls: list[int] = []
    one, two = run(slot, 1, calls), run(slot, 2, calls)
    again = run(replace(slot, mode=lambda _: "force"), 1, calls)
    assert one.digest == again.digest != two.digest


def test_one_run_per_iteration(slot: Slot) -> None:
    first = slot.record.iteration_run(1)
    assert slot.record.iteration_run(1) == first != slot.record.iteration_run(2)
    slot.record.log_iteration(1, {"win": 0.5})
    run_data = slot.record.client.get_run(first).data
    assert (run_data.metrics["win"], run_data.tags["kind"]) == (0.5, "iteration")


def test_asking_whether_it_exists_creates_nothing(tmp_path: Path) -> None:
    database = tmp_path / "none.db"
    assert not Record("e", tmp_path, f"sqlite:///{database}").exists()
    assert not database.exists()


def test_a_text_that_is_replaced_is_read_again_where_the_store_is_elsewhere(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artifacts, "folder", lambda *_: None)
    record = Record("e", workplace / "home")
    for text in ("epochs: 1\n", "epochs: 2\n"):
        record.log_text("settings.yaml", text)
        assert record.read_text("settings.yaml") == text


def test_a_deleted_experiment_is_named_with_the_way_back(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deleted in MLflow's page, as people do, then asked for by every command."""
    record = Record("gone", workplace / ".staple")
    record.log_text("settings.yaml", "experiment: gone\n")
    number = record.experiment_id
    record.client.delete_experiment(number)
    commands = (
        ["run", "planted", "--set", "experiment=gone"],
        ["run", "gone", "--resume"],
        ["stage", "mine", "--experiment", "gone", "--iteration", "1"],
        ["status", "gone"],
        ["compare", "gone:1", "gone:2"],
        ["report", "gone"],
        ["constitution", "show", "gone"],
        ["export", "gone"],
    )
    for words in commands:
        ran = staple(capsys, *words)
        assert ran.code == 2, words
        assert "experiment gone: this experiment was deleted in MLflow" in ran.err, words
        assert "take another name" in ran.err
        uri = f"sqlite:///{workplace / 'mlflow.db'}"
        way_back = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}"
        assert way_back in ran.err

    record.client.restore_experiment(number)
    assert Record("gone", workplace / ".staple").exists()
