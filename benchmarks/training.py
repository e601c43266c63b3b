"""QLoRA training: our `train` beside TRL's `SFTTrainer` on the same trajectories.

A random Llama of 15M parameters in NF4 with LoRA of rank 16, one CPU thread, one epoch in batches
of 8 rows; rows of 60 to 600 tokens with loss on about half of them. Every training has a process
of its own, so that its peak memory is its own; seconds are processor time of the training alone,
without loading and tokenising. Equal losses, step by step, are part of the benchmark.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

from benchmarks.measure import Result
from benchmarks.random_model import random_llama, random_text
from models.training.adapter import AdapterSettings, plan_batches
from models.training.encoding import EncodedExample

ROWS = 64
ROUNDS = 3
SETTINGS = AdapterSettings(batch_size=8, schedule="constant", warmup=0, max_gradient_norm=1.0)
SEED = 0
LOSS_TOLERANCE = 1e-3
Contender = Mapping[str, Any]
"""What differs from the defaults: SFTConfig's options, or `dtype`, or `aligned`: our batches in our
order, our rows weighted so that a step's loss is the peer's, the peer's adapter in float32."""

OURS: dict[str, Contender] = {
    "ours": {},
    "ours_float32": {"dtype": "float32"},
    "ours_aligned": {"dtype": "float32", "aligned": True},
}
PEERS: dict[str, Contender] = {
    "peer": {},
    "peer_grouped_by_length": {"train_sampling_strategy": "group_by_length"},
    "peer_no_checkpointing": {"gradient_checkpointing": False},
    "peer_no_checkpointing_grouped": {
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "peer_packed_wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "peer_packed_wrapped_no_checkpointing": {
        "packing": True,
        "packing_strategy": "wrapped",
        "gradient_checkpointing": False,
    },
    "peer_packed_bfd": {"packing": True, "packing_strategy": "bfd"},
    "peer_float32": {"dtype": "float32", "bf16": False},
    "peer_aligned": {
        "dtype": "float32",
        "bf16": False,
        "aligned": True,
        "train_sampling_strategy": "sequential",
    },
}
Run = dict[str, Any]
"""seconds, tokens (context included), losses of the steps, peak_mb."""


