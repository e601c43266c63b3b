"""Generation: our engine beside transformers' `generate`, the same model, prompts and samples.

N = 16 samples of 64 tokens from prompts of 200 tokens, a 15.7M-parameter Llama with random weights
(no token ends a sample: all sides make the same number), float32, all cores.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import Result, interleaved
from models.engine.base import Sample
from models.engine.decoding import Decoder
from models.policy import Request

PROMPTS, LENGTH, SAMPLES, NEW = 16, 200, 16, 64
BATCH_ROWS = 64
"""Of the peer that batches: of 16, 32, 64, 128 and 256 its best, give or take noise."""
ROUNDS = 3
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def generation_vs_sequential() -> Result:
    """Beside `generate(num_return_sequences=16)`, one prompt after the other."""
    return _beside(lambda model, prompts: _sequential(model, prompts), "one prompt at a time")


def generation_vs_batched() -> Result:
    """Beside `generate` on batches of the same rows, each with its own copy of the prompt."""
    return _beside(lambda model, prompts: _batched(model, prompts), f"{BATCH_ROWS} rows a batch")


Peer = Callable[[Any, Sequence[Sequence[int]]], object]


def _beside(peer: Peer, how: str) -> Result:
    model, prompts = random_llama(**SHAPE), _prompts()
    decoder = Decoder(random_llama(**SHAPE))  # it replaces its model's attention
    done: list[Sample] = []

    def ours() -> None:
        done.clear()
        decoder.prompt_tokens = 0
        decoder.sample(prompts, _requests(), done.append)

    seconds = interleaved({"peer": lambda: peer(model, prompts), "ours": ours}, ROUNDS)
    new = PROMPTS * SAMPLES * NEW
    if sum(len(sample.tokens) for sample in done) != new:
        raise AssertionError("the engine made another number of tokens")
    if decoder.prompt_tokens != PROMPTS * LENGTH:
        raise AssertionError(f"{decoder.prompt_tokens} prompt tokens: not each prompt once")
    return Result(
        ratio=seconds["peer"] / seconds["ours"],
        ours=new / seconds["ours"],
        peer=new / seconds["peer"],
        unit="new tokens/s",
        details={
            "peer_package": f"transformers generate, {how}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "prompts": PROMPTS,
            "prompt_tokens": LENGTH,
            "samples": SAMPLES,
            "new_tokens": NEW,
            "prefilled_tokens": decoder.prompt_tokens,
            "threads": torch.get_num_threads(),
        },
    )


def random_llama(**shape: Any) -> Any:
    """A Llama with random weights that always are the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def _prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [draw.choices(range(3, SHAPE["vocab_size"]), k=LENGTH) for _ in range(PROMPTS)]


def _requests() -> list[Request]:
    return [Request(messages="", key=str(i), n=SAMPLES, max_tokens=NEW) for i in range(PROMPTS)]


@torch.inference_mode()
def _sequential(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        _generate(model, [prompt], num_return_sequences=SAMPLES)


@torch.inference_mode()
def _batched(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    each = BATCH_ROWS // SAMPLES
    for start in range(0, len(prompts), each):
        rows = [p for p in prompts[start : start + each] for _ in range(SAMPLES)]
        _generate(model, rows)


def _generate(model: Any, rows: Sequence[Sequence[int]], **how: Any) -> None:
    ids = torch.tensor(rows)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        pad_token_id=0,
        **how,
    )
    if made.shape[1] != LENGTH + NEW:
        raise AssertionError("generate made another number of tokens")
