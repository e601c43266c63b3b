"""GGUF files of the tests' small chat models, written as llama.cpp's converters write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def write_gguf(
    model: Path,
    file: Path,
    *,
    kind: str = "F32",
    architecture: str = "",
    leave_out: str = "",
    more: Mapping[str, Any] | None = None,
    edit: Callable[[Tensors], object] = lambda tensors: None,
) -> Path:
    """Write a Llama or Qwen2 that `build_chat_model` made as a GGUF file.

    Args:
        kind: the type of the matrices, as GGUF names it ("F32", "Q8_0", …).
        architecture: what the file says that it holds; by default, what it does hold.
        leave_out: a name in the header that is not written.
        more: further names in the header; a name that is there already gets another value.
        edit: changes the tensors, by GGUF's names, before they are quantised.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    architecture = architecture or config["model_type"]
    header = {**_sizes(config, architecture), **_tokenizer(model), **(more or {})}
    header.pop(leave_out, None)
    tensors = _tensors(model, config)
    edit(tensors)
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in header.items():
        _add(writer, name, value)
    for name, tensor in tensors.items():
        plain = tensor.ndim < 2 or tensor.dtype != np.float32
        quantised = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType[kind]
        data = tensor if plain else gguf.quantize(tensor, quantised)
        writer.add_tensor(name, data, raw_dtype=quantised if tensor.dtype == np.float32 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _sizes(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
    }
    return {f"{architecture}.{name}": value for name, value in found.items()}


def _tokenizer(model: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    control = {token.content for token in tokenizer.added_tokens_decoder.values()}
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [token for token, _ in ids],
        "token_type": [3 if token in control else 1 for token, _ in ids],
        "merges": [" ".join(pair) for pair in core["model"]["merges"]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": False,
    }
    header = {f"tokenizer.ggml.{k}": value for k, value in found.items() if value is not None}
    return header | {"tokenizer.chat_template": tokenizer.chat_template}


def _tensors(model: Path, config: Mapping[str, Any]) -> Tensors:
    import gguf
    from safetensors.numpy import load_file

    kind = getattr(gguf.MODEL_ARCH, config["model_type"].upper())
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    found = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if config["model_type"] == "llama" and "q_proj" in name:
            tensor = _permuted(tensor, config["num_attention_heads"])
        elif config["model_type"] == "llama" and "k_proj" in name:
            tensor = _permuted(tensor, config["num_key_value_heads"])
        found[str(names.get_name(name, (".weight", ".bias")))] = tensor
    return found


def _permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a head's two halves in turn, as llama.cpp rotates them."""
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))


def _add(writer: Any, name: str, value: Any) -> None:
    if name == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