def training_vs_sft_trainer() -> Result:
    """Tokens per second with the peer's defaults; each of its own options beside it.

    A processor without AVX-512 computes in bfloat16 a hundred times slower than in float32: there
    both compute in float32, and what would be in bfloat16 is left out.
    """
    import torch

    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    dtype, us, them = "bfloat16", "ours", "peer"
    if not wide:
        dtype, us, them = "float32", "ours_float32", "peer_float32"
    chosen = [n for n, how in (OURS | PEERS).items() if wide or how.get("dtype") == "float32"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _prepare(folder)
        runs = {name: [_run(name, folder)] for name in chosen}
        for _ in range(ROUNDS - 1):
            for name in (us, them):
                runs[name].append(_run(name, folder))
    speed = {name: median(r["tokens"] / r["seconds"] for r in done) for name, done in runs.items()}
    memory = {name: median(r["peak_mb"] for r in done) for name, done in runs.items()}
    options = {name: speed[name] for name in speed if name not in (us, them)}
    own = {k: v for k, v in options.items() if k.startswith("peer")}
    return Result(
        ratio=speed[us] / speed[them],
        ours=speed[us],
        peer=speed[them],
        unit="tokens/s",
        details={
            "dtype": dtype,
            "peak_mb": memory[us],
            "peer_peak_mb": memory[them],
            "ratio_to_best_own_option": speed[us] / max(own.values()),
            **{f"{name}_tokens_per_s": value for name, value in options.items()},
            **{f"{name}_peak_mb": memory[name] for name in options},
            "largest_loss_difference": _loss_difference(runs),
            "peer_package": "trl",
            "clock": "processor time, one thread",
        },
    )


def _loss_difference(runs: Mapping[str, list[Run]]) -> float:
    pairs = zip(runs["ours_aligned"][0]["losses"], runs["peer_aligned"][0]["losses"], strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    if largest > LOSS_TOLERANCE:
        raise AssertionError(f"the loss curves differ by {largest}")
    return largest


def _run(name: str, folder: Path) -> Run:
    command = [sys.executable, "-m", "benchmarks.training", name, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _prepare(folder: Path) -> None:
    """The model, and trajectories of mixed lengths (log-normal) as prompt and completion."""
    random_llama(folder / "model")
    draw = random.Random(SEED)
    rows: list[dict[str, str]] = []
    while len(rows) < ROWS:
        length = round(draw.lognormvariate(5.4, 0.6))
        if 60 <= length <= 600:
            trained = round(length * draw.uniform(0.35, 0.65))  # its end token among them
            prompt, completion = random_text(length - trained, draw), random_text(trained - 1, draw)
            rows.append({"prompt": prompt, "completion": f" {completion}"})
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")


# In the process of one contender -----------------------------------------------------------


def main() -> None:
    """Train as one contender does and print the `Run`."""
    import torch

    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    run = _ours(folder, **OURS[name]) if name in OURS else _peer(folder, **PEERS[name])
    run["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(run))


def _ours(folder: Path, dtype: str = "bfloat16", aligned: bool = False) -> Run:
    from models.training.loop import Likelihood, train
    from models.training.updates import new_adapter

    base, tokenizer = _base(folder, dtype)
    examples = _examples(_rows(folder), tokenizer)
    if aligned:
        examples = _weighted_as_means(examples)
    model = new_adapter(base, SETTINGS, seed=SEED)
    checkpoints = folder / "checkpoints"
    started = time.process_time()
    objective = Likelihood(SETTINGS.micro_batch_tokens)
    how: dict[str, Any] = {"seed": SEED, "checkpoints": checkpoints}
    curve = train(model, examples, SETTINGS, objective=objective, **how)
    seconds = time.process_time() - started
    return {"seconds": seconds, "tokens": curve[-1].tokens, "losses": [s.loss for s in curve]}


def _peer(folder: Path, dtype: str = "bfloat16", aligned: bool = False, **options: Any) -> Run:
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from models.training.updates import new_adapter

    base, tokenizer = _base(folder, dtype)
    rows = _rows(folder)
    lengths = [len(e.ids) for e in _examples(rows, tokenizer)]
    if aligned:
        rows = [rows[i] for step in plan_batches(lengths, SETTINGS, SEED) for i in step]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=SETTINGS.lora_rank,
        lora_alpha=SETTINGS.lora_alpha,
    )
    trainer = trl.SFTTrainer(  # type: ignore[attr-defined]
        new_adapter(base, SETTINGS, seed=SEED) if aligned else base,
        trl.SFTConfig(  # type: ignore[attr-defined]
            output_dir=str(folder / "peer"),
            per_device_train_batch_size=SETTINGS.batch_size,
            num_train_epochs=1,
            learning_rate=SETTINGS.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if aligned else lora,
    )
    for parameter in cast(Any, trainer.model).parameters():
        if aligned and parameter.requires_grad:
            parameter.data = parameter.data.float()
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "tokens": sum(lengths), "losses": losses}


def _base(folder: Path, dtype: Any) -> tuple[Any, Any]:
    from models.training.bases import load_base

    return load_base(folder / "model", quantization="nf4", dtype=dtype, device="cpu")


def _rows(folder: Path) -> list[dict[str, str]]:
    return list(json.loads((folder / "rows.json").read_text("utf-8")))


def _examples(rows: list[dict[str, str]], tokenizer: Any) -> list[EncodedExample]:
    """The tokens that the peer makes of the rows: an end token after each completion."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        trained = (False,) * len(prompt) + (True,) * len(completion)
        found.append(EncodedExample((*prompt, *completion), trained))
    return found


def _weighted_as_means(examples: list[EncodedExample]) -> list[EncodedExample]:
    """Weights with which a step's loss is the mean over its tokens, the peer's."""
    weighted = list(examples)
    for step in plan_batches([len(e.ids) for e in examples], SETTINGS, SEED):
        tokens = sum(sum(examples[i].trained) for i in step)
        for i in step:
            weighted[i] = EncodedExample(examples[i].ids, examples[i].trained, 1 / tokens)
    return weighted


if __name__ == "__main__":
    main()
