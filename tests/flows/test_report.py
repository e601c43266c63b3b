"""`staple report`: one file from the record alone, with its traces in Prefect and MLflow."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import yaml
from command import staple, words
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from small_loop import run

from flows import em
from flows.commands.report import gather, packages
from flows.experiment import note_settings, open_experiment, record_of, recorded_settings
from flows.publish import iteration_metrics
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from tasks.record.record import SUMMARY
from tasks.record.work import JOURNAL
from tasks.report.document import page, results
from tasks.rows import Answer, ClusterRow


@pytest.fixture
def drawn(at_home: ExperimentSettings) -> ExperimentSettings:
    """The experiment with a map, under its own name."""
    settings = with_changes(at_home, {"experiment": "drawn", "cluster.picture": "svd"})
    note_settings(settings)
    run(settings)
    return settings


def test_one_file_with_its_traces(
    drawn: ExperimentSettings, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Path(".staple/work") / JOURNAL
    before = journal.read_text()
    shown = staple(capsys, "report", "drawn", "lineage", "--out", "shown.html")
    assert (shown.code, shown.err) == (0, "")
    assert "Wrote shown.html" in shown.out
    assert journal.read_text() == before, "nothing was computed"
    assert not list(Path().glob(".shown*")), "no litter"
    text = Path("shown.html").read_text("utf-8")
    record = record_of("drawn")
    attempts = [record.needs(stage, t) for stage, t in (("mine", 1), ("evaluate", 0), ("train", 1))]
    for attempt in attempts:
        assert attempt.run_id in text and attempt.fingerprint in text
        assert attempt.provenance().code_digest in text
    assert attempts[0].provenance().notes["base"] in text
    files = {f.path for f in record.client.list_artifacts(record.iteration_run(SUMMARY))}
    assert {"win_rate.png", "previous.png", "constitution.png", "tokens.png"} <= files
    with get_client(sync_client=True) as client:
        (artifact, *_) = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["results"])),
            sort=ArtifactSort.CREATED_DESC,
        )
    rows = yaml.safe_load(str(artifact.data))
    assert {row["experiment"] for row in rows} == {"drawn", "lineage"}
    rate = attempts[2].record.needs("evaluate", 1).metrics["win_rate/refined_vs_initial_0"]
    assert any(f"{100 * rate:.1f}\u00a0%" in row["Held-out win rate"] for row in rows)


def test_it_shows_what_the_record_has(drawn: ExperimentSettings) -> None:
    text = page([gather(drawn)], packages())
    assert text == page([gather(drawn)], packages()), "the same record, the same bytes"
    shown, record = words(text), record_of("drawn")
    figures = iteration_metrics({s: record.needs(s, 1) for s in ("mine", "train", "evaluate")})
    for name in ("generated_tokens", "train/tokens"):
        assert f"{figures[name]:,.0f}" in shown
    for name in ("refined_vs_initial_0", "refined_vs_previous"):
        assert f"{100 * figures[f'win_rate/{name}']:.1f} %" in shown
    answers = record.needs("evaluate", 1).read("answers", Answer)
    for answer in answers:  # fewer than ten: all are shown
        assert " ".join(answer.principle.split()) in shown
    (settings,) = re.findall(r"<summary>Settings</summary><pre>(.*?)</pre>", text, re.DOTALL)
    assert yaml.safe_load(html.unescape(settings)) == drawn.model_dump(mode="json")
    assert "stale" not in shown.split("Stages:")[1]
    rows = record.needs("cluster", 1).read("clusters", ClusterRow)
    assert text.count('class="dot ') == sum(row.x is not None for row in rows) > 1
    assert f"torch {packages()['torch']}" in shown


def test_without_a_map_the_reason_is_given(at_home: ExperimentSettings) -> None:
    shown = words(page([gather(at_home)], {}))
    assert "cluster.picture is “none”" in shown
    assert "The clusters, as they were found" in shown


def test_without_an_iteration(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"experiment": "untrained", "iterations": 0, "method": "star"})
    note_settings(settings)
    run(settings)
    shown = words(page([gather(settings)], {}))
    assert "There is no constitution. The experiment has no iteration (iterations = 0)" in shown
    assert "Self-Refine untrained 0 initial" in shown
    assert "Before and after" in shown and "Refined answer" in shown


def test_a_method_without_principles(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"experiment": "starry", "method": "star"})
    note_settings(settings)
    run(settings)
    shown = words(page([gather(settings)], {}))
    assert "There is no map. The method, STaR, has no stage “cluster”." in shown
    assert "none is named" in shown


def test_tuning_on_golds_shows_the_answer_after_training(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"experiment": "golds", "method": "sft"})
    note_settings(settings)
    run(settings)
    text = page([gather(settings)], {})
    shown = words(text)
    assert "Initial policy’s answer" in shown and "Answer after training" in shown
    (first,) = [row for row in results([gather(settings)]) if row.marks == ("best", "last")]
    rate = record_of("golds").needs("evaluate", 1).metrics["win_rate/initial_vs_0"]
    assert first.cells[0].value == f"{100 * rate:.1f}\u00a0%"
    assert "Not drawn. The method, SFT on gold, has no stage “filter”." in shown


def test_an_unfinished_experiment(at_home: ExperimentSettings) -> None:
    settings = with_changes(at_home, {"experiment": "begun", "mine.samples": 2})
    note_settings(settings)
    experiment = open_experiment(settings)
    assert [a.stage for a in em.steps(experiment, 0)] == ["prompts", "evaluate"]
    for attempt in em.steps(experiment, 1):
        if attempt.stage == "mine":
            break
    shown = words(page([gather(settings)], {}))
    assert "Not drawn. Stage “evaluate” of iteration 1 is missing." in shown
    assert "score of iteration 1 is missing" in shown
    assert "The policy of iteration 0 on held-out prompts" in shown


def test_a_stale_stage_is_named(drawn: ExperimentSettings) -> None:
    note_settings(with_changes(drawn, {"cluster.max_principles": 2}))
    text = page([gather(recorded_settings("drawn"))], {})
    shown = words(text[: text.index("</header>")])
    assert "Not all of it is current: 3 stale" in shown
    assert "cluster of iteration 1 is stale: cluster.max_principles None → 2" in shown
    assert "train of iteration 1 is stale: cluster 1 is stale" in shown


def test_the_base_model_may_be_gone(at_home: ExperimentSettings) -> None:
    note_settings(with_changes(at_home, {"policy.model": "/nowhere/at/all"}))
    shown = words(page([gather(recorded_settings("lineage"))], {}))
    assert "evaluate of iteration 1 is not checked: setting 'policy.model'" in shown
    assert "Before and after" in shown and "No. 1" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "experiment nobody: nothing is recorded under this name"),
        (["lineage", "only-noted"], "experiment only-noted: no stage of it is finished"),
        (["lineage", "--out", "nowhere/at/all.html"], "there is no folder nowhere/at"),
        (["lineage", "--out", "."], "--out .: this is a folder"),
        (["lineage", "--out", "rows.jsonl/report.html"], "there is no folder rows.jsonl"),
    ],
)
def test_mistakes_are_messages(
    at_home: ExperimentSettings,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    note_settings(with_changes(at_home, {"experiment": "only-noted"}))
    shown = staple(capsys, "report", *arguments)
    assert shown.code == 2
    assert said in " ".join(shown.err.split())
