"""Bases and what training makes of them: a LoRA adapter (NF4 or not), or every weight anew.

`models/training/loop.py` trains them; `models/engine/local.py` loads the same base and adapter to
sample. An adapter records which base it was trained on and refuses another. Where all weights are
trained (`update: full`), "the adapter" is a complete model directory, and is put into the base in
place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from constitutions.errors import UserError, UserErrors
from models.checkpoints.architecture import check_loading, first_line, own_code
from models.checkpoints.headers import check_listing, read_object
from models.files import UNREADABLE
from models.training.adapter import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "none"]
PROVENANCE = "provenance.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

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
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # each stage loads the base; ours are the bars that tell something

    directory = find_base(model, revision)
    tokenizer = load_tokenizer(model, revision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = getattr(torch, dtype)
    nf4 = cast(Any, BitsAndBytesConfig)(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    with _loading(model):
        base, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
            directory,
            quantization_config=nf4 if quantization == "nf4" else None,
            dtype=compute,
            device_map=_placement(device),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    quantised = "quantization_config" in read_object(directory / "config.json")
    check_loading(loading, type(base).__name__, f"model {model}", quantised=quantised)
    base.requires_grad_(False)
    keep_unpacked(base)
    name = directory.resolve().name if Path(model).expanduser().is_dir() else str(model)
    commit = directory.name if directory.parent.name == "snapshots" else None
    cast(Any, base).identity = Identity(name, base_digest(directory), quantization, commit)
    return base, tokenizer


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with its chat template; the end of a text that it does not name is
    the generation configuration's.

    Raises:
        UserError: as `load_base`.
    """
    from transformers import AutoTokenizer

    with _loading(model):
        directory = find_base(model, revision)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if tokenizer.eos_token_id is None and (end := _configured_end(directory)) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template",
            where=str(model),
            expected="a chat model (chat_template.jinja or a template in tokenizer_config.json)",
            fix="take the model's instruction-tuned version",
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def _configured_end(directory: Path) -> int | None:
    """The first token that the generation configuration ends a text with."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(directory).eos_token_id
    except (OSError, ValueError):
        return None
    return next(iter(found), None) if isinstance(found, list) else found


@contextmanager
def _loading(model: str | Path) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library raises its own kinds for a file that is malformed
        if "auto_map" in read_object(find_base(model) / "config.json"):
            raise own_code(model) from error
        raise UserError(
            f"the model cannot be loaded: {first_line(error)}",
            where=str(model),
            expected="a causal language model of an architecture that transformers knows",
        ) from error


def _placement(device: str) -> str | dict[str, str | int]:
    """Where the weights go: each of several training processes has a GPU to itself."""
    if device != "cuda":
        return {"": "cpu"}
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def find_base(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model; a hub name is fetched (safetensors only) when not cached.

    Raises:
        UserError: no such directory or hub model, or one without configuration, safetensors
            weights or tokenizer.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = _fetch(str(model), revision)
    check_listing(directory)
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
    revision: str | None = None
    """Commit of a hub model; a directory has none."""


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
            f"the model is neither a directory nor available from the hub: {first_line(error)}",
            where=name,
            fix="check the name, the revision and the network, or give a local directory",
        ) from error


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    size, block = file.stat().st_size, 1 << 16
    with file.open("rb") as stream:
        if size <= 1 << 26:
            yield stream.read()
            return
        for position in range(0, size, size // 256):
            stream.seek(position)
            yield stream.read(block)


def keep_unpacked(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU.

    With AVX512-BF16 it does so for good, and the packed kernel has no backward pass: training
    after sampling then loses gradients without an error (bitsandbytes 0.50).
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


# What is trained ---------------------------------------------------------------------------


def trainable(
    base: PreTrainedModel, settings: AdapterSettings, seed: int, previous: Path | None
) -> PeftModel | PreTrainedModel:
    """The base with what `settings.update` trains: new, or going on from the previous iteration's.

    Raises:
        UserError: the previous iteration trained another base, or in another way.
    """
    if previous is not None:
        if _provenance(previous)["kind"] != settings.update:
            raise UserError(
                f"the previous iteration did not train with update = {settings.update}",
                where="setting 'train.update'",
                expected=f"{_provenance(previous)['kind']}, as in {previous}",
                fix="train all iterations in the same way, or set train.start to base",
            )
        if settings.update == "lora":
            _check_shape(previous, settings)
        return continue_adapter(base, previous)
    return _all_weights(base) if settings.update == "full" else new_adapter(base, settings, seed)


def _check_shape(adapter: Path, settings: AdapterSettings) -> None:
    """An adapter is continued as it was begun.

    Raises:
        UserErrors: it has another rank, alpha or dropout.
    """
    recorded = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    names = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    differing = [
        UserError(
            f"the adapter that is continued has {recorded[key]}",
            where=f"setting 'train.{name}' = {getattr(settings, name)}",
            expected=f"{recorded[key]}, as in {adapter}",
            fix="or set train.start to base",
        )
        for key, name in names.items()
        if recorded[key] != getattr(settings, name)
    ]
    if differing:
        raise UserErrors(differing)


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


def continue_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel | PreTrainedModel:
    """What the previous iteration trained, on `base` (from `load_base`), to be trained further.

    Raises:
        UserError: no adapter there, or one of another base or quantisation.
    """
    from peft import PeftModel

    if _check_provenance(adapter, _identity(base))["kind"] == "full":
        return _all_weights(_with_weights(base, adapter))
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    # where the base lies here: peft reads its configuration for checkpoints, or asks the hub
    model.active_peft_config.base_model_name_or_path = base.name_or_path
    return _in_float32(model)


def attach_adapter(base: PreTrainedModel, adapter: Path, *, merge: bool = False) -> PreTrainedModel:
    """The policy of an adapter, for sampling: `base` (from `load_base`) with its update.

    Args:
        adapter: what `save_adapter` wrote; where that is all weights, they replace the base's.
        merge: add the update to the weights. An NF4 base is dequantised first, since a merged
            weight that is rounded to NF4 again would be another one.

    Raises:
        UserError: no adapter there, or one of another base or quantisation.
    """
    from peft import PeftModel

    if _check_provenance(adapter, _identity(base))["kind"] == "full":
        return _no_base(_with_weights(base, adapter))
    if merge and _identity(base).quantization == "nf4":
        base = cast(Any, base).dequantize()
    model = cast(Any, PeftModel.from_pretrained(base, str(adapter)))
    if merge:
        return _no_base(model.merge_and_unload())
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as mixed precision computes with it in training
            parameter.data = parameter.data.to(base.dtype)
    return cast("PreTrainedModel", model)


def _no_base(changed: Any) -> PreTrainedModel:
    """A model whose weights are no longer the base's: nothing can be attached to it."""
    if hasattr(changed, "identity"):
        del changed.identity
    return cast("PreTrainedModel", changed)


