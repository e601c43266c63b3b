"""`python -m benchmarks.efficiency [gpu.json]`: the constants of `flows/plan/cost.py`, from a run.

`benchmarks.gpu` measured how long steps of decoding and of training take; here is found which
`Efficiency` makes `flows.plan.cost` say the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import SAMPLES
from flows.plan.cost import GPUS, MEASURED, Efficiency, Gpu, Held
from models.checkpoints.shapes import Shape, shape_of
from models.policy import PolicySettings

SAMPLINGS = {"sampling_nf4": "nf4", "sampling": "none", "sampling_few_rows": "none"}
"""Measurements of `benchmarks.gpu`, and how they held the weights. Two batch sizes tell what a step
costs beside its bytes."""


def main() -> None:
    """Print the constants, ready to be put in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficiency", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).parent / "gpu.json")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    chosen = parser.parse_args()
    found = json.loads(chosen.file.read_text("utf-8"))
    shape = shape_of(PolicySettings(model="meta-llama/Llama-3.1-8B-Instruct"))
    print(fit(found, shape, GPUS[chosen.gpu]))


def fit(found: Mapping[str, Mapping[str, Any]], shape: Shape, gpu: Gpu) -> Efficiency:
    """The efficiencies of a run of `benchmarks.gpu` on a model of this shape.

    What prompts cost is too small a part of that run to tell: `prefill` stays as it is.
    """
    steps = [
        _step(found[name], _held(shape, gpu, quantization))
        for name, quantization in SAMPLINGS.items()
    ]
    slope, launches = _line(steps)
    decode = 1 / slope
    return Efficiency(
        decode=decode,
        prefill=MEASURED.prefill,
        training=_training(found["training_nf4"], _held(shape, gpu, "nf4", 16, decode)),
        layer_seconds=launches / shape.layers,
    )


def _held(shape: Shape, gpu: Gpu, quantization: str, rank: int = 0, decode: float = 1.0) -> Held:
    ideal = Efficiency(decode=decode, prefill=MEASURED.prefill, training=1.0, layer_seconds=0.0)
    return Held(
        shape=shape,
        quantization=quantization,
        dtype="bfloat16",
        rank=rank,
        gpu=replace(gpu, efficiency=ideal),
    )


def _step(entry: Mapping[str, Any], held: Held) -> tuple[float, float]:
    """The least seconds that a step could take, and those that it took."""
    length, new, prompts = entry["length"], entry["new"], entry["prompts"]
    rows = prompts * SAMPLES * new / entry["steps"]
    least = held.step_seconds(rows, length + new / 2, length / SAMPLES + new / 2)
    prefill = held.prefill_seconds(prompts * length, length)
    return least, (entry["seconds"] - prefill) / entry["steps"]


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept, of which neither is negative."""
    x, y = np.array(points).T
    if len(points) > 1:
        slope, intercept = np.polyfit(x, y, 1)
        if slope > 0 and intercept > 0:
            return float(slope), float(intercept)
    return float(x @ y / (x @ x)), 0.0


def _training(entry: Mapping[str, Any], held: Held) -> float:
    """The share of the FLOP/s that is reached, beside the unpacking of weights."""
    tokens = entry["tokens"]
    rows = max(1, entry["micro_batch_tokens"] // tokens)
    whole, trained = float(entry["batch_size"] * tokens), entry["batch_size"] * tokens / 2
    checkpointing = bool(entry["gradient_checkpointing"])
    operations = held.training_operations(whole, trained, tokens, checkpointing=checkpointing)
    computing = operations / held.gpu.rate(held.dtype)
    least = held.training_seconds(
        whole, trained, rows=rows, length=tokens, checkpointing=checkpointing
    )
    return computing / (entry["seconds_per_step"] - (least - computing))


if __name__ == "__main__":
    main()
