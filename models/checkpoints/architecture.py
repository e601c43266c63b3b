"""Compares a model's configuration and tensors with its architecture in transformers.

`models.checkpoints.check` compares the headers of a checkpoint before anything is computed,
`models.training.bases` the weights that it has loaded. No function here needs memory for weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from constitutions.errors import UserError
from models.checkpoints.headers import Tensor, read_object
from models.policy import PolicySettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Use = Literal["trained", "sampled", "reward"]
"""What a model is for: training and sampling, sampling only, or judging by its reward."""

HARMLESS = re.compile(
    r"inv_freq$|masked_bias$|\.attn(\.attention)?\.bias$|attention\.bias$|position_ids$"
    r"|_extra_state$|(^|\.)(mtp|nextn|vision\w*|visual|audio\w*|multi_modal\w*|mm_\w+|embed_vision)\."
)
"""Tensors in checkpoints that no causal language model uses: buffers that are computed when it is
loaded, heads that predict further tokens, parts for images and sound."""
OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+$")
"""The end of an architecture's name that shows that it does not continue texts."""
LARGEST_BUFFERS = 1 << 30
"""Most bytes of the tables that an architecture computes (positions, masks)."""
NAMED = 4
"""Most names that a message lists."""


def read_config(directory: Path, settings: PolicySettings, use: Use) -> PreTrainedConfig:
    """The configuration in a model directory.

    Raises:
        UserError: the file holds no configuration or names other weights, transformers has no such
            architecture for this use, or the weights are quantised in another way than NF4.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    file = directory / "config.json"
    entries = read_object(file)
    mapping = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if use == "reward"
        else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    if "transformers_weights" in entries:
        raise UserError("names weights of its own (transformers_weights)", where=str(file))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        known = type(config) in mapping
    except Exception as error:  # each architecture raises its own errors
        if "auto_map" in entries:
            raise own_code(directory) from None
        raise UserError(
            f"holds no configuration that transformers knows: {first_line(error)}", where=str(file)
        ) from None
    other = [n for n in entries.get("architectures") or () if OTHER_TASK.search(str(n))]
    if not known or (other and use != "reward"):
        if "auto_map" in entries and not known:
            raise own_code(directory)
        raise UserError(
            f"describes {other[0] if other else f'a {config.model_type} model'}",
            where=str(file),
            expected="a sequence-classification model"
            if use == "reward"
            else "a causal language model of an architecture that transformers knows",
        )
    already = _quantised(config)
    if settings.quantization == "nf4" and already not in ("", "bitsandbytes"):
        raise UserError(
            f"the weights are quantised already ({already})",
            where=str(file),
            fix="set quantization to none, or take the version that is not quantised",
        )
    return cast("PreTrainedConfig", config)


def own_code(model: str | Path) -> UserError:
    """The error for a model that needs to run its own code."""
    return UserError(
        "the model asks to run its own code (auto_map in config.json), which is refused",
        where=str(model),
        expected="a causal language model of an architecture that transformers knows",
        fix="serve it behind an OpenAI-compatible endpoint",
    )


def no_chat_template(where: str) -> UserError:
    """The error for a tokenizer without a chat template."""
    return UserError(
        "the tokenizer has no chat template",
        where=where,
        expected="a chat model (chat_template.jinja or a template in tokenizer_config.json)",
        fix="take the model's instruction-tuned version",
    )


def compare(config: PreTrainedConfig, held: Mapping[str, Tensor], use: Use) -> tuple[str, int, int]:
    """Compare the tensors of a checkpoint with the architecture of its configuration.

    `from_pretrained` itself loads them, on a device without memory, so that it renames, fuses and
    ties weights as it does when the model is used.

    Returns:
        The architecture's name, its number of parameters and of rows in its embedding.

    Raises:
        UserError: tensors are missing, unexpected or of another shape, or the configuration
            describes no model that can be built.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if use == "reward" else AutoModelForCausalLM
    where = f"model directory {config.name_or_path}"
    quantised = _quantised(config)
    if quantised:
        del config.quantization_config
    try:
        with torch.device("meta"):
            shell = auto.from_config(config, trust_remote_code=False)
        tensors = {
            name: torch.empty(tensor.shape, dtype=_dtype(tensor.kind), device="meta")
            for name, tensor in held.items()
        }
        model, loading = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except MemoryError:
        raise
    except ImportError as error:
        raise UserError(
            f"needs a package that is not installed: {' '.join(str(error).split())[:300]}",
            where=where,
        ) from None
    except Exception as error:  # each architecture raises its own errors for sizes that do not fit
        raise UserError(
            f"config.json describes no model that can be built: {first_line(error)}", where=where
        ) from None
    check_loading(loading, type(model).__name__, where, quantised=bool(quantised))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > LARGEST_BUFFERS:
        raise UserError(
            f"config.json asks for tables of {buffers >> 20:,} MiB beside the weights",
            where=where,
            expected=f"{LARGEST_BUFFERS >> 20:,} MiB at most",
        )
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0]) if hasattr(embedding, "weight") else 1 << 40
    return type(model).__name__, int(model.num_parameters()), rows


