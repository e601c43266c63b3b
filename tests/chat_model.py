"""Small random chat models for the tests: real architectures, real chat templates, no download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["llama", "llama3", "qwen2", "granite", "gemma2", "mistral", "planted"]

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""As Llama 3 writes turns, header by header."""

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system, messages = messages[0]['content'] | trim, messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: ' + date + '\n\n' + system + '<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""As Llama 3.1 and 3.2: after a system turn that names the date."""

QWEN2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2.5: a default system turn, and a line break after each end of turn."""

GRANITE_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\n"
    "Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM. "
    "You are a helpful AI assistant.<|end_of_text|>\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
"""As Granite 3.1: a default system turn that names the date."""

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""As Gemma 2: without a system role."""

PLANTED_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A terse one, as the planted world's: only the assistant's turns end."""

HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
TEMPLATES: dict[str, tuple[str, str, list[str]]] = {
    "llama": (LLAMA_TEMPLATE, "<|eot_id|>", HEADERS),
    "llama3": (LLAMA3_TEMPLATE, "<|eot_id|>", HEADERS),
    "granite": (GRANITE_TEMPLATE, "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"]),
    "gemma2": (GEMMA_TEMPLATE, "<end_of_turn>", ["<bos>", "<start_of_turn>"]),
    "mistral": (QWEN2_TEMPLATE, "<|im_end|>", ["<|im_start|>"]),
    "qwen2": (QWEN2_TEMPLATE, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "planted": (PLANTED_TEMPLATE, "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"]),
}
"""Architecture → chat template, end of turn, the other control tokens."""
BEGIN = {"llama": "<|begin_of_text|>", "llama3": "<|begin_of_text|>", "gemma2": "<bos>"}

TEXT = (
    "Write a short and honest answer. The reader wants to know what to do next, and why.",
    "Cite a source where a number is given; say so when you are not sure about it.",
    "Thank you for asking! Please restart the printer, wait a minute and try it again.",
    "What is the capital of France? How do I make bread at home without an oven?",
    "0 1 2 3 4 5 6 7 8 9 , . : ; ! ? ' \" ( ) - \n",
)
"""What the tokenizer is trained on unless told otherwise; any other text is spelt in bytes."""


def build_chat_model(
    directory: Path,
    architecture: Architecture,
    text: Iterable[str] = TEXT,
    *,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = 600,
    seed: int = 0,
) -> Path:
    """Write a random chat model and its byte-level BPE tokenizer as a `transformers` directory.

    Args:
        directory: created when missing.
        architecture: "llama3" and "planted" are Llamas with other templates; "mistral" has a window of 16
            tokens in every layer, "gemma2" in every second one, and caps its scores.
        text: trains the tokenizer.
        hidden: model width, a multiple of 64 (NF4 quantises blocks of 64 weights).
        layers: number of decoder layers.
        vocabulary: at most this many tokens.
        seed: of the random weights.
    """
    tokenizer = _tokenizer(architecture, text, vocabulary)
    tokenizer.save_pretrained(directory)
    _model(architecture, tokenizer, hidden, layers, seed).save_pretrained(directory)
    return directory


def _tokenizer(architecture: str, text: Iterable[str], vocabulary: int) -> Any:
    template, end, control = TEMPLATES[architecture]
    return build_tokenizer(
        template, end, control, bos=BEGIN.get(architecture), text=text, vocabulary=vocabulary
    )


def build_tokenizer(
    template: str | dict[str, str],
    end: str,
    control: Sequence[str],
    *,
    bos: str | None = None,
    text: Iterable[str] = TEXT,
    vocabulary: int = 600,
) -> Any:
    """A byte-level BPE tokenizer with a chat template; `end` is its eos, `control` is special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", end, *control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=end,
        pad_token="<|pad|>",
        additional_special_tokens=list(control),
        chat_template=template,
        model_max_length=8192,
    )


def _model(architecture: str, tokenizer: Any, hidden: int, layers: int, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # as wide as it takes to be sure of a token
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    special: dict[str, dict[str, Any]] = {
        "granite": {"attention_multiplier": 0.1, "logits_scaling": 2.0, "residual_multiplier": 0.7},
        "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        "mistral": {"sliding_window": 16},
    }
    kind = "llama" if architecture in ("llama3", "planted") else architecture
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **shape, **special.get(architecture, {}))
        return AutoModelForCausalLM.from_config(config)
