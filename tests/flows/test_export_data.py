"""`staple export --trajectories` and `--constitution`: other programs read what it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import small_loop
import yaml
from command import staple

from constitutions.constitution import load
from constitutions.untrusted import clean
from flows.commands.export_data import KINDS
from flows.experiment import open_experiment
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from tasks.rows import Labelled

trl = pytest.importorskip("trl", reason="TRL comes with the extra 'dev'")


def written(capsys: pytest.CaptureFixture[str], out: Path, kind: str, *more: str) -> Any:
    ran = staple(capsys, "export", "lineage", "--trajectories", kind, "--out", str(out), *more)
    assert ran.code == 0, ran.err
    rows: Any = datasets.load_dataset(
        "json", data_files=str(out), cache_dir=str(out.parent), split="train"
    )
    assert f"{len(rows):,} rows" in ran.out
    return rows


def trained_on(settings: ExperimentSettings) -> list[Labelled]:
    rows = open_experiment(settings).constitution(1).read("labelled", Labelled)
    assert len(rows) > 2
    return list(rows)


def user(row: Labelled) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in row.prompt]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_trajectory_is_a_row_with_its_principle(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = trained_on(at_home)
    sft = list(written(capsys, tmp_path / "sft.jsonl", "sft"))
    assert [r["messages"] for r in sft] == [[*user(row), said(row.refined)] for row in rows]
    dpo = list(written(capsys, tmp_path / "dpo.jsonl", "dpo"))
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in dpo] == [
        (user(row), [said(row.refined)], [said(row.initial)]) for row in rows
    ]
    for found in (sft, dpo):
        assert [r["principle"] for r in found] == [row.label for row in rows]
        assert [r["prompt_id"] for r in found] == [row.prompt_id for row in rows]
        assert [r["weight"] for r in found] == pytest.approx([row.weight for row in rows])
    kto = list(written(capsys, tmp_path / "kto.jsonl", "kto"))
    good = [r["completion"] for r in kto if r["label"]]
    bad = {r["prompt_id"]: r["completion"] for r in kto if not r["label"]}
    assert good == [[said(row.refined)] for row in rows]
    assert bad == {row.prompt_id: [said(row.initial)] for row in rows}
    assert len(kto) == len(good) + len(bad), "y1 once for each prompt"
    golds = {row.gold for row in rows}
    texts = "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))
    assert not any(gold in texts for gold in golds)


def test_llama_factory_gets_its_own_columns(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its converter wants the conversation as `messages`, and ranked answers as single messages."""
    row = trained_on(at_home)[0]
    dpo = written(capsys, tmp_path / "dpo.jsonl", "dpo", "--for", "llama-factory")[0]
    assert dpo["messages"] == user(row) and len(dpo["messages"]) % 2 == 1
    assert dpo["chosen"] == said(row.refined) and dpo["rejected"] == said(row.initial)
    kto = written(capsys, tmp_path / "kto.jsonl", "kto", "--for", "llama-factory")[0]
    assert kto["messages"] == [*user(row), said(row.refined)] and kto["label"] is True
    sft = written(capsys, tmp_path / "sft.jsonl", "sft", "--for", "llama-factory")[0]
    assert sft["messages"] == [*user(row), said(row.refined)]


def steps(trainer: Any, kind: Any, rows: datasets.Dataset, model: str, out: Path) -> list[float]:
    """The losses of a few steps of one of TRL's trainers."""
    how = kind(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    ran = trainer(model=model, args=how, train_dataset=rows)
    ran.train()
    return [line["loss"] for line in ran.state.log_history if "loss" in line]


def test_trls_trainers_train_on_it(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = at_home.policy.model
    sft = written(capsys, tmp_path / "sft.jsonl", "sft")
    losses = steps(trl.SFTTrainer, trl.SFTConfig, sft, model, tmp_path / "sft")
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] != losses[0]
    dpo = written(capsys, tmp_path / "dpo.jsonl", "dpo")
    losses = steps(trl.DPOTrainer, trl.DPOConfig, dpo, model, tmp_path / "dpo")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3), "the reference is the policy itself"
    assert len(losses) == 3 and losses[-1] != losses[0]


def test_the_constitution_for_other_programs(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = load(open_experiment(at_home).constitution(1).path("constitution.yaml")).texts
    found = {}
    for form in ("system-prompt", "markdown", "rubric", "make-judge"):
        out = tmp_path / form
        ran = staple(capsys, "export", "lineage", "--constitution", form, "--out", str(out))
        assert ran.code == 0, ran.err
        found[form] = out.read_bytes().decode()  # as it is written
    assert all(f"{n}. {text}" in found["system-prompt"] for n, text in enumerate(texts, start=1))
    assert found["markdown"].count("\n| ") == len(texts)

    rubric = yaml.safe_load(found["rubric"])
    judged = with_changes(
        at_home,
        {"evaluate.judge": {"kind": "absolute", "policy": {"model": "m"}, "rubric": rubric}},
    )
    shown = [clean(text) for text in texts]  # a random model writes control characters
    assert all(text in judged.evaluate.judge.chosen_rubric.criterion for text in shown)

    from mlflow.genai.judges import make_judge

    judge = make_judge(name="constitution", instructions=found["make-judge"], model="openai:/any")
    assert all(text in judge.instructions for text in shown)


def test_what_cannot_be_written_is_said(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "mine.jsonl"
    kept.write_text("kept")
    wrong = {
        ("--trajectories", "ppo"): ", ".join(KINDS),
        ("--trajectories", "sft", "--for", "me"): "trl, llama-factory",
        ("--trajectories", "sft", "--out", str(kept)): "such a file already",
        ("--trajectories", "sft", "--out", str(tmp_path / "a.csv")): "expected .jsonl",
        ("--trajectories", "sft", "--merge"): "one thing is written at a time",
        ("--constitution", "poem"): "system-prompt",
        ("--trajectories", "sft", "--iteration", "7"): "there is no iteration 7",
    }
    for options, told in wrong.items():
        ran = staple(capsys, "export", "lineage", *options)
        assert ran.code == 2 and told in ran.err, (options, ran.err)
    assert kept.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_a_method_without_trajectories(
    taught: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = staple(capsys, "export", "taught", "--trajectories", "sft")
    assert ran.code == 2 and "method sami keeps no trajectories" in ran.err
    out = tmp_path / "system.txt"
    ran = staple(capsys, "export", "taught", "--constitution", "system-prompt", "--out", str(out))
    assert ran.code == 0 and small_loop.PAIRS[1]["text"] in out.read_text()