def save_adapter(
    model: PeftModel | PreTrainedModel,
    directory: Path,
    *,
    data_digest: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write what was trained and its provenance; all of it or nothing.

    Args:
        model: with an adapter, which is written as PEFT safetensors; else all weights are
            written, in the type that the base had.
        directory: is replaced when it exists.
        data_digest: of what it was trained on.
        tokenizer: makes a directory of all weights complete.
    """
    from peft import PeftModel

    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if isinstance(model, PeftModel):
        identity, kind = _identity(model.get_base_model()), "lora"
        _write_adapter(model, unfinished, identity)
    else:
        identity, kind = _identity(model), "full"
        model.to(cast(Any, model).held_as).save_pretrained(str(unfinished))
    if tokenizer is not None and kind == "full":
        tokenizer.save_pretrained(str(unfinished))
    record = {"kind": kind, **asdict(identity), "data_digest": data_digest}
    (unfinished / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(unfinished, directory)


def _write_adapter(model: PeftModel, directory: Path, identity: Identity) -> None:
    config = model.active_peft_config
    config.base_model_name_or_path = identity.base
    config.target_modules = sorted(config.target_modules or ())  # a set has no order of its own
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's template, with this machine's paths


def _all_weights(base: PreTrainedModel) -> PreTrainedModel:
    """Every weight trainable, in float32 while it is trained: small updates must not round."""
    cast(Any, base).held_as = base.dtype
    base.requires_grad_(True)
    return cast("PreTrainedModel", base.float())


def _with_weights(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The base with all of its weights replaced, in place, by those of a model directory."""
    from safetensors.torch import load_file

    own = base.state_dict(keep_vars=True)
    named = dict(base.named_parameters())  # a tied weight is named once
    found: set[str] = set()
    for file in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name not in own or own[name].shape != value.shape:
                raise UserError(f"the weights do not fit the base: {name}", where=str(file))
            own[name].data.copy_(value)
            found.add(name)
    if lacking := named.keys() - found:
        raise UserError(f"weights are missing: {min(lacking)}", where=str(directory))
    return base


def _identity(base: Any) -> Identity:
    return cast(Identity, base.identity)


def _in_float32(model: PeftModel) -> PeftModel:
    """Adapters are trained in float32, whatever the base's type: small updates must not round."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_provenance(adapter: Path, identity: Identity) -> dict[str, str]:
    """The record beside an adapter, which must name this base."""
    record = _provenance(adapter)
    for name, meaning in (("base_digest", "base model"), ("quantization", "quantisation")):
        if record.get(name) != getattr(identity, name):
            raise UserError(
                f"the adapter was trained on another {meaning} than {identity.base} as it is now",
                where=str(adapter),
                expected=f"{name} {record.get(name)} ({record.get('base')})",
                fix="use that base, or start a new experiment",
            )
    return record


def _provenance(adapter: Path) -> dict[str, str]:
    """The record beside an adapter or a directory of all weights.

    Raises:
        UserError: there is none, or the weights beside it are pickled or missing.
    """
    try:
        record = dict(json.loads((adapter / PROVENANCE).read_text(encoding="utf-8")))
    except UNREADABLE as error:
        raise UserError(
            f"no adapter with a readable {PROVENANCE}",
            where=str(adapter),
            expected="a directory that the train stage wrote",
            fix="train the previous iteration first",
        ) from error
    if not any(adapter.glob("*.safetensors")):
        pickled = sorted(file.name for file in adapter.glob("*.bin"))
        raise UserError(
            f"pickled weights are not loaded: {pickled[0]}" if pickled else "there are no weights",
            where=str(adapter),
            expected=f"{ADAPTER_WEIGHTS}, or model*.safetensors",
        )
    return {"kind": "lora", **record}
