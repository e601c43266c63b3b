"""Estimated bytes and operations against what torch counts on a small model."""

from __future__ import annotations

import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import build_chat_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.efficiency import fit
from flows.plan.cost import (
    GIB,
    GPUS,
    MEASURED,
    MEMORY_SHARE,
    PASS_TOKENS,
    RESERVED,
    Efficiency,
    Gpu,
    Held,
)
from flows.plan.machine import MOST_ROWS, this_machine
from models.checkpoints.shapes import read_shape, shape_of
from models.engine import base as engine
from models.engine.local import load_policy
from models.policy import PolicySettings, Request
from models.training.adapter import AdapterSettings
from models.training.loop import weighted_loss
from models.training.updates import new_adapter

ROWS, LENGTH, TRAINED, RANK = 3, 50, 10, 8


def adapted(kind: str, *, checkpointing: bool, attention: str = "sdpa") -> tuple[Any, Held]:
    made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, build = made[kind]
    sizes = config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    base = build(sizes).to(torch.bfloat16)
    base.requires_grad_(False)
    model = new_adapter(base, AdapterSettings(lora_rank=RANK), seed=0)
    model.train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shape = read_shape(sizes.to_dict(), kind)
    held = Held(shape=shape, quantization="none", dtype="bfloat16", rank=RANK, gpu=GPUS["h100"])
    return model, held


