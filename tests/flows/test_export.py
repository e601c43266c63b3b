"""`staple export`: what it writes is loaded without this project, and is the policy it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import staple
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from constitutions.constitution import load
from flows.commands.export import export_policy
from flows.experiment import open_experiment
from flows.schema import ExperimentSettings
from models.training.bases import keep_unpacked, load_base
from models.training.updates import attach_adapter
from tasks.rows import Prompt


def held_out(settings: ExperimentSettings, tokenizer: Any) -> list[torch.Tensor]:
    rows = open_experiment(settings).needs("prompts", 0).read("prompts", Prompt)
    texts = [
        tokenizer.apply_chat_template(list(r.prompt), add_generation_prompt=True, tokenize=False)
        for r in rows
    ]
    return [
        torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"][:128]]) for t in texts[:8]
    ]


def logits(model: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(p).logits[0].float() for p in prompts])


def evaluated(settings: ExperimentSettings) -> tuple[torch.Tensor, list[torch.Tensor]]:
    source = open_experiment(settings).policy(1)
    base, tokenizer = load_base(source.model, quantization="nf4", dtype="float32", device="cpu")
    prompts = held_out(settings, tokenizer)
    assert source.adapter_path is not None
    return logits(attach_adapter(base, source.adapter_path), prompts), prompts


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_an_adapter_loads_with_plain_peft_and_is_the_evaluated_policy(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    ran = staple(capsys, "export", "lineage", "--iteration", "1", "--out", str(out))
    assert ran.code == 0 and "same top token" in ran.out

    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == at_home.policy.model
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        at_home.policy.model, quantization_config=nf4, dtype=torch.float32
    )
    keep_unpacked(base)  # 4-bit weights in bfloat16 are another model: up to .6 apart here
    wanted, prompts = evaluated(at_home)
    untrained = logits(base, prompts)
    found = logits(PeftModel.from_pretrained(base, str(out)), prompts)
    exact, unquantised = json.loads((out / "agreement.json").read_text())
    assert (found - wanted).abs().max() < 1e-4 > exact["largest"]
    assert exact["same_top"] == 1.0 and exact["tokens"] == len(wanted)
    assert (untrained - wanted).abs().max() > 1e-3, "the adapter does something"
    full = AutoModelForCausalLM.from_pretrained(at_home.policy.model, dtype=torch.float32)
    apart = (logits(PeftModel.from_pretrained(full, str(out)), prompts) - wanted).abs().max()
    assert unquantised["largest"] == pytest.approx(apart.item(), rel=1e-3) and apart > 1e-2


def test_a_merged_model_loads_with_plain_transformers_and_the_card_says_what_changed(
    at_home: ExperimentSettings, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = export_policy("lineage", merge=True, out=out)
    wanted, prompts = evaluated(at_home)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and not (out / "adapter_config.json").exists()
    assert getattr(model.config, "quantization_config", None) is None
    found = logits(model, prompts)
    (agreement,) = done.agreements
    assert agreement.largest == pytest.approx((found - wanted).abs().max().item(), rel=1e-3)
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    assert agreement.same_top == pytest.approx(same) and same > 0.8
    assert 0 < agreement.kl < 0.01 and agreement.largest > 1e-3
    assert AutoTokenizer.from_pretrained(out).chat_template

    card = (out / "README.md").read_text()
    assert front_matter(card)["base_model"] == at_home.policy.model
    assert f"{agreement.largest:.2g}" in card and "licence" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_the_card_tells_the_principles_the_figures_and_the_training(
    at_home: ExperimentSettings, tmp_path: Path
) -> None:
    card = (export_policy("lineage", out=tmp_path / "out").path / "README.md").read_text()
    constitution = load(open_experiment(at_home).constitution(1).path("constitution.yaml"))
    assert front_matter(card)["library_name"] == "peft"
    assert all(f"| {p.support:,} |" in card for p in constitution.principles)
    assert "refined_vs_0" in card and "lora_rank: 16" in card and "nf4" in card


def test_nothing_is_overwritten(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    ran = staple(capsys, "export", "lineage", "--out", str(tmp_path))
    assert ran.code == 2 and "is not empty" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert staple(capsys, "export", "../lineage").code == 2
