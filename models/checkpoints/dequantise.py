"""Writes a GGUF file's model as a directory of transformers, in a process with limits.

`models/checkpoints/gguf.py` starts it. The file is foreign: its header is read, and compared with
the architecture that transformers builds from it, before any weight is. What transformers would
leave out without a word, such as a tensor, a scaling of positions or a way to split text, is
refused by name, because the model would not be the one in the file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from constitutions.errors import UserError
from models.checkpoints.architecture import NAMED, check_loading, first_line, no_chat_template
from models.checkpoints.bounded import DATA_BYTES, Step, serve

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EXACT = 1_000_000_000
"""Parameters up to which weights are written in float32, as they are dequantised; larger models are
written in bfloat16, in which they are published, at half the size."""
SPEED = 2_000_000
"""Weights that a slow processor dequantises and writes in a second."""
CHECKED = frozenset(
    (
        *("vocab_size", "block_count", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.value_length", "expert_count", "shortconv.l_cache"),
        *("expert_feed_forward_length", "expert_shared_feed_forward_length"),
        *("context_length", "tensor_data_layout"),
    )
)
"""Names of numbers, below the architecture's, that transformers need not read: the tensors' shapes
tell them, or no result depends on them."""
SET = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Numbers that transformers does not read for every architecture whose configuration has them, and
their names there: they are set from the file."""
EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""What configurations call the number that a norm adds to a variance."""
ROPE = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
"""Numbers of a scaling of positions below `rope.scaling`, and their names in configurations."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""The layers of the one model of an architecture that scales its attention in another way than its
smaller ones; no GGUF file says so."""
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How the Llamas from 3.1 on scale positions; a GGUF file holds only the resulting frequencies."""
FREQUENCIES = "rope_freqs.weight"
CONTROL = 3
"""The type of a token that no text is made into, such as the mark of a turn."""
DIGITS = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
)
"""Names of the ways to split text as GPT-2 does, after every digit."""
GPT2 = frozenset(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"))
"""Names of the ways to split text that are GPT-2's."""
WHOLE = frozenset(
    (
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "tekken",
    )
)
"""Names of the ways to split text whose words are tokens where the vocabulary has them, whatever
the merges would make of them."""


def main() -> None:
    """Answer one request of `models.checkpoints.gguf`: a file, and where its directory goes."""

    import gguf

    # transformers reads the header three times, a long vocabulary in ten seconds
    cast(Any, gguf).GGUFReader = functools.cache(gguf.GGUFReader)

    def work(request: Any, step: Step) -> None:
        file, place = Path(request["file"]), Path(request["to"])
        unfinished = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            convert(file, unfinished, step)
            unfinished.replace(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    serve(work)


def convert(file: Path, to: Path, step: Step = lambda name, seconds, memory=0: None) -> None:
    """Write the model of a GGUF file into a new directory.

    Raises:
        UserError: the first fault that is found.
    """
    step("importing transformers", 60)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    step("reading the header", 120)
    reader = _header(file)
    _check_whole(file, reader)
    step("building what the header describes", 60)
    config = _config(file, reader)
    _check_tensors(file, reader, config)
    step("building the tokenizer", 120)
    tokenizer = _tokenizer(file, reader)
    sizes = [int(tensor.n_elements) for tensor in reader.tensors]
    dtype = torch.float32 if sum(sizes) < EXACT else torch.bfloat16
    size = sum(sizes) * dtype.itemsize
    needed = size + 16 * max(sizes) + (512 << 20)  # a tensor is float32, and copied, on its way
    _check_room(file, to.parent, size, needed)
    step("dequantising the weights", 120 + sum(sizes) // SPEED, DATA_BYTES + size + needed)
    model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loading` tells them
    )
    check_loading(loading, type(model).__name__, _where(file))
    del model.config.quantization_config  # they are quantised no more
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(to)
    _forget_version(to / "config.json")
    tokenizer.save_pretrained(to)


def _forget_version(file: Path) -> None:
    """Leave out which transformers wrote a configuration: it identifies the base of an adapter."""
    config = json.loads(file.read_text("utf-8"))
    config.pop("transformers_version", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _where(file: Path) -> str:
    return f"GGUF file {file}"


# The header --------------------------------------------------------------------------------------


def _header(file: Path) -> GGUFReader:
    """The header, whose every entry lies within the file.

    transformers' own reader is the faster one, and notices an array without an end.

    Raises:
        UserError: the file is cut or malformed.
    """
    import gguf
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        read_gguf_metadata(str(file))
        return gguf.GGUFReader(str(file))
    except MemoryError:
        raise
    except Exception as error:  # numpy's and struct's, where an entry ends behind the file
        raise _malformed(file, first_line(error).replace(str(file), "it")) from None


def _malformed(file: Path, why: str) -> UserError:
    return UserError(
        f"is no whole GGUF file of version 2 or 3: {why}", where=_where(file), fix="fetch it again"
    )


def _value(reader: GGUFReader, name: str, usual: Any = None) -> Any:
    field = reader.get_field(name)
    return usual if field is None else field.contents()


def _check_whole(file: Path, reader: GGUFReader) -> None:
    """Check that the file holds one chat model, in numbers that can be dequantised.

    Raises:
        UserError: it does not.
    """
    if not reader.tensors or sum(int(t.n_bytes) for t in reader.tensors) > file.stat().st_size:
        raise _malformed(file, "its tensors have no bytes of their own")
    if (parts := _value(reader, "split.count", 1)) != 1:
        raise UserError(
            f"is one of {parts} parts of a model",
            where=_where(file),
            fix="join them with llama-gguf-split --merge",
        )
    architecture = _value(reader, "general.architecture")
    if architecture not in (known := architectures()):
        raise UserError(
            f"its architecture ({str(architecture)[:60]!r}) is none that transformers reads",
            where=_where(file),
            expected=f"one of {', '.join(known)}",
            fix="take the model's safetensors version",
        )
    layers = _value(reader, f"{architecture}.block_count", 0)
    if not isinstance(layers, int) or layers > len(reader.tensors):
        raise UserError(
            f"describes {str(layers)[:20]} layers, and holds {len(reader.tensors):,} tensors",
            where=_where(file),
        )
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    if unknown := sorted(kind.name for kind in kinds if not _dequantises(kind, architecture)):
        raise UserError(
            f"its weights are quantised in a way that transformers does not read: "
            f"{', '.join(unknown)}",
            where=_where(file),
            fix="take a version of the model in another quantisation, such as Q8_0 or Q4_K_M",
        )
    if not isinstance(_value(reader, "tokenizer.chat_template"), str):
        raise no_chat_template(_where(file))


def architectures() -> list[str]:
    """The architectures of GGUF files that transformers reads as causal language models."""
    from transformers import CONFIG_MAPPING
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    others = {"general", "tokenizer", "t5", "umt5", "mistral"}  # GGUF calls mistral a llama
    spelt = {name.replace("qwen2_moe", "qwen2moe").replace("qwen3_moe", "qwen3moe")
             .replace("gpt_oss", "gpt-oss").replace("minimax_m2", "minimax-m2")
             for name in GGUF_CONFIG_MAPPING.keys() - others
             if name in CONFIG_MAPPING or f"{name}_text" in CONFIG_MAPPING}  # fmt: skip
    return sorted(spelt | GGUF_CONFIG_ARCHS.keys())


def _mapping(architecture: str) -> Mapping[str, str | None] | None:
    """Names of a file's numbers, below its architecture's, and what transformers calls them.

    None where transformers reads them by a function of its own: all but a scaling of positions.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    if architecture in GGUF_CONFIG_ARCHS:
        return None
    kind = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture)
    return cast("Mapping[str, str | None]", GGUF_CONFIG_MAPPING[kind.replace("-", "_")])


def _dequantises(kind: Any, architecture: str) -> bool:
    """Whether the weights of a type can be dequantised by what reads this architecture."""
    import gguf
    import numpy as np
    from transformers.integrations.gguf.dequant import GGML_BLOCK
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if kind in (*plain, gguf.GGMLQuantizationType.BF16):
        return True
    if is_gguf_arch_supported(architecture):
        return kind in GGML_BLOCK
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


# The architecture --------------------------------------------------------------------------------


def _config(file: Path, reader: GGUFReader) -> PreTrainedConfig:
    """transformers' configuration for the file, with what it does not read itself.

    Raises:
        UserError: the file says something that no configuration of transformers holds.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"describes a {config.model_type} model", where=_where(file))
        changes = _unread(file, reader, config) | _frequencies(file, reader, config)
        changes |= _scale(reader, config)
        return type(config)(**{**config.to_dict(), **changes}) if changes else config
    except (MemoryError, UserError):
        raise
    except Exception as error:  # each architecture raises its own errors
        raise UserError(
            f"its header describes no model: {first_line(error)}", where=_where(file)
        ) from None


def _unread(file: Path, reader: GGUFReader, config: PreTrainedConfig) -> dict[str, Any]:
    """What the file says of the model beyond what transformers reads, by the configuration's names.

    Raises:
        UserError: transformers cannot do what it says.
    """
    architecture = str(_value(reader, "general.architecture"))
    mapping, found = _mapping(architecture), {}
    for name, field in reader.fields.items():
        prefix, _, key = name.partition(".")
        read = not key.startswith("rope.scaling.") if mapping is None else bool(mapping.get(key))
        if prefix != architecture or read or key in CHECKED:
            continue
        value, attribute = field.contents(), SET.get(key, "")
        if hasattr(config, attribute):
            found[attribute] = value
        elif not _is_usual(key, value, config):
            raise UserError(
                f"says {name} = {str(value)[:60]}, which transformers does not read",
                where=_where(file),
                fix="take the model's safetensors version",
            )
    return found


def _is_usual(key: str, value: Any, config: PreTrainedConfig) -> bool:
    """Whether a number that transformers does not read is the one that it takes anyway."""
    rope = getattr(config, "rope_parameters", None) or {}
    match key:
        case "rope.dimension_count":
            heads = getattr(config, "num_attention_heads", 1)
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            return int(size * rope.get("partial_rotary_factor", 1)) == value
        case "rope.freq_base" | "rope.freq_base_swa":
            thetas = [part.get("rope_theta") for part in rope.values() if isinstance(part, dict)]
            return any(
                math.isclose(theta or 0, value) for theta in [rope.get("rope_theta"), *thetas]
            )
        case "rope.scaling.type":
            return bool(value == rope.get("rope_type", "default").replace("default", "none"))
        case "attention.layer_norm_epsilon" | "attention.layer_norm_rms_epsilon":
            taken = [getattr(config, name) for name in EPSILONS if hasattr(config, name)]
            return any(math.isclose(epsilon, value, rel_tol=1e-6) for epsilon in taken)
        case "attention.head_count_kv":
            return bool(value == config.num_attention_heads)
        case "attention.causal":
            return bool(value)
    if key.startswith("rope.scaling.") and (name := ROPE.get(key.rpartition(".")[2])):
        positions = getattr(config, "max_position_embeddings", None)
        plain = {"original_max_position_embeddings": positions}
        return bool(value == (plain | rope).get(name))
    return value in (0, False, None)  # a scale, a limit or a bias that is not there


def _scale(reader: GGUFReader, config: PreTrainedConfig) -> dict[str, Any]:
    """The number whose square root divides the attention's scores, as llama.cpp takes it: the size
    of a head, and in the largest Gemma the width by the number of heads."""
    architecture = str(_value(reader, "general.architecture"))
    if architecture not in LARGEST:
        return {}
    largest = config.num_hidden_layers == LARGEST[architecture]
    whole = config.hidden_size // config.num_attention_heads
    return {"query_pre_attn_scalar": whole if largest else config.head_dim}


def _frequencies(file: Path, reader: GGUFReader, config: PreTrainedConfig) -> dict[str, Any]:
    """The scaling of positions whose frequencies the file holds as a tensor, if it does.

    Raises:
        UserError: it is not that of the Llamas from 3.1 on.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    held = next((tensor.data for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if held is None:
        return {}
    plain = config.rope_parameters
    scaled = {**plain, **LLAMA3, "rope_type": "llama3", "factor": round(float(held.max()), 3)}
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta, size = plain["rope_theta"], 2 * len(frequencies)
    expected = theta ** -(np.arange(0, size, 2) / size) / frequencies.numpy()
    if held.shape != expected.shape or not np.allclose(held, expected, rtol=1e-3):
        raise UserError(
            f"scales positions ({FREQUENCIES}) in a way that transformers does not read",
            where=_where(file),
            fix="take the model's safetensors version",
        )
    return {"rope_parameters": scaled}


def _check_tensors(file: Path, reader: GGUFReader, config: PreTrainedConfig) -> None:
    """Check that transformers takes every tensor of the file; `check_loading` checks the others.

    Raises:
        UserError: it would leave some out, or no model of this configuration can be built.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = str(_value(reader, "general.architecture"))
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        parameters = shell.num_parameters()
        if parameters > 2 * (held := sum(int(t.n_elements) for t in reader.tensors)):
            raise UserError(
                f"describes a model of {parameters:,} parameters, and holds {held:,}",
                where=_where(file),
            )
        if is_gguf_arch_supported(architecture):
            return  # of these transformers reports what it leaves out
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        taken = {FREQUENCIES, "output.weight", *get_gguf_hf_weights_map(shell, processor)}
    except (MemoryError, UserError):
        raise
    except Exception as error:  # each architecture raises its own errors
        raise UserError(
            f"its header describes no model that can be built: {first_line(error)}",
            where=_where(file),
        ) from None
    if left := sorted(tensor.name for tensor in reader.tensors if tensor.name not in taken):
        more = f", … and {len(left) - NAMED:,} more" if len(left) > NAMED else ""
        raise UserError(
            f"holds {len(left):,} tensors that {type(shell).__name__} of transformers leaves out "
            f"({', '.join(left[:NAMED])}{more})",
            where=_where(file),
            fix="take the model's safetensors version",
        )


# The tokenizer -----------------------------------------------------------------------------------


def _tokenizer(file: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes, with its chat template.

    Raises:
        UserError: it cannot be built, or splits text in a way that transformers does not know.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = str(_value(reader, "tokenizer.ggml.pre", "default"))
    bytewise = _value(reader, "tokenizer.ggml.model") == "gpt2"
    if bytewise and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *DIGITS, *GPT2}:
        raise UserError(
            f"splits text in a way (tokenizer.ggml.pre = {split[:60]!r}) that is not known here",
            where=_where(file),
            fix="take the model's safetensors version, or a newer GGUF file",
        )
    spaced = _value(reader, "tokenizer.ggml.add_space_prefix", True)
    if _value(reader, "tokenizer.ggml.model") == "llama" and not spaced and not _is_gemma(reader):
        raise UserError(
            "puts no space before a text (tokenizer.ggml.add_space_prefix = False), which "
            "transformers does not read",
            where=_where(file),
            fix="take the model's safetensors version",
        )
    try:
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        core = json.loads(read.backend_tokenizer.to_str())
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(
            f"its tokenizer cannot be built: {first_line(error)}", where=_where(file)
        ) from None
    size = len(_value(reader, "tokenizer.ggml.tokens"))
    # transformers adds the special tokens of the tokenizer that it takes (GPT-2's, for example)
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < size]
    if bytewise:
        core["model"]["ignore_merges"] = split in WHOLE
        _add_marks(reader, core)
    if bytewise and split in DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        core["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, core["pre_tokenizer"]],
        }
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "chat_template")
    given = {name: read.init_kwargs[name] for name in kept if name in read.init_kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **given)


def _is_gemma(reader: GGUFReader) -> bool:
    """Whether the tokenizer is Gemma's, which puts no space before a text anyway."""
    return str(_value(reader, "general.architecture")).startswith("gemma")


def _add_marks(reader: GGUFReader, core: dict[str, Any]) -> None:
    """Add the marks that transformers leaves out, such as "<｜User｜>", at their places.

    It takes a control token with other letters than those that stand for bytes for a mistake, and
    its text for one to be spelt in bytes.
    """
    added, vocabulary = core["added_tokens"], core["model"]["vocab"]
    texts = {place: text for text, place in vocabulary.items()}
    missing = texts.keys() - {token["id"] for token in added}
    marks = _value(reader, "tokenizer.ggml.tokens")
    for place, kind in enumerate(_value(reader, "tokenizer.ggml.token_type", [])):
        if kind == CONTROL and place in missing:
            text = marks[place]
            del vocabulary[texts[place]]
            vocabulary[text] = place
            apart = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": place, "content": text, "special": True, **apart})
    added.sort(key=lambda token: token["id"])


# Room --------------------------------------------------------------------------------------------


def _check_room(file: Path, folder: Path, size: int, needed: int) -> None:
    """Check that disk and memory hold the dequantised weights (`size` and `needed` bytes).

    Raises:
        UserError: they do not.
    """
    import psutil

    for what, place, have, wanted in (
        ("disk", folder, shutil.disk_usage(folder).free, size),
        ("memory", "this machine", psutil.virtual_memory().available, needed),
    ):
        if have < wanted:
            raise UserError(
                f"its dequantised weights need {wanted / 2**30:.1f} GiB of {what}, "
                f"and {have / 2**30:.1f} GiB are free",
                where=f"{_where(file)}, {place}",
            )


if __name__ == "__main__":
    main()
