"""SAMI through the whole flow: real posts, the reference's constitutions, a random chat model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_loop
import yaml
from brief_judge import judging, size
from chat_model import build_chat_model
from command import staple
from openai_server import BASE

from constitutions.constitution import load
from constitutions.errors import UserErrors
from constitutions.reference import load_pairs
from flows import deployments
from flows.experiment import note_settings, open_experiment, record_of, recorded_settings
from flows.schema import ExperimentSettings
from flows.settings import following, load_settings, with_changes
from flows.stages import run_stage
from flows.states import stage_states, unchanged
from models.training.bases import load_base
from models.training.updates import attach_adapter
from tasks.judging.winrate import win_rate
from tasks.rows import Comparison, Mined, Response, Sampled

ENGINE = {"dtype": "float32", "device": "cpu", "threads": 1}
SETTINGS: dict[str, Any] = {
    "experiment": "tldr",
    "method": "sami",
    "iterations": 1,
    "prompts": {"first": 6, "later": 4, "held_out": 4},
    "sample": {"constitutions": 2, "principles": 2, "max_response_tokens": 12},
    "train": {"learning_rate": 1e-2, "batch_size": 2, "kl": 0.1},
    "evaluate": {"max_response_tokens": 12, "resamples": 200, "temperature": 1.0},
}


NAMES = ("concise", "comprehensive")
"""The reference's identifiers."""


@pytest.fixture(scope="module")
def tldr(
    tmp_path_factory: pytest.TempPathFactory,
    migrated_database: Path,
    corpora: Path,
    sami_reference: Path,
) -> Iterator[Path]:
    """A folder with the finished experiment, judged by a server that prefers short responses."""
    folder = tmp_path_factory.mktemp("tldr")
    shutil.copy(migrated_database, folder / "mlflow.db")
    build_chat_model(folder / "model", "llama3")
    with judging() as judge:
        policy = {"model": "small/judge", "served_model": BASE}
        settings = {
            **SETTINGS,
            "policy": {**ENGINE, "model": str(folder / "model")},
            "prompts": {
                **SETTINGS["prompts"],
                "sources": [{"path": str(corpora / "tldr_first300.csv"), "format": "tldr"}],
            },
            "write": {"constitution": str(sami_reference / "constitutions_opus")},
            "evaluate": {
                **SETTINGS["evaluate"],
                "judge": {"kind": "pairwise", "endpoint": judge.address, "policy": policy},
            },
        }
        (folder / "tldr.yaml").write_text(yaml.safe_dump(settings))
        yield folder


@pytest.fixture
def finished(tldr: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExperimentSettings]:
    monkeypatch.chdir(tldr)
    monkeypatch.setenv("STAPLE_HOME", str(tldr / ".staple"))
    settings = load_settings("tldr.yaml")
    note_settings(settings)
    small_loop.run(settings)
    yield settings
    note_settings(settings)


def test_real_posts_and_the_references_constitutions(
    finished: ExperimentSettings, sami_reference: Path
) -> None:
    record = record_of("tldr")
    pairs = load_pairs(sami_reference / "constitutions_opus")
    texts = {
        f"{side} {p.id}": text
        for p in pairs.principles
        for side, text in (("pos", p.text), ("neg", p.antithesis))
    }
    assert set(texts) == {f"{side} {name}" for side in ("pos", "neg") for name in NAMES}
    assert load(record.needs("write", 0).path("constitution.yaml")).texts == pairs.texts

    rows = record.needs("sample", 1).read("sampled", Sampled)
    assert len(rows) == 6 and all("SUBREDDIT" in row.prompt[0]["content"] for row in rows)
    for row in rows:
        assert len({frozenset(drawn.identifiers) for drawn in row.draws}) == 2
        for drawn in row.draws:
            assert [texts[id] for id in drawn.identifiers] == list(drawn.principles)
    assert len({drawn.response for row in rows for drawn in row.draws}) > 6

    trained = record.needs("train", 1)
    assert trained.metrics["train/trained"] + trained.metrics["train/skipped"] == 6
    base, _ = load_base(finished.policy.model, quantization="nf4", dtype="float32", device="cpu")
    attach_adapter(base, trained.path("adapter"))


