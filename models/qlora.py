"""The M-step: a LoRA adapter on an NF4 or unquantised base, with loss on chosen turns only.

`tasks/train.py` trains with it; `models/local.py` loads the same base and adapter to sample.
The base never changes: an adapter records which one it was trained on and refuses another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.nn import functional

from constitutions.errors import UserError
from models.adapter import AdapterSettings, Step, chunks, plan_batches
from models.encoding import Example
from models.policy import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "none"]
PROVENANCE = "provenance.json"
CHECKPOINT_STEPS = 50

# bitsandbytes offers an optional kernel at import, peft reads a renamed attribute: neither is ours.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


# The base ----------------------------------------------------------------------------------


def load_base(
    model: str | Path,
    *,
    quantization: Quantization,
    dtype: Literal["float32", "bfloat16"],
    device: Literal["auto", "cpu", "cuda"] = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from safetensors, frozen.

    Args:
        model: a `transformers` directory, or a hub name that is fetched once.
        quantization: "nf4" holds the linear layers (not the output layer) in 4 bits.
        dtype: of the other weights, and of the computation.
        device: "auto" takes the GPUs when there are any.
        revision: commit of a hub model.

    Raises:
        UserError: directory, weights, tokenizer or chat template missing, or an architecture
            that this version of transformers does not have without running foreign code.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # each stage loads the base; ours are the bars that tell something

    directory = find_base(model, revision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = getattr(torch, dtype)
    nf4 = cast(Any, BitsAndBytesConfig)(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=nf4 if quantization == "nf4" else None,
            dtype=compute,
            device_map="auto" if device == "cuda" else {"": "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model cannot be loaded: {_first_line(error)}",
            where=str(model),
            expected="a causal language model of an architecture that transformers knows",
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template",
            where=str(model),
            expected="a chat model (chat_template.jinja or a template in tokenizer_config.json)",
            fix="take the model's instruction-tuned version",
        )
    base.requires_grad_(False)
    _keep_unpacked(base)
    name = directory.resolve().name if Path(model).expanduser().is_dir() else str(model)
    cast(Any, base).identity = Identity(name, base_digest(directory), quantization)
    return base, tokenizer


def find_base(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model; a hub name is fetched (safetensors only) when not cached.

    Raises:
        UserError: no such directory or hub model, or one without configuration, safetensors
            weights or tokenizer.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = _fetch(str(model), revision)
    wanted = {
        "config.json": "a model configuration",
        "*.safetensors": "safetensors weights (pickled weights are not loaded)",
        "tokenizer*": "a tokenizer",
    }
    for pattern, meaning in wanted.items():
        if not any(directory.glob(pattern)):
            raise UserError(
                f"no {pattern} in the model directory", where=str(model), expected=meaning
            )
    return directory


def base_digest(directory: Path) -> str:
    """sha256 (hex) that tells bases apart: configuration, tokenizer and a sample of the weights.

    Of weight files above 64 MiB it reads the head and 256 blocks of 64 KiB, evenly spread: any
    training changes all of them. It identifies a base; it does not authenticate one.
    """
    digest = hashlib.sha256()
    files = [directory / "config.json", directory / "tokenizer.json"]
    for file in (*files, *sorted(directory.glob("*.safetensors"))):
        if file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            for block in _sampled_blocks(file):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Identity:
    """Which base a model in memory is."""

    base: str
    """Hub name, or the directory's own name: where it lies on this machine is no part of it."""
    base_digest: str
    quantization: str


