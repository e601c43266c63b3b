"""The whole loop, for real: Prefect flows, MLflow on SQLite, QLoRA on a CPU.

The planted world must be learned (one untuned seed here; five in `benchmarks/learning.py`), real
rows must pass through with every count in place.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from chat_model import build_chat_model
from command import staple

from constitutions.constitution import load
from flows.settings import load_settings
from flows.states import stage_states
from tasks.record.record import SUMMARY, Record
from tasks.rows import Labelled, Mined, Prompt, Rejected, Scores, Trajectory

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = [
    *("prompts.first=240", "prompts.later=240", "prompts.held_out=100"),
    *("iterations=2", "seed=4", "cluster.picture=svd"),  # UMAP compiles itself for 20 seconds
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    ran = staple(capsys, *arguments)
    assert ran.code == 0, ran.err
    return ran.out


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where `staple run planted` ended: shared by the tests below, which only add."""
    return tmp_path_factory.mktemp("planted")


def test_the_planted_world_is_learned(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(learned)
    shown = run(capsys, "run", "planted", *(w for s in SMALL for w in ("--set", s)))
    assert "staple constitution show planted" in shown

    record = Record("planted", learned / ".staple")
    evaluated = record.needs("evaluate", 2)
    assert evaluated.metrics["win_rate/refined_vs_0_low"] > 0.5
    assert evaluated.metrics["planted/recall"] >= 0.8
    assert evaluated.metrics["planted/precision"] >= 0.8
    assert evaluated.metrics["planted/nmi"] >= 0.9

    top = record.client.get_run(record.iteration_run(2))
    headline = "win_rate/refined_vs_initial_0"
    assert top.data.metrics[headline] == evaluated.metrics[headline]
    files = {f.path for f in record.client.list_artifacts(top.info.run_id)}
    assert {"constitution.yaml", "map.png", "adapter"} <= files
    summary = record.iteration_run(SUMMARY)
    curve = record.client.get_metric_history(summary, headline)
    assert sorted(point.step for point in curve) == [0, 1, 2]
    assert {f.path for f in record.client.list_artifacts(summary)} >= {"win_rate.png"}


def test_the_same_run_again_computes_nothing(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(learned)
    record = Record("planted", learned / ".staple")
    before = len(record.client.search_runs([record.experiment_id]))
    shown = run(capsys, "run", "planted", *(w for s in SMALL for w in ("--set", s)))
    assert "0 stages computed" in shown
    assert len(record.client.search_runs([record.experiment_id])) == before


def test_prefect_shows_the_experiment(learned: Path) -> None:
    """Runs say which stage and iteration they are; the result is on the experiment's own run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flows = {f.name: f for f in client.read_flow_runs()}
        tasks = client.read_task_runs()
        artifacts = {a.key: a for a in client.read_artifacts()}
    mine = [t for t in tasks if t.flow_run_id == flows["planted iteration 2"].id]
    stages = ("mine", "score", "filter", "cluster", "train", "evaluate")
    assert {f"{stage} 2" for stage in stages} <= {t.name for t in mine}
    assert next(set(t.tags) for t in mine if t.name == "mine 2") == {
        "planted",
        "iteration 2",
        "mine",
    }
    assert {"planted", "iteration 2"} <= set(flows["planted iteration 2"].tags)
    assert artifacts["planted-win-rates"].flow_run_id == flows["planted"].id
    rows = json.loads(str(artifacts["planted-win-rates"].data))
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert "[" in rows[2]["win rate"]
    assert {"planted-constitution", "planted-mine"} <= set(artifacts)


def test_what_one_asks_afterwards(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(learned)
    principles = load(
        Record("planted", learned / ".staple").needs("cluster", 2).path("constitution.yaml")
    )
    shown = run(capsys, "constitution", "show", "planted")
    assert principles.texts[0] in shown
    prompt = Record("planted", learned / ".staple").needs("prompts", 0).read("prompts", Prompt)[0]
    answered = run(capsys, "ask", "planted", prompt.prompt[0]["content"])
    for part in ("first answer", "principle", "refined answer", "Iteration 2"):
        assert part in answered
    assert "iteration 3" in staple(capsys, "ask", "planted", "hello", "--iteration", "3").err


def test_a_stage_by_itself_makes_its_successors_stale(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(learned)
    settings = load_settings("planted", SMALL)
    assert {s.standing for s in stage_states(settings).values()} == {"finished"}
    change = ("--set", "cluster.representative=none")
    run(capsys, "stage", "cluster", "--experiment", "planted", "--iteration", "2", *change)
    states = stage_states(settings)
    stale = {key for key, state in states.items() if state.standing == "stale"}
    assert stale == {("train", 2), ("evaluate", 2)}
    assert "cluster 2 has changed" in run(capsys, "status", "planted")


def test_an_iteration_that_is_not_there(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(learned)
    ran = staple(capsys, "stage", "mine", "--experiment", "planted", "--iteration", "4")
    assert ran.code == 2
    assert "there is no iteration 4" in ran.err
    assert "staple run planted --resume --set iterations=4" in ran.err


def test_real_rows_pass_through(
    workplace: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model cannot learn from them; nothing may break, and every count adds up."""
    files = (
        "hh_harmless_base_test.jsonl.gz",
        "ultrafeedback_eval_clean.jsonl",
        "tldr_first300.csv",
        "hotpotqa_train_100.json",
    )
    words = [(corpora / name).read_text("utf-8")[:300_000] for name in files[1:]]
    model = build_chat_model(workplace / "model", "qwen2", words, vocabulary=4000)
    experiment = {
        "experiment": "real",
        "iterations": 2,
        "policy": {"model": str(model), "dtype": "float32", "device": "cpu", "threads": 1},
        "prompts": {
            "sources": [
                {"path": str(corpora / name), "rows": 8, "on_bad_row": "reject"} for name in files
            ],
            "first": 12,
            "later": 8,
            "held_out": 8,
        },
        "mine": {
            "samples": 4,
            "max_response_tokens": 48,
            "max_principle_tokens": 8,
            "max_critique_tokens": 8,
        },
        "filter": {"keep_truncated": True, "selection": "soft"},
        "cluster": {"picture": "svd"},
        "evaluate": {"max_response_tokens": 24, "max_principle_tokens": 8},
    }
    Path("real.yaml").write_text(yaml.safe_dump(experiment))
    run(capsys, "run", "real.yaml")
    record = Record("real", workplace / ".staple")
    for iteration, prompts in ((1, 12), (2, 8)):
        check_counts(record, iteration, prompts)
    sources = {p.source.split(":")[0] for p in record.needs("prompts", 1).read("prompts", Prompt)}
    assert len(sources) == 4


def check_counts(record: Record, iteration: int, prompts: int) -> None:
    mined = record.needs("mine", iteration).read("mined", Mined)
    scored = record.needs("score", iteration).read("scored", Scores)
    kept = record.needs("filter", iteration).read("trajectories", Trajectory)
    rejected = record.needs("filter", iteration).read("rejected", Rejected)
    labelled = record.needs("cluster", iteration).read("labelled", Labelled)
    skipped = record.needs("train", iteration).read("skipped", Rejected)
    trained = record.needs("train", iteration).metrics["train/trained"]

    assert len(mined) == len(scored) == prompts
    assert {m.prompt_id for m in mined} == {s.prompt_id for s in scored}
    whole = {r.prompt_id for r in rejected if r.sample is None}
    assert {t.prompt_id for t in kept} | whole == {m.prompt_id for m in mined}
    fates = Counter((t.prompt_id, t.sample) for t in kept)
    fates.update((r.prompt_id, r.sample) for r in rejected if r.sample is not None)
    assert fates == Counter((m.prompt_id, c.sample) for m in mined for c in m.candidates)
    assert all(r.reason and r.source for r in [*rejected, *skipped])
    assert [(t.prompt_id, t.sample) for t in kept] == [(t.prompt_id, t.sample) for t in labelled]
    assert trained + len(skipped) == len(labelled)