def test_the_judge_reads_the_constitution_and_lengths_are_told(
    finished: ExperimentSettings,
) -> None:
    evaluated = record_of("tldr").needs("evaluate", 1)
    rows = evaluated.read("comparisons", Comparison)
    ours = {(r.prompt_id, r.arm): r for r in evaluated.read("responses", Response)}
    assert {arm for _, arm in ours} == {"principles", "antitheses", "plain"}
    for arm in ("principles", "antitheses"):
        met = [row for row in rows if row.answer == arm and row.against == 0]
        assert len(met) == 4 and {row.judge for row in met} == {"pairwise:principle:judge"}
        sizes = [(size(row.ours), size(row.theirs)) for row in met]
        outcomes = [float(a < b) + (a == b) / 2 for a, b in sizes]
        assert [row.outcome for row in met] == outcomes
        rate = win_rate(outcomes, seed=0, resamples=200)
        assert evaluated.metrics[f"win_rate/{arm}_vs_0"] == pytest.approx(rate.rate)
    metrics = evaluated.metrics
    for name in ("constitution_vs_0", "plain_vs_0", "constitution_vs_0_length_controlled"):
        assert 0 <= metrics[f"win_rate/{name}_low"] <= metrics[f"win_rate/{name}"] <= 1
    before = record_of("tldr").needs("evaluate", 0).metrics
    for arm in ("principles", "antitheses", "plain"):
        assert before[f"answers/{arm}_characters"] > 0 < metrics[f"answers/{arm}_characters"]
    for found in (before, metrics):
        assert found["mi/per_token"] <= 0.6932 and found["mi/failed"] == 0


def test_every_stage_runs_by_itself(finished: ExperimentSettings) -> None:
    assert small_loop.run(finished) == set(), "nothing is left to do"
    assert run_stage("tldr", "sample", 1, {"sample.temperature": 0.5}).reused is False
    states = {place: state.standing for place, state in stage_states(finished).items()}
    assert states["sample", 1] == "finished" and states["train", 1] == "stale"
    assert states["evaluate", 1] == "stale" and states["evaluate", 0] == "finished"
    run_stage("tldr", "train", 1, {"train.kl": 0.0})
    run_stage("tldr", "evaluate", 1)
    assert {s.standing for s in stage_states(finished).values()} == {"finished"}
    assert run_stage("tldr", "write", 0, force=True).metrics["write/principles"] == 2


def test_settings_that_cannot_hold_are_told_at_once(finished: ExperimentSettings) -> None:
    wrong = [
        "train.lora_dropout=0.1",
        "evaluate.benchmarks.ifeval.prompts=x.jsonl",
        "then.iterations=2",
        "review.enabled=true",
    ]
    with pytest.raises(UserErrors) as told:
        load_settings("tldr.yaml", wrong)
    for said in ("lora_dropout", "benchmarks", "'then'", "review.enabled"):
        assert said in str(told.value)
    with pytest.raises(UserErrors, match="does not continue another experiment"):
        load_settings("planted", ["after=tldr"])
    with pytest.raises(UserErrors, match=r"setting 'sample'.*5 constitutions need more"):
        load_settings("planted-sami", ["sample.constitutions=5", "sample.principles=2"])


