"""Compares an engine's numbers with those of a plain forward pass of transformers.

A few random texts go through both. `models/engine/exact.py` calls `difference` for each engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.engine.base import Engine, Sample
from models.engine.by_length import ByLength, Way, length_limit, make_engine
from models.engine.decoding import Decoder
from models.engine.output_layer import last_states
from models.policy import Request

EXACT = 1e-3
"""Largest difference of a token's log-probability in float32, in nats."""
ROUNDED = 0.1
"""Largest mean difference in 16 bits and in NF4, in nats: a single unlikely token, or one that goes
to another expert, may differ by more. On SmolLM2-135M in bfloat16 rounding makes 0.049, and one
layer of 30 that does not see the shared beginning makes 0.20."""
SHARED, TAILS, APART, NEW = 20, (1, 6, 12), 5, 6
"""Numbers of tokens: of the shared beginning, of what follows it, of the text that shares nothing,
and of each greedy continuation."""
BEYOND = 8
"""Tokens beyond a window, or beyond another length at which attention changes."""
AFFORDABLE = {"cpu": 3e10, "cuda": 2e13}
"""Most weights x tokens that a check spends on texts longer than the attention window."""
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size")
"""Settings of a model that name a length beyond which its attention changes."""


@dataclass(frozen=True, slots=True)
class _Numbers:
    """An engine's numbers for a text, whose last `new` tokens the engine chose greedily."""

    text: tuple[int, ...]
    new: int
    total: float
    """Sum of the greedy tokens' log-probabilities."""
    steps: Sequence[float]
    """The log-probabilities of the tokens in the text's second half, given the first."""
    state: np.ndarray


@torch.inference_mode()
def difference(model: Any, way: Way, special: Collection[int]) -> str:
    """How the engine's numbers differ from a plain forward pass, in words; "" where they agree.

    Raises:
        UserError: the engine cannot be made for the model, or has no memory for a single sample.
    """
    given = model.config._attn_implementation
    prompts, engine = _texts(model, special), make_engine(model, way)
    numbers = _numbers(engine, prompts)
    fast = engine.short if isinstance(engine, ByLength) else engine
    if isinstance(fast, Decoder) and (wrong := _wrong_beyond(model, fast, prompts)):
        return wrong
    model.set_attn_implementation(given)
    apart = torch.cat([_apart(model, one) for one in numbers] or [torch.zeros(1)])
    rounded = model.dtype != torch.float32 or in_few_bits(model)
    found, allowed = (apart.mean(), ROUNDED) if rounded else (apart.max(), EXACT)
    return "" if found <= allowed else f"its log-probabilities differ by {float(found):.2g} nats"


def _numbers(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[_Numbers]:
    """The engine's numbers for some prompts; none where logits are not finite, because sampling
    reports those."""
    requests = [
        Request(messages="", key=str(i), n=2, temperature=0, max_tokens=NEW - i % 2)
        for i in range(len(prompts))
    ]
    samples: list[Sample] = []
    engine.sample(prompts, requests, samples.append)
    if any(sample.finish == "invalid" for sample in samples):
        return []
    texts = {(*prompts[sample.request], *sample.tokens): sample for sample in samples}
    steps = engine.score([(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts])
    states = engine.states(list(texts))
    return [
        _Numbers(text, len(sample.tokens), sample.logprob, some, state)
        for (text, sample), some, state in zip(texts.items(), steps, states, strict=True)
    ]


def _apart(model: Any, own: _Numbers) -> torch.Tensor:
    """Differences from transformers' numbers, as one vector: of each scored token; of each greedy
    token from the likeliest one; of the greedy tokens on average; of the hidden states, relative
    to the largest."""
    logprobs, hidden = _alone(model, own.text)
    chosen = logprobs.gather(-1, torch.tensor(own.text[1:], device=logprobs.device)[:, None])[:, 0]
    likeliest = logprobs[-own.new :].max(-1).values
    scored = torch.tensor(own.steps, device=chosen.device) - chosen[-len(own.steps) :]
    total = (own.total - chosen[-own.new :].sum()) / own.new
    state = torch.tensor(own.state, device=hidden.device) - hidden
    farthest = state.abs().max() / hidden.abs().max().clamp(min=1.0)
    greedy = likeliest - chosen[-own.new :]
    return torch.cat([scored.abs(), greedy, total.abs()[None], farthest[None]]).cpu()


def _alone(model: Any, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A text's numbers by transformers: the log-probabilities after each token but the last,
    (tokens - 1, vocabulary), and the mean of the last hidden states, (hidden,)."""
    ids = torch.tensor([text], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    states = last_states(model, ids)
    return logits[0, :-1].float().log_softmax(-1), states[0].float().mean(0)


def _texts(model: Any, special: Collection[int]) -> list[tuple[int, ...]]:
    """Random prompts: some of unequal lengths share their beginning, one shares nothing; two more
    exceed the model's attention window where `AFFORDABLE` allows it."""
    limit = length_limit(model) or 1 << 30
    most = max(TAILS) + SHARED + NEW
    fits = min(1.0, limit / most)  # longer texts go to the plain engine anyway
    begin = _random(model, max(2, int(SHARED * fits)), special, 0)
    tails = [max(1, int(tail * fits)) for tail in TAILS]
    texts = [(*begin, *_random(model, tail, special, 1 + i)) for i, tail in enumerate(tails)]
    texts.append(_random(model, max(1, int(APART * fits)), special, 9))
    window = max(_lengths(model).values(), default=0)
    long = window + BEYOND + NEW
    if (
        len(begin) < window
        and long <= limit
        and model.num_parameters() * 2 * long <= AFFORDABLE.get(model.device.type, 0)
    ):
        far = _random(model, window + 2, special, 10)
        texts += [(*far, *_random(model, BEYOND - 2 * i, special, 11 + i)) for i in range(2)]
    return texts


def _random(model: Any, tokens: int, special: Collection[int], seed: int) -> tuple[int, ...]:
    draw = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(model.config.get_text_config().vocab_size), list(special))
    return tuple(draw.choice(allowed, size=tokens).tolist())


def _lengths(model: Any) -> dict[str, int]:
    """The lengths beyond which the model's attention changes, by the name of their setting."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return {}
    values = {name: getattr(config, name, None) for name in LIMITS}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _wrong_beyond(model: Any, engine: Decoder, prompts: Sequence[Sequence[int]]) -> str:
    """Why the fast engine is wrong for texts longer than the prompts; "" where it is not."""
    tried = max(map(len, prompts))
    far = {name: value for name, value in _lengths(model).items() if value >= tried}
    for name, value in far.items():
        if name != "sliding_window":
            return f"its attention changes beyond {value:,} tokens ({name})"
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        for layer, window in engine.windows.items():
            if (kinds is None or kinds[layer] == "sliding_attention") and window != value:
                return f"layer {layer} does not pass its window of {value:,} tokens"
    return ""


def in_few_bits(model: Any) -> bool:
    """Whether the model's weights are quantised."""
    return bool(getattr(model, "is_quantized", False))
