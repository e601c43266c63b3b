"""What a change reaches: counted stage executions for every stage and setting, on a real loop.

A random chat model cannot learn; what is computed again does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import staple
from small_loop import run

from constitutions.constitution import load, save
from constitutions.errors import UserErrors
from flows.em import steps
from flows.experiment import open_experiment, recorded_settings, writing
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from flows.stages import run_stage
from flows.states import stage_states
from models import prompts
from tasks.record import slot
from tasks.record.code import code_versions
from tasks.record.record import Attempt
from tasks.rows import Labelled, Rejected
from tasks.similarity.registry import open_similarity

AFTER_MINE = [("score", 1), ("filter", 1), ("cluster", 1), ("train", 1), ("evaluate", 1)]
CHANGES: list[tuple[str, Any, list[tuple[str, int]]]] = [
    ("prompts.held_out", 5, [("prompts", 0), ("evaluate", 0), ("prompts", 1), ("mine", 1), *AFTER_MINE]),
    ("prompts.later", 1, [("prompts", 0), ("prompts", 1)]),
    ("mine.samples", 2, [("mine", 1), *AFTER_MINE]),
    ("mine.temperature", 0.9, [("mine", 1), *AFTER_MINE]),
    ("mine.critique", False, [("mine", 1), *AFTER_MINE]),
    ("mine.max_response_tokens", 20, [("mine", 1), *AFTER_MINE]),
    ("score.tokenizer", "unicode", [("evaluate", 0), *AFTER_MINE]),
    ("filter.selection", "best_of_n", AFTER_MINE[1:]),
    ("filter.min_gain", 0.05, AFTER_MINE[1:]),
    ("cluster.distance_threshold", 1.2, AFTER_MINE[2:]),
    ("cluster.representative", "none", AFTER_MINE[2:]),
    ("cluster.max_principles", 2, AFTER_MINE[2:]),
    ("train.epochs", 2, AFTER_MINE[3:]),
    ("train.learning_rate", 1e-3, AFTER_MINE[3:]),
    ("train.loss_on", ["refined"], AFTER_MINE[3:]),
    ("train.processes", 2, []),
    ("evaluate.resamples", 300, [("evaluate", 0), ("evaluate", 1)]),
    ("evaluate.temperature", 0.7, [("evaluate", 0), ("evaluate", 1)]),
    ("policy.batch_rows", 3, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value", "reached"), CHANGES, ids=[f"{c[0]}={c[1]}" for c in CHANGES]
)
def test_a_setting_reaches_its_stage_and_what_follows(
    at_home: ExperimentSettings, setting: str, value: Any, reached: list[tuple[str, int]]
) -> None:
    changed = with_changes(at_home, {setting: value})
    states = stage_states(changed)
    foretold = {place for place, state in states.items() if state.standing != "finished"}
    assert run(changed) == set(reached)
    assert foretold >= set(reached), "status foretells all of it"
    own = [state.since for (stage, _), state in states.items() if stage == setting.split(".")[0]]
    assert not foretold or any(setting in why for since in own for why in since)
    assert run(changed) == set()


def test_force_reaches_everything(at_home: ExperimentSettings) -> None:
    first = {("prompts", 0), ("evaluate", 0), ("prompts", 1), ("mine", 1)}
    assert run(at_home, force=True) == first | set(AFTER_MINE)


def test_from_a_stage_on(at_home: ExperimentSettings) -> None:
    """What comes before is taken as it is, even where its settings have changed since."""
    changed = with_changes(at_home, {"mine.samples": 1})
    assert run(changed, start=(1, "cluster")) == set(AFTER_MINE[2:])


def test_one_stage_alone_reads_what_is_recorded(at_home: ExperimentSettings) -> None:
    changed = with_changes(at_home, {"mine.samples": 1, "cluster.distance_threshold": 0.31})
    assert run(changed, only=(1, "cluster")) == {("cluster", 1)}


def test_a_run_feeds_on_what_it_made_itself(at_home: ExperimentSettings) -> None:
    """Between two of its stages another writer, who asks nobody, finishes the same with others."""
    with writing("lineage", "a run"):
        first = open_experiment(at_home)
        (answers,) = (a for a in steps(first, 0) if a.stage == "evaluate")
        rest = steps(first, 1)
        trained = next(attempt for attempt in rest if attempt.stage == "train")

        others = {"train.epochs": 3, "evaluate.temperature": 0.55}  # of no other test
        changed = with_changes(at_home, others)
        assert {("evaluate", 0), ("train", 1)} <= run(changed, made={})
        current = [first.record.needs(*place) for place in (("evaluate", 0), ("train", 1))]
        assert [a.digest for a in current] != [answers.digest, trained.digest]

        (evaluated,) = rest
        assert evaluated.inputs["initial"].digest == answers.digest
        second = open_experiment(at_home)  # the part of a run that is the next iteration
        assert second.policy(1, 2).adapter == trained
    later = open_experiment(at_home).policy(1, 2).adapter
    assert later and later.run_id == current[1].run_id


def stale(settings: ExperimentSettings) -> dict[tuple[str, int], tuple[str, ...]]:
    states = stage_states(settings).items()
    return {place: state.since for place, state in states if state.standing != "finished"}


def test_a_template_changes_what_asks_with_it(
    at_home: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(prompts.CHAT, refine=prompts.CHAT.refine + " Be brief.")
    monkeypatch.setitem(prompts.TEMPLATES, "chat", changed)
    found = stale(at_home)
    assert set(found) == {("evaluate", 0), ("mine", 1), *AFTER_MINE}
    assert "the prompt templates changed" in found["mine", 1]


def test_another_model_file_changes_what_it_answers(at_home: ExperimentSettings) -> None:
    config = Path("model/generation_config.json")
    before = config.read_text()
    try:
        config.touch()
        assert stale(at_home) == {}
        config.write_text(before + "\n")
        found = stale(at_home)
        assert set(found) == {("evaluate", 0), ("mine", 1), *AFTER_MINE}
        assert "the base model changed" in found["mine", 1]
    finally:
        config.write_text(before)


def test_another_row_changes_the_prompts(at_home: ExperimentSettings) -> None:
    rows = Path("rows.jsonl")
    before = rows.read_text()
    try:
        rows.touch()
        assert stale(at_home) == {}
        rows.write_text(before.replace("What is 3?", "What was 3?"))
        assert {("prompts", 0), ("prompts", 1)} <= set(stale(at_home))
    finally:
        rows.write_text(before)


@pytest.mark.parametrize(("stage", "reached"), [("score", AFTER_MINE), ("train", AFTER_MINE[3:])])
def test_other_code_changes_its_stage(
    at_home: ExperimentSettings,
    stage: str,
    reached: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def versions(module: str, *others: str) -> dict[str, str]:
        edited = {module: "edited"} if module == f"tasks.{stage}" else {}
        return code_versions(module, *others) | edited

    monkeypatch.setattr(slot, "code_versions", versions)
    found = stale(at_home)
    assert set(found) == set(reached)
    assert f"code of tasks.{stage} changed" in found[stage, 1]


# One stage by itself, as people type it ------------------------------------------------------


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def go(*words: str, code: int = 0) -> str:
        ran = staple(capsys, *words)
        assert ran.code == code, ran.err
        assert "Traceback" not in ran.err
        return " ".join((ran.out + ran.err).split())

    return go


@pytest.mark.usefixtures("prefect_server")
def test_another_embedder_in_the_same_directory_is_another_one(
    at_home: ExperimentSettings,
) -> None:
    file = Path("embedder/config.json")
    file.parent.mkdir()
    chosen = {"score.similarity": "embedding", "score.embedding_model": "./embedder"}
    settings = with_changes(at_home, chosen)
    at, found = open_experiment(settings).slot(1), []
    for text in ("{}", "{ }", "{}"):
        file.write_text(text)
        found.append(open_similarity(settings.score).noted(at).notes["embedder"])
    assert found[0] == found[2] != found[1]


def test_a_stage_keeps_its_own_settings_and_resume_does_the_rest(
    at_home: ExperimentSettings, type_: Callable[..., str]
) -> None:
    cluster = ("stage", "cluster", "--experiment", "lineage", "--iteration", "1")
    shown = type_(*cluster, "--set", "cluster.max_principles=3")
    assert "train 1 is stale: cluster 1 has changed" in shown
    assert "changed for iteration 1 alone: cluster.max_principles=3" in shown
    assert recorded_settings("lineage") == at_home, "the experiment's own settings stay"

    assert "2 stages computed" in type_("run", "lineage", "--resume")
    assert stale(recorded_settings("lineage")) == {}
    assert "reused from the record" in type_(*cluster)
    everywhere = type_("run", "lineage", "--resume", "--set", "cluster.max_principles=null")
    assert "0 stages computed" in everywhere, "the change of one iteration has given way"


@pytest.mark.parametrize(
    ("stage", "name"),
    [("prompts", "prompts.held_out"), ("prompts", "prompts.first"), ("mine", "policy.model")],
)
def test_what_all_iterations_share_is_not_changed_for_one(
    at_home: ExperimentSettings, stage: str, name: str
) -> None:
    """Else an iteration would mine held-out prompts, or train an adapter of another model."""
    with pytest.raises(UserErrors, match=rf"'{name}': it is the same in every iteration.*--resume"):
        run_stage("lineage", stage, 1, {name: 9})


@pytest.mark.usefixtures("prefect_server")
def test_a_failed_stage_says_why(at_home: ExperimentSettings, type_: Callable[..., str]) -> None:
    wrong = ("--set", "score.similarity=embedding", "--set", "score.embedding_model=/nowhere")
    said = type_("stage", "score", "--experiment", "lineage", "--iteration", "1", *wrong, code=2)
    assert "/nowhere" in said
    shown = type_("status", "lineage")
    assert "score 1 is failed: UserError" in shown
    assert "score.similarity rouge_l → embedding" in shown
    assert "filter 1 is stale: score 1 is failed" in shown


@pytest.mark.usefixtures("prefect_server")
def test_from_the_command_line(at_home: ExperimentSettings, type_: Callable[..., str]) -> None:
    assert "2 stages computed" in type_("run", "lineage", "--from", "train:1")


@pytest.mark.usefixtures("prefect_server")
def test_a_run_stops_for_its_review(at_home: ExperimentSettings, type_: Callable[..., str]) -> None:
    shown = type_("run", "lineage", "--resume", "--set", "review.enabled=true")
    assert "Iteration 1 awaits your review" in shown
    assert set(stale(recorded_settings("lineage"))) == {
        ("review", 1),
        ("train", 1),
        ("evaluate", 1),
    }

    record = open_experiment(at_home).record
    clustered = record.needs("cluster", 1)
    constitution = load(clustered.path("constitution.yaml"))
    dropped = constitution.principles[0]
    kept = constitution.model_copy(update={"principles": constitution.principles[1:]})
    save(kept, "edited.yaml")
    edit = ("constitution", "edit", "lineage", "--iteration", "1")
    type_(*edit, "--file", "edited.yaml", "--by", "ann", "--note", "not for us")

    assert "2 stages computed" in type_("run", "lineage", "--resume")
    assert stale(recorded_settings("lineage")) == {}
    reviewed = record.needs("review", 1)
    assert record.client.get_run(reviewed.run_id).data.tags["review.by"] == "ann"
    labels = {row.label for row in reviewed.read("labelled", Labelled)}
    assert dropped.text not in labels and labels
    assert {r.detail for r in reviewed.read("rejected", Rejected)} == {dropped.text}
    trained = record.needs("train", 1)
    assert trained.inputs["labelled"].stage == "review"
    assert trained.metrics["train/lessons"] == len(reviewed.read("labelled", Labelled))
    assert dropped.text not in type_("constitution", "show", "lineage")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage", "cluster", "--set", "mine.samples=3"), "stage 'cluster' does not read this"),
        (("stage", "cluster", "--set", "cluster.treshold=3"), "unknown setting"),
        (("stage", "clutser"), "no stage 'clutser'"),
        (("stage", "review"), "staple constitution edit lineage --iteration 1"),
    ],
)
def test_what_cannot_be_run_by_itself(
    at_home: ExperimentSettings, type_: Callable[..., str], words: tuple[str, ...], said: str
) -> None:
    shown = type_(*words, "--experiment", "lineage", "--iteration", "1", code=2)
    assert said in shown
    assert stale(at_home) == {}, "nothing was changed"


@pytest.mark.parametrize("place", ["clutser", "cluster:9", "cluster:x", "mine:0"])
def test_from_a_place_that_is_not_there(
    at_home: ExperimentSettings, type_: Callable[..., str], place: str
) -> None:
    assert "there is no such stage" in type_("run", "lineage", "--from", place, code=2)


@pytest.mark.quick  # a whole small loop
def test_attempts_are_told_apart(at_home: ExperimentSettings) -> None:
    record = open_experiment(at_home).record
    attempt: Attempt = record.needs("cluster", 1)
    made_from = attempt.provenance()
    assert made_from.settings["distance_threshold"] == 0.8
    assert made_from.fingerprint == attempt.fingerprint
    params = record.client.get_run(attempt.run_id).data.params
    assert params["distance_threshold"] == "0.8", "MLflow's comparison shows it"
