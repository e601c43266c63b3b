"""Side by side: only what differs, in experiments, iterations and attempts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from command import staple
from small_loop import run

from constitutions.constitution import Constitution, Principle, Tail, diff
from constitutions.errors import UserError
from flows.commands.compare import Compared, Figure, Side, compare, show_compared
from flows.experiment import note_settings, open_experiment
from flows.schema import ExperimentSettings
from flows.settings import with_changes


def figures(found: Compared) -> dict[str, Figure]:
    return {figure.name: figure for figure in found.figures}


TAIL = Tail(principles=40, support=50, share=0.1)


def test_two_attempts_of_a_stage(at_home: ExperimentSettings) -> None:
    run(with_changes(at_home, {"cluster.max_principles": 2}), only=(1, "cluster"))
    attempts = open_experiment(at_home).record.attempts("cluster", 1)
    assert len(attempts) == 2
    found = compare("lineage:1:cluster@1", "lineage:1:cluster@2")
    assert found.settings == [("max_principles", "None", "2")]
    size = figures(found)["constitution_size"]
    assert size.right == (2.0,) and size.left and size.left[0] > 2
    assert size.shown(size.difference, signed=True) == f"{2 - size.left[0]:.0f}"
    assert found.constitution is not None
    changes = found.constitution
    gone = len(changes.merged) + len(changes.dropped)
    assert gone == size.left[0] - 2, "every principle is accounted for"
    same = compare("lineage:1:cluster", "lineage:1:cluster@2")
    assert not same.settings and all(f.left == f.right for f in same.figures)


def test_two_experiments(at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]) -> None:
    changed = with_changes(at_home, {"experiment": "other", "train.epochs": 2, "cluster.max_principles": 2})  # fmt: skip
    note_settings(changed)
    run(changed)
    found = compare("lineage", "other")
    assert found.settings == [("cluster.max_principles", "None", "2"), ("train.epochs", "1", "2")]
    tokens = figures(found)["train/tokens · 1"]
    assert tokens.left != tokens.right, "twice the epochs"
    equal = [f for f in found.figures if f.left == f.right]
    assert len(equal) > 10, "the E-step is the same"
    shown = staple(capsys, "compare", "lineage", "other")
    assert shown.code == 0
    assert "mined candidates" not in shown.out and "train, iteration 1" in shown.out
    assert "mined candidates" in staple(capsys, "compare", "lineage", "other", "--all").out
    facts = json.loads(staple(capsys, "compare", "lineage", "other", "--json").out)
    assert {row["name"] for row in facts["settings"]} == {"cluster.max_principles", "train.epochs"}
    assert len(facts["figures"]) == len(found.figures)
    for part in ("cluster.max_principles", "figures are the same", "principles, lineage → other"):
        assert part in shown.out


def test_a_figure_is_shown_as_what_it_is(at_home: ExperimentSettings) -> None:
    found = figures(compare("lineage:0", "lineage:1"))
    rate = found["win_rate/refined_vs_0"]
    assert rate.shown(rate.left) == "–"
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, [01]\.\d+\]", rate.shown(rate.right))
    assert not any(name.endswith(("_low", "_high")) for name in found)
    p_value = replace(found["win_rate/refined_vs_0_p"], right=(2e-9,))
    assert p_value.shown(p_value.right) == "<0.001"
    tokens = replace(found["train/tokens"], left=(1000.0,))
    assert tokens.shown(tokens.left) == "1,000"


def test_a_difference_of_rates_has_newcombes_interval() -> None:
    """Example (a) of Newcombe (1998), table II, method 10: 56/70 − 48/80."""
    found = Figure("win_rate/x", (0.6, 0.4904, 0.7003), (0.8, 0.6923, 0.8771))
    assert found.difference == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-3)


def test_many_changes_are_listed_by_trajectories_and_the_rest_in_one_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.commands.compare.SHOWN", 2)
    old = Constitution(principles=tuple(Principle(text=f"old {n}", support=n) for n in range(5)))
    new = Constitution(principles=(Principle(text="new", support=7),), tail=TAIL)
    left, right = (Side(name, {}, {}, None) for name in ("left", "right"))
    show_compared(Compared(left, right, [], [], diff(old, new)))
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