def check_loading(
    loading: Mapping[str, Any], name: str, where: str, *, quantised: bool = False
) -> None:
    """Check that a checkpoint gave every tensor of a model, and that none was left over.

    Args:
        loading: the report of `from_pretrained` with `output_loading_info`.
        name: the architecture's name.
        where: the model's name in an error.
        quantised: the checkpoint holds weights in pieces; a weight without any piece is missing.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    missing = set(loading["missing_keys"])
    unexpected = {key for key in loading["unexpected_keys"] if not HARMLESS.search(key)}
    wrong = {key: (there, here) for key, there, here in loading["mismatched_keys"]}
    if quantised:  # several tensors, such as codes and scales, stand for one weight
        pieces = {key.rpartition(".")[0] for key in unexpected}
        pieces |= {re.sub("_(blocks|scales)$", "", key) for key in unexpected}
        missing = {k for k in missing if k not in pieces and k.rpartition(".")[0] not in pieces}
        unexpected, wrong = set(), {}
    shapes = [f"{k} is {_size(there)}, not {_size(here)}" for k, (there, here) in wrong.items()]
    failed = (loading.get("conversion_errors") or {}).items()
    messages = [*(loading.get("error_msgs") or ()), *(f"{k}: {first_line(m)}" for k, m in failed)]
    faults = [_listed("lack", missing), _listed("have", unexpected, " that it does not know")]
    if wrong:
        faults.append(f"{len(wrong):,} of another shape ({'; '.join(sorted(shapes)[:NAMED])})")
    faults += map(first_line, messages[:NAMED])
    if faults := [fault for fault in faults if fault]:
        raise UserError(
            f"the weights do not fit {name}: they {' and '.join(faults)}",
            where=where,
            expected="exactly the tensors of the architecture that config.json describes",
            fix="fetch the model again, or correct config.json",
        )


def _listed(verb: str, names: Collection[str], why: str = "") -> str:
    """The names of tensors with what is wrong with them; "" where there are none."""
    more = f", … and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    shown = f"{', '.join(sorted(names)[:NAMED])}{more}"
    return f"{verb} {len(names):,} tensors{why} ({shown})" if names else ""


def _size(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _quantised(config: PreTrainedConfig) -> str:
    """The name of a checkpoint's quantisation; "" where its weights are not quantised."""
    entries = getattr(config, "quantization_config", None) or {}
    found = entries.get("quant_method") if isinstance(entries, dict) else entries.quant_method
    return str(getattr(found, "value", found) or "in a way of its own") if entries else ""


def _dtype(kind: str) -> Any:
    import torch

    names = {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16},
        **{"BF16": torch.bfloat16, "C64": torch.complex64, "BOOL": torch.bool},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    }
    return names.get(kind, torch.uint8)


def first_line(error: object) -> str:
    """The first line of an error's message, of at most 300 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
