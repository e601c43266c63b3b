"""Finds, fetches, identifies and loads base models, from safetensors alone.

`models/training/updates.py` makes them trainable, `models/engine/local.py` samples from them, and
`models/judges/reward.py` loads reward models in the same way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, Unpack, cast

import torch

from constitutions.errors import UserError
from models.checkpoints.architecture import check_loading, first_line, no_chat_template, own_code
from models.checkpoints.gguf import local_directory
from models.checkpoints.headers import check_listing, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "none"]

# bitsandbytes advertises a kernel when imported, peft reads a renamed attribute: users need neither
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


class Loading(TypedDict):
    """How a model is loaded; see `PolicySettings.loading`."""

    quantization: Quantization
    """"nf4" holds the linear layers (not the output layer) in 4 bits."""
    dtype: Literal["float32", "bfloat16"]
    """Of the other weights, and of the computation."""
    device: NotRequired[Literal["auto", "cpu", "cuda"]]
    """"auto", the default, takes the GPUs where there are any."""
    revision: NotRequired[str | None]
    """The commit of a hub model."""


def load_base(
    model: str | Path, **how: Unpack[Loading]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from safetensors, frozen.

    Args:
        model: a `transformers` directory, a GGUF file, or a hub name that is fetched once.

    Returns:
        The base, which has its `Identity` as `identity`, and its tokenizer.

    Raises:
        UserError: directory, weights, tokenizer or chat template missing, or an architecture
            that this version of transformers does not have without running foreign code.
    """
    from transformers import AutoModelForCausalLM

    directory = find_base(model, how.get("revision"))
    tokenizer = load_tokenizer(model, how.get("revision"))
    base = load_weights(AutoModelForCausalLM, model, **how)
    base.requires_grad_(False)
    keep_unpacked(base)
    name = directory.resolve().name if Path(model).expanduser().exists() else str(model)
    commit = directory.name if directory.parent.name == "snapshots" else None
    base.identity = Identity(name, base_digest(directory), how["quantization"], commit)
    return base, tokenizer


def load_weights(kind: Any, model: str | Path, **how: Unpack[Loading]) -> Any:
    """A model with every weight from its safetensors files; none is made up.

    Args:
        kind: transformers' auto class, such as `AutoModelForCausalLM`.

    Raises:
        UserError: the model cannot be loaded, or its weights do not fit its architecture.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # each stage loads the base
    directory = find_base(model, how.get("revision"))
    device = how.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = getattr(torch, how["dtype"])
    with _loading(model):
        loaded, loading = kind.from_pretrained(
            directory,
            quantization_config=nf4_config(compute) if how["quantization"] == "nf4" else None,
            dtype=compute,
            device_map=_placement(device),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    quantised = "quantization_config" in read_object(directory / "config.json")
    check_loading(loading, type(loaded).__name__, f"model {model}", quantised=quantised)
    return loaded


def nf4_config(dtype: torch.dtype) -> Any:
    """bitsandbytes' settings for weights in NF4 that compute in `dtype`."""
    from transformers import BitsAndBytesConfig

    return cast(Any, BitsAndBytesConfig)(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template.

    Where it names no end of a text, it gets the one of the generation configuration.

    Raises:
        UserError: there is no such model, tokenizer or chat template.
    """
    from transformers import AutoTokenizer

    with _loading(model):
        directory = find_base(model, revision)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if tokenizer.eos_token_id is None and (end := _configured_end(directory)) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.chat_template is None:
        raise no_chat_template(str(model))
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
    except Exception as error:  # each library raises its own errors for a malformed file
        if "auto_map" in read_object(find_base(model) / "config.json"):
            raise own_code(model) from error
        raise UserError(
            f"the model cannot be loaded: {first_line(error)}",
            where=str(model),
            expected="a model of an architecture that transformers knows",
        ) from error


def _placement(device: str) -> str | dict[str, str | int]:
    """transformers' `device_map`: each of several training processes has a GPU of its own."""
    if device != "cuda":
        return {"": "cpu"}
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def find_base(model: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model; a hub's model is fetched, without pickles, if not cached.

    A GGUF file's is made if it is not there.

    Raises:
        UserError: there is no such directory or hub model, or it lacks the configuration, the
            safetensors weights or the tokenizer.
    """
    directory = local_directory(model) or _fetch(str(model), revision)
    check_listing(directory)
    return directory


def base_digest(directory: Path) -> str:
    """sha256 (hex) of a base's configuration, tokenizer and a sample of its weights.

    Of weight files above 64 MiB it reads 256 blocks of 64 KiB, evenly spread from the beginning on;
    training changes all of them. The digest identifies a base and does not authenticate it.
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
    """Hub name, or the directory's name without its path."""
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

    The packed kernel of CPUs with AVX512-BF16 has no backward pass: training after sampling would
    lose gradients without an error (bitsandbytes 0.50).
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
