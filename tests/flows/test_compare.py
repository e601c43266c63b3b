"""Side by side: only what differs, in experiments, iterations and attempts."""

from __future__ import annotations

import re

import pytest
from command import staple
from small_loop import run

from constitutions.constitution import Constitution, Principle, Tail, diff
from constitutions.errors import UserError
from flows.commands.compare import Compared, Side, compare, show_compared
from flows.experiment import note_settings, open_experiment
from flows.schema import ExperimentSettings
from flows.settings import with_changes

TAIL = Tail(principles=40, support=50, share=0.1)


def test_two_attempts_of_a_stage(at_home: ExperimentSettings) -> None:
    run(with_changes(at_home, {"cluster.max_principles": 2}), only=(1, "cluster"))
    attempts = open_experiment(at_home).record.attempts("cluster", 1)
    assert len(attempts) == 2
    found = compare("lineage:1:cluster@1", "lineage:1:cluster@2")
    assert found.settings == [("max_principles", "None", "2")]
    sizes = {name: (a, b) for name, a, b in found.metrics}["constitution_size"]
    assert sizes[1] == "2" and float(sizes[0]) > 2
    assert found.constitution is not None
    changes = found.constitution
    gone = len(changes.merged) + len(changes.dropped)
    assert gone == float(sizes[0]) - 2, "every principle is accounted for"
    same = compare("lineage:1:cluster", "lineage:1:cluster@2")
    assert (same.settings, same.metrics) == ([], [])


def test_two_experiments(at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]) -> None:
    changed = with_changes(at_home, {"experiment": "other", "train.epochs": 2, "cluster.max_principles": 2})  # fmt: skip
    note_settings(changed)
    run(changed)
    found = compare("lineage", "other")
    assert found.settings == [("cluster.max_principles", "None", "2"), ("train.epochs", "1", "2")]
    figures = {name: (a, b) for name, a, b in found.metrics}
    tokens = figures["train/tokens · 1"]
    assert tokens[0] != tokens[1], "twice the epochs"
    assert found.equal > 10, "the E-step is the same"
    shown = staple(capsys, "compare", "lineage", "other")
    assert shown.code == 0
    for part in ("cluster.max_principles", "figures are the same", "principles, lineage → other"):
        assert part in shown.out


def test_an_interval_stands_beside_its_figure(at_home: ExperimentSettings) -> None:
    figures = {name: (a, b) for name, a, b in compare("lineage:0", "lineage:1").metrics}
    assert figures["win_rate/refined_vs_0"][0] == "–"
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, [01]\.\d+\]", figures["win_rate/refined_vs_0"][1])
    assert not any(name.endswith(("_low", "_high")) for name in figures)


def test_many_changes_are_listed_by_trajectories_and_the_rest_in_one_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.commands.compare.SHOWN", 2)
    old = Constitution(principles=tuple(Principle(text=f"old {n}", support=n) for n in range(5)))
    new = Constitution(principles=(Principle(text="new", support=7),), tail=TAIL)
    left, right = (Side(name, {}, {}, None) for name in ("left", "right"))
    show_compared(Compared(left, right, [], [], 0, diff(old, new)))
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    dropped = [line[1:] for line in shown if line[:1] == ["dropped"]]
    assert dropped == [["4", "old", "4"], ["3", "old", "3"], ["3", "…", "3", "more", "principles"]]
    assert [line[:4] for line in shown if line[:1] == ["tail"]] == [["tail", "0", "→", "50"]]


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ("lineage", "lineage:1", "different kinds"),
        ("lineage:1:clutser", "lineage:1:cluster", "no stage 'clutser'"),
        ("lineage:1:cluster@9", "lineage:1:cluster", "no attempt 9"),
        ("lineage:9", "lineage:1", "no stage of this iteration"),
        ("nobody", "lineage", "nothing is recorded"),
        ("lineage:one", "lineage:1", "not a reference"),
    ],
)
def test_references_that_name_nothing(
    at_home: ExperimentSettings, left: str, right: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        compare(left, right)
