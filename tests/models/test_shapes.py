"""Sizes from a configuration alone equal those of the real modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_model import build_chat_model
from transformers import DynamicCache

from constitutions.errors import UserError
from models.checkpoints.shapes import PUBLISHED, Shape, read_shape, shape_of
from models.policy import PolicySettings
from models.prompts import TERSE_CONSTITUTION
from models.training.adapter import AdapterSettings
from models.training.bases import load_base
from models.training.updates import new_adapter
from models.worlds.registry import WORLD_MODELS

ODD: dict[str, Any] = {
    "vocab_size": 515,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 333,
}
"""Sizes that no two of are alike."""


def config(kind: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **ODD | changes)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 24}]
)
def test_parameters_are_those_of_the_real_architecture(
    kind: str, tied: bool, changes: dict[str, Any]
) -> None:
    made = config(kind, tie_word_embeddings=tied, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    shape = read_shape(made.to_dict(), "odd")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linears = [m for name, m in model.named_modules() if name.endswith("_proj")]
    assert shape.matrices == sum(m.weight.numel() for m in linears)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("ibm-granite/granite-3.1-8b-instruct", 8_170_848_256),
        ("ibm-granite/granite-3.1-2b-instruct", 2_533_531_648),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("prometheus-eval/prometheus-7b-v2.0", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
    ],
)
def test_published_models_have_their_published_size(model: str, parameters: int) -> None:
    assert shape_of(PolicySettings(model=model)).parameters == parameters


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name.startswith(("meta", "ibm", "qwen/qwen2.5-7b"))]
)
def test_published_configurations_build_what_they_say(name: str) -> None:
    """The real modules, without memory."""
    values = dict(PUBLISHED[name])
    with torch.device("meta"):
        made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert read_shape(PUBLISHED[name], name).parameters == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", WORLD_MODELS)
def test_a_planted_model_is_the_one_that_is_pretrained(name: str) -> None:
    from models.planted.pretrain import RECIPES, build_model, build_tokenizer

    words = TERSE_CONSTITUTION.said if RECIPES[name].constitutions else ""
    model = build_model(RECIPES[name], build_tokenizer(words), seed=0)
    shape = shape_of(PolicySettings(model=name))
    assert shape == read_shape(model.config.to_dict(), name)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "qwen2", hidden=128, layers=3)


@pytest.fixture(scope="module")
def shape(directory: Path) -> Shape:
    return shape_of(PolicySettings(model=str(directory)))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_take_the_bytes_that_they_take(
    directory: Path, shape: Shape, quantization: Any
) -> None:
    base, _ = load_base(directory, quantization=quantization, dtype="bfloat16", device="cpu")
    held = 0
    for parameter in base.parameters():
        held += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes
    assert shape.weight_bytes(quantization, "bfloat16") == held


def test_adapter_and_cache_are_the_real_ones(directory: Path, shape: Shape) -> None:
    base, _ = load_base(directory, quantization="none", dtype="float32", device="cpu")
    cache = DynamicCache(config=base.config)
    with torch.inference_mode():
        base(input_ids=torch.arange(2 * 7).reshape(2, 7), past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    real = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    assert 2 * 7 * shape.cache_bytes("float32") == real

    adapted = new_adapter(base, AdapterSettings(lora_rank=5), seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.adapter(5) == trained


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is downloaded to plan.*qwen/qwen2\.5-7b"):
        shape_of(PolicySettings(model="owner/unheard-of"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mixtral", "hidden_size": 8}))
    with pytest.raises(UserError, match=r"mixtral.*a dense decoder"):
        shape_of(PolicySettings(model=str(tmp_path)))
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(UserError, match=r"config\.json.*num_attention_heads"):
        shape_of(PolicySettings(model=str(tmp_path)))
    file.write_text("[]")
    with pytest.raises(UserError, match=r"no configuration of a causal language model"):
        shape_of(PolicySettings(model=str(tmp_path)))
