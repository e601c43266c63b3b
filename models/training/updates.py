"""What training adds to a base: a LoRA adapter, or new values of all weights.

`models/training/loop.py` trains it; `models/engine/local.py` attaches it to the same base. A record
beside it (provenance.json) names the base on which it was trained; any other base is refused. Where
all weights are trained (`update: full`), "the adapter" is a whole model directory, whose weights
replace those of the base.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from constitutions.errors import UserError, UserErrors
from models.files import UNREADABLE
from models.training.adapter import AdapterSettings
from models.training.bases import Identity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROVENANCE = "provenance.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def trainable(
    base: PreTrainedModel, settings: AdapterSettings, seed: int, previous: Path | None
) -> PeftModel | PreTrainedModel:
    """The model that is trained: a new update of the base, or the previous iteration's.

    Args:
        previous: the adapter of the previous iteration; None: training starts at the base.

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
    """Raise `UserErrors` where the settings change a continued adapter's rank, alpha or dropout."""
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
    """The base with a new LoRA adapter, in float32, on every linear layer but the output layer.

    Before the first step the adapter changes nothing: its B matrices are zero.
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
    """`base` (from `load_base`) with the previous iteration's update, which is trained further.

    Raises:
        UserError: there is no adapter, or it belongs to another base or quantisation.
    """
    from peft import PeftModel

    if _check_provenance(adapter, _identity(base))["kind"] == "full":
        return _all_weights(_with_weights(base, adapter))
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    # the base's path on this machine: otherwise peft asks the hub for its configuration
    model.active_peft_config.base_model_name_or_path = base.name_or_path
    return _in_float32(model)


def attach_adapter(base: PreTrainedModel, adapter: Path, *, merge: bool = False) -> PreTrainedModel:
    """`base` (from `load_base`) with a trained update, for sampling.

    Args:
        adapter: a directory that `save_adapter` wrote; where it holds all weights, they replace
            those of the base.
        merge: add the update to the weights. An NF4 base is dequantised first, because rounding the
            sums to NF4 again would change them.

    Raises:
        UserError: there is no adapter, or it belongs to another base or quantisation.
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
        if "lora_" in name:  # the type that training computes in
            parameter.data = parameter.data.to(base.dtype)
    return cast("PreTrainedModel", model)


def _no_base(changed: Any) -> PreTrainedModel:
    """The model without the base's identity: its weights have changed, so no adapter fits it."""
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
    """Write a trained update and its provenance, all of it or nothing.

    Args:
        model: an adapter is written as PEFT safetensors; without one, all weights are written in
            the base's type.
        directory: replaced where it exists.
        data_digest: identifies the training data.
        tokenizer: written beside all weights, to complete the model directory.
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
    config.target_modules = sorted(config.target_modules or ())  # a set has no order
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's, with this machine's paths


def _all_weights(base: PreTrainedModel) -> PreTrainedModel:
    """The base with every weight trainable, in float32, so that rounding loses no small update."""
    cast(Any, base).held_as = base.dtype
    base.requires_grad_(True)
    return cast("PreTrainedModel", base.float())


def _with_weights(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The base with all of its weights replaced, in place, by those of a model directory.

    Raises:
        UserError: weights are missing, or do not fit the base.
    """
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
    """The adapter in float32, whatever the base's type, so that rounding loses no small update."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_provenance(adapter: Path, identity: Identity) -> dict[str, str]:
    """The record beside an adapter; raises UserError where it names another base."""
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
