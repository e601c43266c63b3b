"""A random Llama of any size with a tokenizer of whole words, made here: what benchmarks run on.

The weights say nothing, and cost what trained ones cost.
"""

from __future__ import annotations

import random
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
CONTROL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def random_llama(
    directory: Path, *, vocabulary: int = 4096, hidden: int = 384, layers: int = 8, seed: int = 0
) -> Path:
    """Write a random Llama (15M parameters by default) with its tokenizer.

    Args:
        directory: created when missing; a `transformers` model directory.
        vocabulary: tokens; all but the control tokens are words of their own.
        hidden: model width, a multiple of 64 (NF4 quantises blocks of 64 weights).
        layers: number of decoder layers.
        seed: of the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _write_tokenizer(directory, vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def random_text(tokens: int, draw: random.Random, vocabulary: int = 4096) -> str:
    """Words of `random_llama`'s vocabulary, as many as tokens, frequent ones first (Zipf)."""
    words = vocabulary - len(CONTROL)
    return " ".join(f"w{int(draw.paretovariate(0.8)) % words}" for _ in range(tokens))


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*CONTROL, *(f"w{i}" for i in range(vocabulary - len(CONTROL)))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="w0",
        additional_special_tokens=CONTROL[2:],
        chat_template=TEMPLATE,
        model_max_length=8192,
    ).save_pretrained(directory)
