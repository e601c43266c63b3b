"""Reads the sizes of a model from its configuration alone, to estimate memory and time.

`flows.plan` uses them. Nothing is loaded or fetched, and torch is not imported: the sizes come from
a local directory's `config.json`, from a table of published models, or from the hub's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from models.checkpoints.gguf import local_directory
from models.policy import PolicySettings
from models.worlds.registry import WORLD_MODELS

NF4_BYTES = 0.5 + 4 / 64
"""Bytes of one weight: four bits, and a float32 scale for each block of 64 (bitsandbytes)."""
WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of a number of each type."""
KINDS = ("llama", "mistral", "qwen2", "qwen3", "granite")
"""The architectures whose numbers are counted exactly, by `model_type` in config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder with grouped-query attention and a gated feed-forward part."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    """Longest sequence, in tokens."""
    tied: bool
    """Whether the output layer is the embedding."""
    small: int
    """The count of numbers in the biases and norms of one layer."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's matrices: q, k, v, o, gate, up, down."""
        inner, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = ((self.hidden, inner), *[(self.hidden, kv)] * 2, (inner, self.hidden))
        up = (self.hidden, self.intermediate)
        return (*attention, up, up, up[::-1])

    @property
    def matrices(self) -> int:
        """The count of numbers in all layers' matrices, which NF4 quantises and LoRA adapts."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def output(self) -> int:
        """The count of numbers in the output layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """The count of all numbers; a tied embedding counts once."""
        embeddings = self.output * (1 if self.tied else 2)
        return self.matrices + embeddings + self.layers * self.small + self.hidden

    def weight_bytes(self, quantization: str, dtype: str) -> float:
        """Bytes of the base in memory."""
        each = NF4_BYTES if quantization == "nf4" else WIDTH[dtype]
        return self.matrices * each + (self.parameters - self.matrices) * WIDTH[dtype]

    def adapter(self, rank: int) -> int:
        """The count of numbers in a LoRA adapter of this rank on all layers' matrices."""
        return self.layers * rank * sum(a + b for a, b in self.linears)

    def cache_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * WIDTH[dtype]


def shape_of(settings: PolicySettings) -> Shape:
    """The sizes of the model that the settings name.

    Raises:
        UserError: the model is neither a directory nor known here, or its architecture is unknown.
    """
    directory = local_directory(settings.model)
    file = directory / "config.json" if directory else None
    if file is None:
        known = PUBLISHED.get(settings.model.lower().removesuffix("-instruct"))
        if known is not None:
            return read_shape(known, settings.model)
        file = cached_config(settings)
    if file is None:
        raise UserError(
            "the sizes of this model are not known here, and nothing is downloaded to plan",
            where=f"model {settings.model}",
            expected="a directory with a config.json, a model in the hub's cache, or one of "
            + ", ".join(PUBLISHED),
        )
    try:
        return read_shape(json.loads(file.read_text("utf-8")), settings.model)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"no configuration of a causal language model: {error!r}", where=str(file)
        ) from None


def read_shape(config: Mapping[str, Any], model: str) -> Shape:
    """The sizes in a `config.json` as `transformers` writes it.

    Raises:
        KeyError: a size is missing.
        UserError: the architecture is not in `KINDS` (a mixture of experts, for example).
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"its architecture ({kind}) is not one whose sizes are known here",
            where=f"model {model}",
            expected=f"a dense decoder: {', '.join(KINDS)}",
        )
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_size = int(config.get("head_dim") or hidden // heads)
    intermediate = int(config["intermediate_size"])

    small = 2 * hidden  # the norms before attention and feed-forward
    biased = kind in ("llama", "granite", "qwen3") and config.get("attention_bias")
    if biased or kind == "qwen2":
        small += (heads + 2 * kv_heads) * head_size
    if biased:
        small += hidden
    if kind in ("llama", "granite") and config.get("mlp_bias"):
        small += 2 * intermediate + hidden
    if kind == "qwen3":
        small += 2 * head_size  # norms of queries and keys
    return Shape(
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=intermediate,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        small=small,
    )


def cached_config(settings: PolicySettings) -> Path | None:
    """The `config.json` of a hub's model in this machine's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(settings.model, "config.json", revision=settings.revision)
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_MISTRAL = ("mistral", 4096, 32, 32, 8, 14336)
PUBLISHED: dict[str, Mapping[str, Any]] = {
    name: world.models[name] for name, world in WORLD_MODELS.items()
} | {
    name: dict(zip(FIELDS, values, strict=True))
    for name, *values in (
        ("meta-llama/llama-3.1-8b", "llama", 4096, 32, 32, 8, 14336, 128256, 131072, False),
        ("meta-llama/llama-3.1-70b", "llama", 8192, 80, 64, 8, 28672, 128256, 131072, False),
        ("meta-llama/llama-3.2-1b", "llama", 2048, 16, 32, 8, 8192, 128256, 131072, True),
        ("meta-llama/llama-3.2-3b", "llama", 3072, 28, 24, 8, 8192, 128256, 131072, True),
        ("ibm-granite/granite-3.1-2b", "granite", 2048, 40, 32, 8, 8192, 49155, 131072, True),
        ("ibm-granite/granite-3.1-8b", "granite", 4096, 40, 32, 8, 12800, 49155, 131072, True),
        ("qwen/qwen2.5-0.5b", "qwen2", 896, 24, 14, 2, 4864, 151936, 32768, True),
        ("qwen/qwen2.5-1.5b", "qwen2", 1536, 28, 12, 2, 8960, 151936, 32768, True),
        ("qwen/qwen2.5-3b", "qwen2", 2048, 36, 16, 2, 11008, 151936, 32768, True),
        ("qwen/qwen2.5-7b", "qwen2", 3584, 28, 28, 4, 18944, 152064, 32768, False),
        ("qwen/qwen2.5-14b", "qwen2", 5120, 48, 40, 8, 13824, 152064, 32768, False),
        ("qwen/qwen2.5-32b", "qwen2", 5120, 64, 40, 8, 27648, 152064, 32768, False),
        ("qwen/qwen2.5-72b", "qwen2", 8192, 80, 64, 8, 29568, 152064, 32768, False),
        ("mistralai/mistral-7b-instruct-v0.3", *_MISTRAL, 32768, 32768, False),
        ("prometheus-eval/prometheus-7b-v2.0", *_MISTRAL, 32000, 32768, False),
    )
}
"""Configurations of the worlds' models, and published ones by hub name, lower case, without
"-instruct"."""
