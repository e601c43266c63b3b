"""The M-step's machinery on small random chat models: bases, adapters, the loss, training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import build_chat_model

from constitutions.errors import UserError
from models.training.adapter import AdapterSettings, plan_batches
from models.training.bases import base_digest, load_base
from models.training.encoding import EncodedExample
from models.training.loop import Likelihood, train, weighted_loss
from models.training.updates import attach_adapter, continue_adapter, new_adapter, save_adapter

SETTINGS = AdapterSettings(lora_rank=8, lora_alpha=16, learning_rate=1e-2, batch_size=4, warmup=0.1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def example(*ids: int, trained: int = 3, weight: float = 1.0) -> EncodedExample:
    """Token ids, the last `trained` of which are predicted."""
    return EncodedExample(ids, tuple(i >= len(ids) - trained for i in range(len(ids))), weight)


EXAMPLES = tuple(example(*range(s, s + 9 + s % 3)) for s in range(40, 104, 8))


def batch(*examples: EncodedExample) -> dict[str, torch.Tensor]:
    width = max(len(e.ids) for e in examples)
    pad = [width - len(e.ids) for e in examples]
    return {
        "input_ids": torch.tensor([[*e.ids, *[0] * n] for e, n in zip(examples, pad, strict=True)]),
        "trained": torch.tensor(
            [[*e.trained, *[False] * n] for e, n in zip(examples, pad, strict=True)]
        ),
        "weight": torch.tensor([e.weight for e in examples]),
    }


def base(directory: Path, quantization: Any = "none") -> Any:
    return load_base(directory, quantization=quantization, dtype="float32", device="cpu")[0]


def adapted(directory: Path, quantization: Any = "none", settings: Any = SETTINGS) -> Any:
    """A base with an adapter that is not the identity."""
    return perturbed(new_adapter(base(directory, quantization), settings, seed=0))


def perturbed(model: Any) -> Any:
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


def gradients(model: Any, *examples: EncodedExample) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    weighted_loss(model, batch(*examples)).backward()
    return {
        name: p.grad.flatten().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def least_cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return min(torch.cosine_similarity(a[n], b[n], dim=0).item() for n in a)


def loss(model: Any, *examples: EncodedExample) -> float:
    with torch.no_grad():
        return weighted_loss(model.eval(), batch(*examples)).item()


def fit(model: Any, examples: tuple[EncodedExample, ...], tmp_path: Path, **changes: Any) -> Any:
    settings = SETTINGS.model_copy(update=changes)
    objective = Likelihood(settings.micro_batch_tokens)
    checkpoints = tmp_path / "checkpoints"
    return train(model, examples, settings, objective=objective, seed=0, checkpoints=checkpoints)


# QLoRA on a CPU is real -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_sampling_does_not_change_the_gradients_of_an_nf4_base(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    model = adapted(request.getfixturevalue(architecture), "nf4")
    before = gradients(model, *EXAMPLES)
    with torch.no_grad():
        model.eval().generate(torch.arange(40, 60)[None], max_new_tokens=4, do_sample=True)
    after = gradients(model, *EXAMPLES)
    assert len(before) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    assert least_cosine(before, after) > 0.999


def test_nf4_gradients_are_those_of_the_dequantised_weights(llama: Path) -> None:
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.0})
    four_bit = adapted(llama, "nf4", settings)
    full = perturbed(new_adapter(base(llama, "nf4").dequantize(), settings, seed=0))
    assert four_bit.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert full.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert least_cosine(gradients(four_bit, *EXAMPLES), gradients(full, *EXAMPLES)) > 0.999


# The loss ---------------------------------------------------------------------------------


def test_the_loss_is_the_log_likelihood_of_the_trained_tokens_alone(qwen2: Path) -> None:
    model = adapted(qwen2)
    short, long = example(7, 8, 9, 10, trained=2), example(*range(20, 32), trained=5, weight=0.25)
    expected = 0.0
    for e in (short, long):
        with torch.no_grad():
            logp = model(torch.tensor([e.ids])).logits[0].log_softmax(-1)
        tokens = [i for i, t in enumerate(e.trained) if t]
        expected -= e.weight * sum(logp[i - 1, e.ids[i]].item() for i in tokens)
    assert loss(model, short, long) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_linear_in_the_weights(llama: Path) -> None:
    model = adapted(llama)
    a, b = EXAMPLES[0], EXAMPLES[1]
    heavy = gradients(model, replace(a, weight=0.3), replace(b, weight=2.0))
    one, other = gradients(model, a), gradients(model, b)
    for name, value in heavy.items():
        torch.testing.assert_close(value, 0.3 * one[name] + 2.0 * other[name])


def test_a_models_own_scaling_of_its_logits_counts() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, logits_scaling=8.0, pad_token_id=0,
    )  # fmt: skip
    model = GraniteForCausalLM(config)
    e = example(*range(40, 50), trained=4)
    with torch.no_grad():
        logp = model(torch.tensor([e.ids])).logits[0].log_softmax(-1)
    expected = -sum(logp[i - 1, e.ids[i]].item() for i in range(6, 10))
    assert loss(model, e) == pytest.approx(expected, rel=1e-5)


# Training ---------------------------------------------------------------------------------


def test_training_memorises_and_reports_its_curve(llama: Path, tmp_path: Path) -> None:
    model = new_adapter(base(llama, "nf4"), SETTINGS, seed=0)
    finished: list[int] = []
    before = loss(model, *EXAMPLES)
    curve = train(
        model, EXAMPLES, SETTINGS.model_copy(update={"epochs": 20}),
        objective=Likelihood(SETTINGS.micro_batch_tokens),
        seed=0, checkpoints=tmp_path / "c", progress=finished.append,
    )  # fmt: skip
    assert loss(model, *EXAMPLES) < 0.5 * before
    assert [s.step for s in curve] == list(range(1, 41)) and sum(finished) == 40
    assert curve[-1].tokens == 20 * sum(len(e.ids) for e in EXAMPLES)
    assert curve[-1].loss < 0.6 * curve[0].loss
    assert max(s.learning_rate for s in curve) == SETTINGS.learning_rate
    assert not (tmp_path / "c").exists()


def test_weights_decide_between_contradicting_answers(llama: Path, tmp_path: Path) -> None:
    wanted, unwanted = example(40, 41, 42, 50, 51, 52), example(40, 41, 42, 60, 61, 62)
    weighted = replace(wanted, weight=0.9), replace(unwanted, weight=0.1)
    model = new_adapter(base(llama), SETTINGS, seed=0)
    fit(model, weighted, tmp_path, epochs=30)
    assert loss(model, unwanted) - loss(model, wanted) > 1.0  # nats; the optimum is log 9


def test_micro_batches_and_checkpointing_change_memory_not_the_result(
    llama: Path, tmp_path: Path
) -> None:
    outcomes = []
    for changes in ({}, {"micro_batch_tokens": 16}, {"gradient_checkpointing": True}):
        model = new_adapter(base(llama), SETTINGS, seed=0)
        fit(model, EXAMPLES, tmp_path, epochs=2, **changes)
        outcomes.append(loss(model, *EXAMPLES))
    assert outcomes == pytest.approx([outcomes[0]] * 3, rel=1e-4)
    assert outcomes[0] != pytest.approx(loss(new_adapter(base(llama), SETTINGS, 0), *EXAMPLES))


def test_an_adapter_is_the_same_wherever_its_base_lies(llama: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / llama.name
    shutil.copytree(llama, moved)
    for name, place in (("here", llama), ("there", moved)):
        model = new_adapter(base(place), SETTINGS, seed=0)
        save_adapter(model, tmp_path / name, data_digest="d")
    here, there = tmp_path / "here", tmp_path / "there"
    names = sorted(p.name for p in here.iterdir())
    assert "adapter_model.safetensors" in names
    assert names == sorted(p.name for p in there.iterdir())
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    continued: Any = continue_adapter(base(moved), here)
    assert continued.active_peft_config.base_model_name_or_path == str(moved), "nobody asks a hub"


def test_a_diverged_training_is_an_error(llama: Path, tmp_path: Path) -> None:
    model = new_adapter(base(llama), SETTINGS, seed=0)
    broken = [replace(e, weight=float("nan")) for e in EXAMPLES]
    with pytest.raises(UserError, match="diverged"):
        fit(model, tuple(broken), tmp_path)


@pytest.mark.parametrize(("rows", "epochs", "size"), [(37, 3, 8), (5, 4, 8), (16, 1, 4)])
def test_every_row_is_planned_once_per_epoch(rows: int, epochs: int, size: int) -> None:
    settings = AdapterSettings(epochs=epochs, batch_size=size)
    lengths = [100 + (7 * i) % 50 for i in range(rows)]
    steps = plan_batches(lengths, settings, seed=3)
    assert sorted(i for step in steps for i in step) == sorted(list(range(rows)) * epochs)
    assert {len(step) for step in steps[:-1]} <= {size}
    assert steps == plan_batches(lengths, settings, seed=3)
    assert steps != plan_batches(lengths, settings, seed=4)


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [(37 * i) % 512 for i in range(512)]
    steps = plan_batches(lengths, AdapterSettings(batch_size=8), seed=0)
    spread = sum(max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps)
    assert spread / len(steps) < 100  # about 400 in random batches


# Adapters and their base ------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(adapted(llama, "nf4"), directory, data_digest="d")
    return directory


def test_an_adapter_is_continued_where_it_was(llama: Path, adapter: Path) -> None:
    saved, fresh = adapted(llama, "nf4"), new_adapter(base(llama, "nf4"), SETTINGS, seed=0)
    continued = continue_adapter(base(llama, "nf4"), adapter)
    assert loss(continued, *EXAMPLES) == pytest.approx(loss(saved, *EXAMPLES), rel=1e-6)
    assert loss(continued, *EXAMPLES) != pytest.approx(loss(fresh, *EXAMPLES), rel=1e-3)
    trainable = [p for p in continued.parameters() if p.requires_grad]
    assert len(trainable) == 28 and {p.dtype for p in trainable} == {torch.float32}


def test_a_merged_adapter_is_the_same_policy(llama: Path, adapter: Path) -> None:
    attached = attach_adapter(base(llama, "nf4"), adapter)
    merged = attach_adapter(base(llama, "nf4"), adapter, merge=True)
    assert loss(merged, *EXAMPLES) == pytest.approx(loss(attached, *EXAMPLES), rel=1e-5)


def test_an_adapter_is_refused_on_another_base(llama: Path, adapter: Path, tmp_path: Path) -> None:
    other = build_chat_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(UserError, match="another base model"):
        attach_adapter(base(other, "nf4"), adapter)
    with pytest.raises(UserError, match="another quantisation"):
        attach_adapter(base(llama, "none"), adapter)
    with pytest.raises(UserError, match="provenance"):
        attach_adapter(base(llama, "nf4"), tmp_path)


def test_the_digest_follows_the_content_not_the_place(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    assert base_digest(copy) == base_digest(llama)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert base_digest(copy) != base_digest(llama)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["model.safetensors"], "safetensors"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        (["chat_template.jinja"], "chat template"),
        (["config.json"], "config.json"),
    ],
)
def test_an_incomplete_model_directory_is_named(
    llama: Path, tmp_path: Path, remove: list[str], message: str
) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    for name in remove:
        (copy / name).unlink()
    with pytest.raises(UserError, match=message) as error:
        base(copy)
    assert str(copy) in str(error.value)


def test_a_missing_directory_and_an_unknown_architecture_are_named(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        base(tmp_path / "nowhere")
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    config = (copy / "config.json").read_text().replace('"llama"', '"hal9000"')
    (copy / "config.json").write_text(config)
    with pytest.raises(UserError, match="hal9000"):
        base(copy)
