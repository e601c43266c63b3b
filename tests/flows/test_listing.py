"""What is recorded, and whether it holds: `staple list`, `status` and their JSON, at any width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import staple

from constitutions import terminal
from constitutions.constitution import load
from flows.commands import tables
from flows.experiment import note_settings, record_of
from flows.schema import ExperimentSettings
from flows.settings import about, presets, with_changes

TITLE = "experiments; win rates"


@pytest.fixture(autouse=True)
def _found(at_home: ExperimentSettings) -> None:
    """All tests ask about the finished experiment "lineage"."""


@pytest.fixture
def stale(at_home: ExperimentSettings) -> Iterator[None]:
    """The experiment with another setting of its clusters."""
    note_settings(with_changes(at_home, {"cluster.max_principles": 3}))
    yield
    note_settings(at_home)


def test_list_names_what_is_recorded_and_only_that(capsys: pytest.CaptureFixture[str]) -> None:
    record_of("lineage").client.create_experiment("somebody-elses")
    shown = staple(capsys, "list").out
    row = next(line.split() for line in shown.splitlines() if line.startswith("lineage"))
    assert row[:4] == ["lineage", "1", "of", "1"]
    assert row[-2:] == ["similarity", "finished"], "the judge is named"
    assert "somebody" not in shown
    (fact,) = json.loads(staple(capsys, "list", "--json").out)
    assert fact["headline"]["judge"] == "similarity"
    assert fact["headline"]["rate"]["low"] <= fact["headline"]["rate"]["rate"]


def test_status_without_a_name_is_the_only_experiments(
    capsys: pytest.CaptureFixture[str], at_home: ExperimentSettings
) -> None:
    only = staple(capsys, "status").out
    assert only == staple(capsys, "status", "lineage").out
    note_settings(with_changes(at_home, {"experiment": "second"}))
    both = staple(capsys, "status").out
    assert TITLE in both and "second" in both


@pytest.mark.usefixtures("stale")
def test_what_is_stale_says_so_wherever_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert "stale" in staple(capsys, "list").out
    why = "cluster.max_principles None → 3"
    assert f"cluster 1 is stale: {why}" in staple(capsys, "constitution", "show", "lineage").out
    assert "Not all of it is current: 3 stale" in staple(capsys, "status", "lineage").out
    facts = json.loads(staple(capsys, "status", "lineage", "--json").out)
    (cluster,) = [stage for stage in facts["stages"] if stage["stage"] == "cluster"]
    assert cluster["standing"] == "stale" and cluster["since"] == [why]
    found = json.loads(staple(capsys, "constitution", "show", "lineage", "--json").out)
    assert why in found["stale"]
    assert len(found["principles"]) == cluster["figures"]["constitution_size"]


def test_a_misspelt_name_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "status", "linaege")
    assert ran.code == 2 and "did you mean 'lineage'?" in ran.err


@pytest.mark.parametrize("words", [("list",), ("status",), ("compare", "lineage:0", "lineage:1")])
@pytest.mark.parametrize("width", [80, 40])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_cut(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    width: int,
) -> None:
    monkeypatch.setattr(terminal.console, "_width", width)  # `width` would stay
    shown = staple(capsys, *words).out
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown


def test_columns_are_as_wide_as_their_words() -> None:
    """Where two texts share a line, neither loses a letter; where they cannot, each has its own."""
    made = tables.table("t", ("a", "text"), [["x" * 9, "many short words"]], texts=(0, 1))
    assert made._fitted(30) == (2, [9, 16])
    assert made._fitted(17) == (1, [9, 7]), "the longest word of the text still fits"
    assert made._fitted(14) is None


def test_staple_alone_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    shown = staple(capsys).out
    assert "staple run planted" in shown and "list" in shown
    assert staple(capsys, "--version").out.startswith("staple 0.")


def test_run_alone_says_what_it_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "run")
    assert ran.code == 2 and "nothing was run" in ran.err
    for name in presets():
        assert f"staple run {name}  {about(name)}" in ran.out
    assert "staple run lineage --resume" in ran.out


def test_a_hint_names_no_iteration_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "constitution", "show", "lineage", "--iteration", "8")
    assert ran.code == 2
    assert "there is no iteration 8; expected at most 1" in ran.err
    assert "staple stage" not in ran.err


def test_who_edits_a_constitution_sees_examples_not_only_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"cp --target-directory={tmp_path}")  # looks, and changes nothing
    ran = staple(capsys, "constitution", "edit", "lineage", "--by", "me")
    assert ran.code == 0 and "approved as it is" in ran.out
    (seen,) = tmp_path.glob("lineage-1-*.yaml")
    principles, text = load(seen).principles, seen.read_text("utf-8")
    assert text.count("# prompt: What is ") == len(principles) == text.count("# refined: ")
