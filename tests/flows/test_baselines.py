"""Baselines: which stages a method has, what it trains on, and equal budgets; on a real loop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command import staple
from small_loop import run

from constitutions.errors import UserError
from flows.baselines import baseline_settings, check_names, split_overrides
from flows.experiment import note_settings, open_experiment, recorded_settings
from flows.methods import method_of
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from flows.states import stage_states
from models.training.adapter import TrainingStep
from tasks.rows import Answer, Mined, Trajectory

LOOP = {("prompts", 0), ("evaluate", 0), ("prompts", 1)}
TRAINED = {("train", 1), ("evaluate", 1)}
MINED = {("mine", 1), ("score", 1), ("filter", 1)}


@pytest.mark.parametrize(
    ("changes", "stages", "name"),
    [
        ({"method": "star"}, LOOP | MINED | TRAINED, "STaR"),
        ({"method": "sft"}, LOOP | TRAINED, "SFT on gold"),
        ({"method": "star", "iterations": 0}, {("prompts", 0), ("evaluate", 0)}, "Self-Refine"),
        (
            {"cluster.representative": "none"},
            LOOP | MINED | {("cluster", 1)} | TRAINED,
            "STaPLe, unconstrained",
        ),
    ],
)
def test_a_method_has_its_own_stages(
    at_home: ExperimentSettings, changes: dict[str, Any], stages: set[Any], name: str
) -> None:
    settings = with_changes(at_home, changes)
    assert method_of(settings).title(settings) == name
    run(settings)
    note_settings(settings)
    states = stage_states(settings)
    assert set(states) == stages
    assert {state.standing for state in states.values()} == {"finished"}
    assert run(settings) == set(), "an unchanged baseline computes nothing"


def test_star_has_no_principle_anywhere(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"method": "star"})
    run(settings)
    record = open_experiment(settings).record
    mined = record.needs("mine", 1).read("mined", Mined)
    kept = record.needs("filter", 1).read("trajectories", Trajectory)
    answers = record.needs("evaluate", 1).read("answers", Answer)
    assert kept, "something was kept without a principle"
    assert {c.principle for row in mined for c in row.candidates} == {""}
    assert {row.principle for row in kept} == {""} == {a.principle for a in answers}
    assert record.needs("train", 1).inputs["labelled"].stage == "filter"


def test_fine_tuning_on_golds_reads_the_prompts(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"method": "sft"})
    run(settings)
    record = open_experiment(settings).record
    trained = record.needs("train", 1)
    assert trained.inputs["labelled"].stage == "prompts"
    assert trained.metrics["train/lessons"] == settings.prompts.first


def test_a_training_can_begin_anew_at_the_base(at_home: ExperimentSettings) -> None:
    twice = with_changes(at_home, {"method": "sft", "iterations": 2, "train.epochs": 3})
    run(twice)
    record = open_experiment(twice).record
    continued = record.needs("train", 2).metrics["train/first_loss"]
    run(with_changes(twice, {"train.start": "base"}))
    assert record.needs("train", 2).metrics["train/first_loss"] > continued


@pytest.mark.usefixtures("prefect_server")
def test_the_command_runs_them_at_equal_budgets(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = 9000
    ran = staple(
        capsys, "baselines", "lineage.yaml", "--only", "star", "--only", "self-refine",
        "--set", f"train.tokens={tokens}", "--set", "star:mine.samples=4",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "lineage.star" in ran.out and "lineage.self-refine" in ran.out
    assert "staple report lineage lineage.star lineage.self-refine" in ran.out
    star = recorded_settings("lineage.star")
    assert (star.method, star.mine.samples, star.train.tokens) == ("star", 4, tokens)
    for name in ("lineage", "lineage.star"):
        trained = open_experiment(recorded_settings(name)).record.needs("train", 1)
        spent = [0, *(step.tokens for step in trained.read("curve", TrainingStep))]
        largest = max(after - before for before, after in pairwise(spent))
        assert abs(spent[-1] - tokens) <= largest / 2


def test_the_budget_is_the_experiments_own_where_none_is_set(at_home: ExperimentSettings) -> None:
    other = baseline_settings(at_home, "star", 777, {"train.learning_rate": 1e-3})
    assert other.experiment == "lineage.star" and other.train.tokens == 777
    assert other.train.learning_rate == 1e-3 and other.prompts == at_home.prompts


def test_all_mistakes_are_told_before_anything_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = staple(capsys, "baselines", "planted", "--set", "star:mine.sample=8")
    assert ran.code == 2 and "'mine.sample'" in ran.err and "did you mean 'samples'?" in ran.err
    long = f"experiment={'e' * 95}"
    assert staple(capsys, "baselines", "planted", "--set", long).code == 2
    assert not (workplace / ".staple").exists() or not list((workplace / ".staple").glob("work/*"))


def test_a_setting_can_be_for_one_baseline() -> None:
    own, changes = split_overrides(["seed=1", "star:mine.samples=8", "policy.model=a:b"])
    assert own == ["seed=1", "policy.model=a:b"]
    assert changes == {"star": {"mine.samples": 8}}


@pytest.mark.parametrize(
    ("names", "changes", "expected"),
    [(["stars"], {}, "self-refine, star"), (["sft"], {"star": {}}, "not among those to run")],
)
def test_a_wrong_baseline_is_refused(names: list[str], changes: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_names(names, changes)
