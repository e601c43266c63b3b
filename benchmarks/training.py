"""QLoRA training: our `train` beside TRL's `SFTTrainer` on the same trajectories.

A random Llama of 15M parameters, NF4 and LoRA of rank 16, one CPU thread; rows of 60 to 600 tokens
with loss on about half of them. Every training has a process of its own, so that its peak memory is
its own; seconds are those of the training alone, without loading and tokenising.

    python -m benchmarks.training NAME FOLDER     # one of `CONTENDERS`, in a folder made before
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Result
from benchmarks.random_model import random_llama, random_text

ROWS = 64
BATCH = 8
ROUNDS = 3
LEARNING_RATE = 2e-4
OURS = {"ours": {}, "ours, float32": {"dtype": "float32"}}
PEERS: Mapping[str, Mapping[str, Any]] = {
    "peer": {},
    "peer, float32": {"bf16": False},
    "peer, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "peer, no checkpointing": {"gradient_checkpointing": False},
    "peer, no checkpointing, float32": {"gradient_checkpointing": False, "bf16": False},
    "peer, no checkpointing, grouped": {
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "peer, packed (bfd)": {"packing": True, "packing_strategy": "bfd"},
    "peer, packed (wrapped)": {"packing": True, "packing_strategy": "wrapped"},
    "peer, no checkpointing, wrapped": {
        "gradient_checkpointing": False,
        "packing": True,
        "packing_strategy": "wrapped",
    },
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    import torch

    torch.set_num_threads(1)
    done = ours(folder, **OURS[name]) if name in OURS else peer(folder, **PEERS[name])
    done["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(done))


def prepare(folder):
    random_llama(folder / "model")
    draw = random.Random(0)
    rows = []
    while len(rows) < ROWS:
        length = round(draw.lognormvariate(5.4, 0.6))
        if 60 <= length <= 600:
            completion = round(length * draw.uniform(0.35, 0.65))
            rows.append(
                {
                    "prompt": random_text(length - completion, draw),
                    "completion": " " + random_text(completion - 1, draw),
                }
            )
    (folder / "rows.json").write_text(json.dumps(rows))


def ours(folder, dtype="bfloat16", **changes):
    from models.adapter import AdapterSettings
    from models.encoding import Example
    from models.qlora import load_base, new_adapter
    from models.training import train

    base, tokenizer = load_base(folder / "model", quantization="nf4", dtype=dtype, device="cpu")
    rows = json.loads((folder / "rows.json").read_text())
    examples = []
    for row in rows:
        p = tokenizer(row["prompt"])["input_ids"]
        c = tokenizer(row["completion"])["input_ids"] + [1]
        examples.append(Example(tuple(p + c), (False,) * len(p) + (True,) * len(c)))
    settings = AdapterSettings(
        batch_size=BATCH, learning_rate=LEARNING_RATE, schedule="constant", warmup=0, **changes
    )
    model = new_adapter(base, settings, seed=0)
    with tempfile.TemporaryDirectory() as checkpoints:
        started = time.process_time()
        curve = train(model, examples, settings, seed=0, checkpoints=Path(checkpoints) / "c")
        seconds = time.process_time() - started
    return {"seconds": seconds, "tokens": curve[-1].tokens, "losses": [s.loss for s in curve]}


def peer(folder, **changes):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    from models.qlora import load_base

    dtype = changes.pop("dtype", "bfloat16" if changes.get("bf16", True) else "float32")
    base, tokenizer = load_base(folder / "model", quantization="nf4", dtype=dtype, device="cpu")
    rows = json.loads((folder / "rows.json").read_text())
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            base,
            SFTConfig(
                output_dir=out,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                logging_steps=1,
                save_strategy="no",
                **changes,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32
            ),
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    ds = trainer.train_dataset
    tokens = sum(len(r) for r in ds["input_ids"])
    return {"seconds": seconds, "tokens": tokens, "losses": losses, "columns": ds.column_names}


if __name__ == "__main__":
    main()