def _fetch(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(
            "no such model directory", where=name, expected="a directory or a hub name (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"the model is neither a directory nor available from the hub: {_first_line(error)}",
            where=name,
            fix="check the name, the revision and the network, or give a local directory",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    size, block = file.stat().st_size, 1 << 16
    with file.open("rb") as stream:
        if size <= 1 << 26:
            yield stream.read()
            return
        for position in range(0, size, size // 256):
            stream.seek(position)
            yield stream.read(block)


def _keep_unpacked(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU.

    With AVX512-BF16 it does so for good, and the packed kernel has no backward pass: training
    after sampling then loses gradients without an error (bitsandbytes 0.50).
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


# The adapter -------------------------------------------------------------------------------


def new_adapter(base: PreTrainedModel, settings: AdapterSettings, seed: int) -> PeftModel:
    """A fresh trainable LoRA adapter on every linear layer but the output layer, in float32.

    It starts as the identity: the policy with it equals the policy without.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cast("PeftModel", get_peft_model(base, config))
    return _in_float32(model)


def continue_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The adapter of the previous iteration on `base` (from `load_base`), to be trained further.

    Raises:
        UserError: no adapter there, or one of another base or quantisation.
    """
    from peft import PeftModel

    _check_provenance(adapter, _identity(base))
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    # where the base lies here: peft reads its configuration for checkpoints, or asks the hub
    model.active_peft_config.base_model_name_or_path = base.name_or_path
    return _in_float32(model)


def attach_adapter(base: PreTrainedModel, adapter: Path, *, merge: bool = False) -> PreTrainedModel:
    """The policy of an adapter, for sampling: `base` (from `load_base`) with its update.

    Args:
        merge: add the update to the weights. An NF4 base is dequantised first, since a merged
            weight that is rounded to NF4 again would be another one.

    Raises:
        UserError: no adapter there, or one of another base or quantisation.
    """
    from peft import PeftModel

    _check_provenance(adapter, _identity(base))
    if merge and _identity(base).quantization == "nf4":
        base = cast(Any, base).dequantize()
    model = cast(Any, PeftModel.from_pretrained(base, str(adapter)))
    return cast("PreTrainedModel", model.merge_and_unload() if merge else model)


def save_adapter(model: PeftModel, directory: Path, *, data_digest: str) -> None:
    """Write the adapter (PEFT safetensors) and its provenance; all of it or nothing.

    Args:
        directory: is replaced when it exists.
        data_digest: of what it was trained on.
    """
    identity = _identity(model.get_base_model())
    config = model.active_peft_config
    config.base_model_name_or_path = identity.base
    config.target_modules = sorted(config.target_modules or ())  # a set has no order of its own
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished), save_embedding_layers=False)
    (unfinished / "README.md").unlink(missing_ok=True)  # peft's template, with this machine's paths
    record = {**asdict(identity), "data_digest": data_digest}
    (unfinished / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(unfinished, directory)


def _identity(base: Any) -> Identity:
    return cast(Identity, base.identity)


def _in_float32(model: PeftModel) -> PeftModel:
    """Adapters are trained in float32, whatever the base's type: small updates must not round."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_provenance(adapter: Path, identity: Identity) -> None:
    try:
        record = json.loads((adapter / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no adapter with a readable {PROVENANCE}",
            where=str(adapter),
            expected="a directory that the train stage wrote",
            fix="train the previous iteration first",
        ) from error
    for name, meaning in (("base_digest", "base model"), ("quantization", "quantisation")):
        if record.get(name) != getattr(identity, name):
            raise UserError(
                f"the adapter was trained on another {meaning} than {identity.base} as it is now",
                where=str(adapter),
                expected=f"{name} {record.get(name)} ({record.get('base')})",
                fix="use that base, or start a new experiment",
            )


# Training ----------------------------------------------------------------------------------


def weighted_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Σ_i weight_i · -log p_θ(trained tokens of i | the tokens before them), in nats (a scalar).

    Its gradient is the M-step's: the posterior expectation of -∇ log p_θ(y2, z | x, y1) when
    the weights are the posterior's (STaPLe, section 3).

    Args:
        model: a causal language model.
        batch: `input_ids` (rows, length) padded on the right, `trained` (rows, length) bool,
            `weight` (rows,).
    """
    ids, trained, weight = batch["input_ids"], batch["trained"], batch["weight"]
    row, position = trained[:, 1:].nonzero(as_tuple=True)
    # A causal model does not see padding on its right: no attention mask, the faster kernel.
    with _output_only(model, row, position):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    losses = functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        ids[row, position + 1],
        reduction="none",
    )
    return (losses * weight[row]).sum()


@contextmanager
def _output_only(model: Any, row: torch.Tensor, position: torch.Tensor) -> Iterator[None]:
    """Let the output layer see the states that predict trained tokens only: (1, tokens, hidden).

    A hook, not a call of the layer, because some architectures scale its output afterwards.
    """

    def select(_: Any, states: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (states[0][row, position][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def train(
    model: PeftModel,
    examples: Sequence[Example],
    settings: AdapterSettings,
    *,
    seed: int,
    checkpoints: Path,
    progress: Progress | None = None,
) -> list[Step]:
    """Fit the adapter to the examples in place; returns the training curve.

    Each step follows the gradient of `weighted_loss` over its rows divided by one constant, the
    mean weighted number of trained tokens per step: rows keep their weight in every batch.
    The result depends on the arguments and the machine's arithmetic alone.

    Args:
        examples: at least one.
        checkpoints: a directory for unfinished work of exactly this call: a killed training
            resumes there at its last checkpoint. Removed at the end.
        progress: called with 1 after each optimiser step (`len(plan_batches(…))` in all).

    Raises:
        UserError: the loss is no longer finite.
    """
    lengths = [len(e.ids) for e in examples]
    steps = plan_batches(lengths, settings, seed)
    accumulate = math.ceil(settings.batch_size / settings.micro_batch_size)
    micro = math.ceil(settings.batch_size / accumulate)
    passes = [[examples[i] for i in part] for rows in steps for part in chunks(rows, micro)]
    worth = [e.weight * sum(e.trained) for e in examples]
    total = sum(worth[i] for rows in steps for i in rows)
    logs = _fit(
        model,
        passes,
        normaliser=total / len(steps),
        arguments={
            "output_dir": str(checkpoints),
            "gradient_accumulation_steps": accumulate,
            "seed": seed,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.schedule
            if settings.schedule != "constant"
            else "constant_with_warmup",
            "warmup_steps": round(settings.warmup * len(steps)),
            "max_grad_norm": settings.max_gradient_norm,
            "activation_checkpointing": settings.gradient_checkpointing,
        },
        progress=progress,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return _curve(logs, steps, lengths)


def _fit(
    model: PeftModel,
    passes: list[list[Example]],
    *,
    normaliser: float,
    arguments: dict[str, Any],
    progress: Progress | None,
) -> list[dict[str, float]]:
    """One pass of `transformers.Trainer` over ready-made micro-batches; returns its log."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class WeightedTrainer(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> torch.Tensor:
            return weighted_loss(self.accelerator.unwrap_model(model), inputs) / normaliser

    class Report(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if progress:
                progress(1)

    on_gpu = model.device.type == "cuda"
    trainer = WeightedTrainer(
        model=model,
        args=TrainingArguments(
            **arguments,
            num_train_epochs=1,
            per_device_train_batch_size=1,  # an item is a micro-batch
            train_sampling_strategy="sequential",
            bf16=on_gpu and model.get_base_model().dtype == torch.bfloat16,
            optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
            weight_decay=0.0,
            save_steps=CHECKPOINT_STEPS,
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=cast(Any, passes),
        data_collator=lambda items: _collate(items[0]),
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.loss_is_scaled_for_ga = True  # by the constant normaliser
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(arguments["output_dir"])))
    return trainer.state.log_history


def _last_checkpoint(checkpoints: Path) -> str | None:
    """The newest complete checkpoint: its state file is written last."""
    done = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(done, key=lambda d: int(d.name.split("-")[1]))) if done else None


def _curve(logs: list[dict[str, float]], steps: list[list[int]], lengths: list[int]) -> list[Step]:
    curve: list[Step] = []
    tokens = 0
    for rows, log in zip(steps, (entry for entry in logs if "loss" in entry), strict=True):
        tokens += sum(lengths[i] for i in rows)
        step = Step(int(log["step"]), log["loss"], log["learning_rate"], log["grad_norm"], tokens)
        if not math.isfinite(step.loss):
            raise UserError(
                f"training diverged: the loss of step {step.step} is {step.loss}",
                fix="lower the learning rate",
            )
        curve.append(step)
    return curve


def _collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest: see `weighted_loss` for the shapes."""
    length = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    trained = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        trained[row, : len(example.ids)] = torch.tensor(example.trained)
    weight = torch.tensor([e.weight for e in examples])
    return {"input_ids": ids, "trained": trained, "weight": weight}