def batch() -> dict[str, torch.Tensor]:
    trained = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    trained[:, -TRAINED:] = True
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 512
    return {"input_ids": ids, "trained": trained, "weight": torch.ones(ROWS)}


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(kind: str, checkpointing: bool) -> None:
    """All that the forward pass saves but the weights; one layer more with checkpointing."""
    model, held = adapted(kind, checkpointing=checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        by_token = tensor.dim() and tensor.shape[0] in (ROWS, ROWS * LENGTH)
        if by_token and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast():
        weighted_loss(model, batch())
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    estimated = activations(held, 3, checkpointing)
    if checkpointing:
        estimated -= activations(held, 3, False) - activations(held, 2, False)
    assert estimated == pytest.approx(real, rel=0.005)


def activations(held: Held, layers: int, checkpointing: bool) -> float:
    of = replace(held, shape=replace(held.shape, layers=layers))
    return of.training_memory(ROWS, LENGTH, TRAINED, checkpointing=checkpointing)["activations"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_training_are_what_torch_counts(kind: str, checkpointing: bool) -> None:
    model, held = adapted(kind, checkpointing=checkpointing, attention="eager")
    with FlopCounterMode(display=False) as counter:
        with autocast():
            loss = weighted_loss(model, batch())
        loss.backward()
    tokens, trained = ROWS * LENGTH, ROWS * TRAINED
    whole = held.training_operations(tokens, trained, LENGTH, checkpointing=checkpointing)
    products = held.training_operations(tokens, trained, 0, checkpointing=checkpointing)
    # Here attention computes the masked half as well, and has four products backward, not five.
    passes = 3 + checkpointing
    attention = (whole - products) * 2 * passes / (passes + 0.5)
    # Torch stops to compute a layer again before its very last product.
    last = checkpointing * tokens * 2 * RANK * 256 * 3
    assert counter.get_total_flops() == products + attention - last


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_training_all_weights_are_what_torch_counts(checkpointing: bool) -> None:
    adapter, held = adapted("llama", checkpointing=checkpointing, attention="eager")
    model = adapter.unload()
    model.requires_grad_(True)
    held = replace(held, rank=0)
    with FlopCounterMode(display=False) as counter:
        with autocast():
            loss = weighted_loss(model, batch())
        loss.backward()
    tokens, trained = ROWS * LENGTH, ROWS * TRAINED
    whole = held.training_operations(tokens, trained, LENGTH, checkpointing=checkpointing)
    products = held.training_operations(tokens, trained, 0, checkpointing=checkpointing)
    passes = 3 + checkpointing
    attention = (whole - products) * 2 * passes / (passes + 0.5)
    last = checkpointing * tokens * 2 * 896 * 256 * 3  # as above: of the matrix itself
    assert counter.get_total_flops() == products + attention - last


def test_operations_of_a_prompt_are_what_torch_counts() -> None:
    model, held = adapted("llama", checkpointing=False, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), autocast():
        model.get_base_model().model(input_ids=batch()["input_ids"], use_cache=False)
    products = held.prefill_operations(ROWS * LENGTH, 0)
    attention = 2 * (held.prefill_operations(ROWS * LENGTH, LENGTH) - products)
    assert counter.get_total_flops() == products + attention


@pytest.mark.parametrize("gpu", ["l4", "h100"])
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-14B-Instruct"])
def test_as_many_rows_as_fit(gpu: str, model: str) -> None:
    shape = shape_of(PolicySettings(model=model))
    held = Held(shape=shape, quantization="nf4", dtype="bfloat16", rank=16, gpu=GPUS[gpu])
    rows = held.rows_that_fit(2000)
    assert 0.8 * held.gpu.room < sum(held.sampling_memory(rows, 2000).values()) <= held.gpu.room
    whole = replace(held, quantization="none")
    assert whole.rows_that_fit(2000) < rows
    assert (whole.rows_that_fit(2000) == 0) == (gpu == "l4" and "14B" in model)


def test_rows_are_those_that_the_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = build_chat_model(tmp_path, "llama")
    settings = PolicySettings(
        model=str(directory), dtype="float32", device="cpu", quantization="none"
    )
    decoder = load_policy(settings, directory, None).decoder
    gpu = Gpu("small", RESERVED + 0.5, 1, 1, 1)
    held = Held(shape=shape_of(settings), quantization="none", dtype="float32", rank=0, gpu=gpu)
    monkeypatch.setattr(engine, "free_bytes", lambda _: int(GIB / 2 - held.weights))
    request = Request(messages="", key="k", n=300, max_tokens=5000)
    monkeypatch.setattr(decoder, "_serve", lambda *_: None)
    decoder._make(engine.WantedSamples([[1] * 601], [request], [range(300)], lambda _: None))
    assert decoder.fitted == held.rows_that_fit(5001 + 600 / 300) < 256


def test_what_is_known_of_the_engine_is_so() -> None:
    assert (PASS_TOKENS, MEMORY_SHARE) == (engine.PASS_TOKENS, engine.MEMORY_SHARE)
    assert {"cuda": GPUS["h100"].most_rows, "cpu": MOST_ROWS} == engine.MOST_ROWS


def test_a_processor_is_measured() -> None:
    found = this_machine(1)
    product = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(5):
        product @ product
    reached = 5 * 2 * 1024**3 / (time.perf_counter() - start) / 1e12
    assert 0.1 * reached < found.float32 < 20 * reached, "in TFLOP/s, within what load explains"
    assert 0.2 < found.bandwidth < 2000, "in GB/s"
    assert 1e-6 < found.efficiency.layer_seconds < 0.1
    assert found is this_machine(1), "once a process"


def test_what_a_step_costs() -> None:
    """Memory-bound: the bytes of a step, over the bandwidth that is reached, and launches."""
    shape = shape_of(PolicySettings(model="meta-llama/Llama-3.1-8B-Instruct"))
    plain = Held(shape=shape, quantization="none", dtype="bfloat16", rank=0, gpu=GPUS["h100"])
    moved = 2 * (shape.matrices + shape.output) + 500 * 131_072 + 32 * 128_256
    launches = 32 * plain.efficiency.layer_seconds
    assert plain.step_seconds(1, 500, 500) == pytest.approx(
        moved / 3.35e12 / plain.efficiency.decode + launches
    )
    unpacked = replace(plain, quantization="nf4")
    more = shape.matrices * (0.5625 + 2) / 3.35e12 / plain.efficiency.decode
    assert unpacked.step_seconds(1, 500, 500) - plain.step_seconds(1, 500, 500) == pytest.approx(
        more
    )
    assert plain.step_seconds(64, 500, 500) < 64 * plain.step_seconds(1, 500, 500) / 10
    shared = plain.step_seconds(64, 500, 500) - plain.step_seconds(64, 500, 100)
    assert shared == pytest.approx(64 * 400 * 131_072 / 3.35e12 / plain.efficiency.decode)
    bound = plain.step_seconds(2000, 1, 1) - launches  # by its operations
    assert bound == pytest.approx(
        2000 * (2 * (shape.matrices + shape.output) + 524_288) / 989e12 / plain.efficiency.decode
    )


def test_the_constants_are_found_again_in_what_a_gpu_took() -> None:
    true = Efficiency(decode=0.42, prefill=MEASURED.prefill, training=0.27, layer_seconds=6e-4)
    shape, gpu = shape_of(PolicySettings(model="meta-llama/Llama-3.1-8B-Instruct")), GPUS["h100"]
    parts = {"shape": shape, "dtype": "bfloat16", "gpu": replace(gpu, efficiency=true)}
    found: dict[str, dict[str, Any]] = {}
    for name, quantization, rows in (
        ("sampling_nf4", "nf4", 256),
        ("sampling", "none", 256),
        ("sampling_few_rows", "none", 64),
    ):
        held = Held(quantization=quantization, rank=0, **parts)  # type: ignore[arg-type]
        steps = 64 * 16 * 256 // rows
        seconds = steps * held.step_seconds(rows, 512 + 128, 32 + 128)
        seconds += held.prefill_seconds(64 * 512, 512)
        found[name] = {
            "length": 512,
            "new": 256,
            "prompts": 64,
            "steps": steps,
            "seconds": seconds,
        }
    learner = Held(quantization="nf4", rank=16, **parts)  # type: ignore[arg-type]
    step = learner.training_seconds(16 * 1024, 8 * 1024, rows=4, length=1024, checkpointing=True)
    found["training_nf4"] = {
        "tokens": 1024,
        "batch_size": 16,
        "micro_batch_tokens": 4096,
        "seconds_per_step": step,
        "gradient_checkpointing": True,
    }
    assert astuple(fit(found, shape, gpu)) == pytest.approx(astuple(true))