def test_prompts_without_golds_are_enough(
    finished: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {n}?"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"prompts.sources=[{{path: {tmp_path}/rows.jsonl, gold_column: ''}}]"
    ran = staple(capsys, "validate", "tldr.yaml", "--set", source)
    assert ran.code == 0, ran.err
    assert "2 principles" in ran.out
    ran = staple(capsys, "validate", "tldr.yaml", "--set", source, "--set", "method=staple")
    assert ran.code == 2 and "needs gold responses" in ran.err
    many = ["--set", "sample.principles=3", "--set", "sample.constitutions=8"]
    ran = staple(capsys, "validate", "tldr.yaml", *many)
    assert ran.code == 2 and "have an antithesis" in ran.err


# One experiment goes on as another ------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(planted_writer: Path) -> Path:
    return next(planted_writer.glob("planted-*"))


@pytest.mark.usefixtures("prefect_server")
def test_staple_then_sami_ends_with_one_report(
    tmp_path: Path,
    migrated_database: Path,
    writer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Discovered by a random chat model, reviewed, opposed by a small planted writer, amplified."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / ".staple"))
    small_loop.make(tmp_path, migrated_database)
    values = yaml.safe_load((tmp_path / "lineage.yaml").read_text())
    values["review"] = {"enabled": True, "which": "last"}
    values["then"] = {
        "prompts": {"first": 4},  # 14 rows: 4 held out, 6 mined before
        "write": {
            "topics": ["time"],
            "writer": {**ENGINE, "model": str(writer), "templates": "terse"},
            "attempts": 20,
        },
        "sample": {"constitutions": 2, "principles": 1, "max_response_tokens": 8},
        "evaluate": {"judge": "similarity"},
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(values))

    ran = staple(capsys, "run", "both.yaml")
    assert ran.code == 0, ran.err
    assert "awaits your review" in ran.out and not record_of("lineage.sami").exists()
    shown = record_of("lineage").needs("cluster", 1).path("constitution.yaml")
    approve = ("constitution", "edit", "lineage", "--iteration", "1", "--file", str(shown))
    assert staple(capsys, *approve).code == 0
    ran = staple(capsys, "run", "lineage", "--resume")
    assert ran.code == 0, ran.err
    page = (tmp_path / "report-lineage-lineage.sami.html").read_text("utf-8")
    assert "report-lineage-lineage.sami.html" in ran.out
    assert "STaPLe, constrained" in page and "SAMI" in page

    then = following(load_settings("both.yaml"))
    assert then is not None and then.after == "lineage" and unchanged(then)
    opened = open_experiment(then)
    discovered = load(record_of("lineage").needs("review", 1).path("constitution.yaml"))
    pairs = load(opened.constitution(1).path("constitution.yaml"))
    assert set(pairs.texts) <= set(discovered.texts) and all(p.antithesis for p in pairs.principles)
    assert opened.policy(0).adapter is None, "the yardstick is the initial policy"
    begun = opened.policy(0, 1).adapter
    assert begun is not None and begun.record.experiment == "lineage"
    sampled = opened.record.needs("sample", 1)
    assert sampled.inputs["adapter"].digest == begun.digest
    mined = {row.prompt_id for row in record_of("lineage").needs("mine", 1).read("mined", Mined)}
    queries = {row.prompt_id for row in sampled.read("sampled", Sampled)}
    assert len(queries) == 4 and not queries & mined, "fresh ones"

    assert deployments.experiment("lineage", return_state=True).name == "Unchanged"
    changed = with_changes(recorded_settings("lineage"), {"then.train.kl": 0.3})
    note_settings(changed)
    assert deployments.experiment("lineage", return_state=True).name == "Completed"
    assert opened.record.needs("train", 1).provenance().settings["kl"] == 0.3


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({"experiment": "x"}, "it sets experiment"),
        ({"policy": {"model": "planted"}}, "has another model"),
        ({"seed": 3}, "has another seed"),
        ({"train": {"lora_rank": 64}}, "has another train.lora_rank"),
        ({"train": {"update": "full"}}, "all weights cannot be trained in nf4"),
        ({"train": {"epoch": 3}}, "did you mean 'epochs'"),
    ],
)
def test_what_cannot_follow_is_told_before_anything_runs(then: Any, said: str) -> None:
    with pytest.raises(UserErrors) as told:
        load_settings("staple-then-sami", [f"then={json.dumps(then)}"])
    assert said in str(told.value) and "'then'" in str(told.value)


def test_after_nothing_nothing_follows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "validate", "planted-sami", "--set", "after=nobody")
    assert ran.code == 2 and "nobody" in ran.err and "nothing is recorded" in ran.err
    ran = staple(capsys, "validate", "planted-sami", "--set", "write.constitution=summaries")
    assert ran.code == 2 and "none of these principles is about the planted world" in ran.err
    few = ["--set", "write.constitution=null", "--set", "write.principles=3"]
    ran = staple(capsys, "validate", "planted-sami", *few, "--set", "write.held_out=0.6")
    assert ran.code == 2 and "have an antithesis" in ran.err
