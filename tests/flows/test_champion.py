"""Champions in the loop: who is compared with whom, the alias, and where `auto` stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import staple
from small_loop import run

from constitutions.constitution import load
from constitutions.errors import UserErrors
from flows.champion import decided
from flows.experiment import Experiment, note_settings, open_experiment, writing
from flows.publish import publish_iteration
from flows.registry import MODEL, crown, log_corpora, registered
from flows.schema import ExperimentSettings
from flows.settings import load_settings, with_changes
from flows.states import stage_states, unchanged
from models.files import file_sha256
from tasks.judging.champion import ChampionDecision
from tasks.record.record import DECISION, Attempt

QUICK = {"prompts.first": 4, "mine.samples": 1, "cluster.representative": "none"}


def attempts(e: Experiment, t: int) -> dict[str, Attempt]:
    return {stage: e.record.needs(stage, t) for stage in ("prompts", "train", "evaluate")}


def judge(e: Experiment, t: int, *, accepted: bool) -> None:
    """Put another verdict in place of the random model's."""
    evaluated = e.record.needs("evaluate", t)
    found = ChampionDecision.read(evaluated.decision)
    assert found
    found = replace(found, p_value=0.0 if accepted else 1.0)
    e.record.client.set_tag(evaluated.run_id, DECISION, found.tag)


def champions(e: Experiment) -> dict[str, str]:
    """The registered model's aliases → the iterations that they name."""
    client, name = e.record.client, e.record.experiment
    found = client.get_registered_model(name).aliases
    return {a: client.get_model_version(name, v).tags["iteration"] for a, v in found.items()}


def test_the_champion_is_who_an_iteration_has_to_beat(at_home: ExperimentSettings) -> None:
    settings = with_changes(
        at_home, {**QUICK, "experiment": "champions", "iterations": 2, "decisions": 2}
    )
    note_settings(settings)
    run(settings)
    with writing("champions", "a test"):
        e = open_experiment(settings)
        assert e.references(2).keys() == {"held_out", "initial", "previous"}
        for t in (1, 2):
            found = decided(e, t, attempts(e, t))
            decision = ChampionDecision.read(found["evaluate"].decision)
            assert decision and not decision.accepted, "of two prompts nobody can tell"
            assert decision.share == 0.5 and decision.champion == 0
            assert decided(e, t, found) == found, "decided once"
            model = registered(e, t, found)
            assert model and registered(e, t, found) == model, "once for each training"
            assert publish_iteration(e, t, found, model)
            log_corpora(e, t, found["prompts"])
            crown(e)
    assert len(e.record.client.search_model_versions("name='champions'")) == 2
    show_lineage(e)
    assert champions(e) == {}

    judge(e, 1, accepted=True)
    e = open_experiment(settings)
    assert e.champion(2) == 1
    assert e.decision(2, 1) is None, "it met another champion"
    decided(e, 2, attempts(e, 2))
    judge(e, 2, accepted=False)
    crown(e)
    assert champions(e) == {"champion": "1"}
    prompt = e.record.client.get_prompt_version_by_alias("champions.constitution", "champion")
    assert prompt.tags["iteration"] == "1"
    texts = load(e.constitution(1).path("constitution.yaml")).texts
    assert all(text.replace("{{", "{ {") in prompt.template for text in texts)

    longer = with_changes(settings, {"iterations": 3})
    assert open_experiment(longer).references(3)["champion"].key == ("champions", "evaluate", 1)
    run(longer)
    third = open_experiment(longer).record.needs("evaluate", 3)
    assert "win_rate/refined_vs_1" in third.metrics, "neither the first nor the one before"


def test_sami_is_judged_by_its_constitutions_and_what_it_loses(
    taught: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing("taught", "a test"):
        e = open_experiment(taught)
        found = decided(e, 1, attempts(e, 1))
        decision = ChampionDecision.read(found["evaluate"].decision)
        assert decision and decision.share == 1.0 and not decision.against
        sides = decision.wins, decision.losses, decision.ties, decision.failed
        assert sum(sides) == taught.prompts.held_out

        e.record.client.delete_tag(found["evaluate"].run_id, DECISION)
        monkeypatch.setattr("flows.champion.ERROR_RATE", 1.0)  # four prompts can show no loss
        found = decided(e, 1, attempts(e, 1))
        decision = ChampionDecision.read(found["evaluate"].decision)
        assert decision and len(decision.against) == 2 and not decision.accepted


def show_lineage(e: Experiment) -> None:
    """In MLflow: what each run read and made, the model's files and figures, the corpora."""
    client: Any = e.record.client
    second = attempts(e, 2)
    (version,) = client.search_model_versions(f"run_id='{second['train'].run_id}'")
    model = client.get_logged_model(version.tags[MODEL])
    assert model.status == "READY" and version.source == model.artifact_location
    files = {path.name: path for path in Path(model.artifact_location).iterdir()}
    assert "# champions-2" in files["README.md"].read_text("utf-8")
    weights = second["train"].path("adapter") / "adapter_model.safetensors"
    assert files[weights.name].read_bytes() == weights.read_bytes()
    figures = {metric.key: metric.value for metric in model.metrics}
    assert figures["champion/accepted"] == 0.0 and "win_rate/initial_vs_0" in figures

    trained, evaluated = (client.get_run(second[stage].run_id) for stage in ("train", "evaluate"))
    assert [made.model_id for made in trained.outputs.model_outputs] == [version.tags[MODEL]]
    assert [read.model_id for read in evaluated.inputs.model_inputs] == [version.tags[MODEL]]
    first = client.search_model_versions(f"run_id='{attempts(e, 1)['train'].run_id}'")[0]
    assert [read.model_id for read in trained.inputs.model_inputs] == [first.tags[MODEL]]
    (corpus,) = client.get_run(e.record.iteration_run(2)).inputs.dataset_inputs
    assert corpus.dataset.name == "rows.jsonl"
    assert corpus.dataset.digest == file_sha256(Path("rows.jsonl"))[:36]


@pytest.mark.usefixtures("prefect_server")
def test_auto_stops_after_two_that_do_not_become_champion(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**QUICK, "experiment": "auto", "iterations": "auto", "max_iterations": 3}
    settings = with_changes(at_home, changes)
    note_settings(settings)
    assert {t for _, t in stage_states(settings)} == {0}, "nobody knows yet how many follow"
    ran = staple(capsys, "run", "auto", "--resume")
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "at most 3 EM iterations" in said and "prompts that no decision has used" in said
    done = unchanged(settings)
    assert done and len(done) == 3, "iterations 0, 1 and 2"
    assert {t for _, t in stage_states(settings)} == {0, 1, 2}
    top = open_experiment(settings).record
    figures = top.reader.run(top.iteration_run(2)).metrics
    assert figures["champion/accepted"] == 0.0

    judge(open_experiment(settings), 2, accepted=True)
    assert {t for _, t in stage_states(settings)} == {0, 1, 2, 3}, "it goes on from a champion"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iterations": "automatic"}, "iterations"),
        ({"iterations": "auto", "review": {"enabled": True, "which": "last"}}, "review.which"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserErrors, match=said):
        with_changes(load_settings("planted"), changes)
