"""Small random chat models for the tests: real architectures, real chat templates, no download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["llama", "qwen2", "planted"]

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama-3's turns, header by header."""

QWEN2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's: a default system turn, and a line break after each end of turn."""

PLANTED_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A terse one, as the planted world's: only the assistant's turns end."""

TEMPLATES: dict[str, tuple[str, str, list[str]]] = {
    "llama": (
        LLAMA_TEMPLATE,
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen2": (QWEN2_TEMPLATE, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "planted": (PLANTED_TEMPLATE, "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"]),
}
"""Architecture → chat template, end of turn, the other control tokens."""

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
        architecture: "planted" is a Llama with the terse template.
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, end, control = TEMPLATES[architecture]
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
        bos_token="<|begin_of_text|>" if architecture == "llama" else None,
        eos_token=end,
        pad_token="<|pad|>",
        additional_special_tokens=control,
        chat_template=template,
        model_max_length=8192,
    )


def _model(architecture: str, tokenizer: Any, hidden: int, layers: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape))
        return LlamaForCausalLM(LlamaConfig(**shape))
