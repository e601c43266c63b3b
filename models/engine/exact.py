"""Which engine samples from a model exactly: found by trying, once, and remembered.

A few random texts go through an engine and, one by one, through a plain forward pass of
transformers: an engine whose numbers differ is not used. `models/engine/local.py` asks when it
loads one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from constitutions.errors import UserError
from models.engine.base import Engine, Sample, is_out_of_memory
from models.engine.by_length import ByLength, length_limit
from models.engine.decoding import Decoder
from models.engine.output_layer import last_states
from models.engine.plain import Plain, bare_of_adapter
from models.notices import say
from models.policy import Request

Choice = Literal["auto", "shared", "plain"]
Way = Literal["shared", "padded", "equal", "single", "recomputed"]
"""The fast engine, or how the plain one batches."""
WAYS: dict[Choice, tuple[Way, ...]] = {
    "auto": ("shared", "padded", "equal", "single", "recomputed"),
    "shared": ("shared",),
    "plain": ("padded", "equal", "single", "recomputed"),
}
COST: dict[Way, str] = {
    "shared": "",
    "padded": "about 3 times slower",
    "equal": "about 4 times slower (only prompts of equal length go together)",
    "single": "many times slower (one sample at a time)",
    "recomputed": "many times slower (every token is computed anew at each step)",
}
EXACT = 1e-3
"""Largest difference of a token's log-probability in float32, in nats."""
ROUNDED = 0.1
"""Mean difference in 16 bits and in NF4: a single unlikely token, or flipped expert, may differ by
more. On SmolLM2-135M in bfloat16 rounding makes 0.049, and one layer of 30 that does not see the
shared beginning 0.20."""
SHARED, TAILS, APART, NEW = 20, (1, 6, 12), 5, 6
"""Tokens of the texts: what some begin with, how these go on, a text apart; of a continuation."""
BEYOND = 8
"""So many tokens beyond a window, or whatever else of attention depends on the length."""
AFFORDABLE = {"cpu": 3e10, "cuda": 2e13}
"""Weights x tokens, for texts that are longer than a window."""
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size")
"""Settings beyond which attention changes."""

_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The fastest engine that is exact, and why faster ones are not."""

    way: Way
    why: str = ""


def open_engine(
    model: PreTrainedModel,
    stop: Collection[int],
    rows: int | None,
    spell: Callable[[Sequence[int]], str],
    *,
    choice: Choice = "auto",
    special: Collection[int] = (),
    digest: str | None = None,
) -> Engine:
    """The fastest engine that samples from the model exactly, of those that `choice` allows.

    Args:
        special: token ids that the tried texts must not have.
        digest: tells the model's files apart; without it what was found is not remembered.

    Raises:
        UserError: there is none.
    """
    verdict = _verdict(model, choice, special, digest)
    if verdict.why and choice == "auto":
        _tell(model, verdict)
    engine = _engine(model, verdict.way)
    engine.stop, engine.rows, engine.spell = frozenset(stop), rows, spell
    return engine


def _tell(model: PreTrainedModel, verdict: EngineChoice) -> None:
    line = (
        f"{_name(model)}: samples come from transformers' own generate, {COST[verdict.way]}, "
        f"because with the fast engine {verdict.why}"
    )
    if line not in _told:
        _told.add(line)
        say(line)


def _engine(model: PreTrainedModel, way: Way) -> Engine:
    """An engine without stop tokens."""
    limit = length_limit(model)
    if way != "shared":
        return Plain(model, (), None, _spelt, way)
    engine = Decoder(model, (), None, _spelt)
    if limit is None:
        return engine
    engine.longest = limit
    return ByLength(engine, Plain(model, (), None, _spelt, "equal"), limit)


def _spelt(tokens: Sequence[int]) -> str:
    return ""


def _name(model: Any) -> str:
    return type(bare_of_adapter(model)).__name__


# The check -----------------------------------------------------------------------------------


def find(model: PreTrainedModel, choice: Choice, special: Collection[int] = ()) -> EngineChoice:
    """Try the engines, the fastest first. The model's attention is as it was, afterwards.

    Raises:
        UserError: none of them gives the numbers of a plain forward pass.
    """
    given = model.config._attn_implementation
    by_length = length_limit(model) is not None
    failed: list[str] = []
    for way in (w for w in WAYS[choice] if not (by_length and w == "padded")):
        try:
            wrong = _difference(model, way, special)
        except UserError as error:
            if is_out_of_memory(error.__context__):
                raise
            wrong = error.what.replace(f"{_name(model)} ", "it ")
        except Exception as error:
            if is_out_of_memory(error):
                raise
            wrong = f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"
        finally:
            model.set_attn_implementation(given)
        if not wrong:
            return EngineChoice(way, failed[0] if failed else "")
        failed.append(wrong)
    raise UserError(
        f"{_name(model)} is not generated from exactly: {failed[-1]}",
        where=f"policy.engine = {choice}",
        expected="the numbers of a plain forward pass of transformers",
        fix="leave policy.engine at auto"
        if choice == "shared"
        else "serve it behind an OpenAI-compatible endpoint",
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What an engine says of a text: its own greedy tokens are the last ones."""

    text: tuple[int, ...]
    new: int
    total: float
    """Of the greedy tokens' log-probabilities."""
    steps: Sequence[float]
    """The log-probabilities of the text's second half, scored."""
    state: np.ndarray


@torch.inference_mode()
def _difference(model: Any, way: Way, special: Collection[int]) -> str:
    """What an engine does otherwise than a plain forward pass; nothing: an empty text."""
    given = model.config._attn_implementation
    prompts, engine = _texts(model, special), _engine(model, way)
    said = _said(engine, prompts)
    fast = engine.short if isinstance(engine, ByLength) else engine
    if isinstance(fast, Decoder) and (untold := _untold(model, fast, prompts)):
        return untold
    model.set_attn_implementation(given)
    apart = torch.cat([_apart(model, one) for one in said] or [torch.zeros(1)])
    rounded = model.dtype != torch.float32 or _in_few_bits(model)
    found, allowed = (apart.mean(), ROUNDED) if rounded else (apart.max(), EXACT)
    return "" if found <= allowed else f"its log-probabilities differ by {float(found):.2g} nats"


def _said(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[_Said]:
    """Empty where the weights are such that there are no right numbers: whoever asks for samples
    is told."""
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
        _Said(text, len(sample.tokens), sample.logprob, some, state)
        for (text, sample), some, state in zip(texts.items(), steps, states, strict=True)
    ]


def _apart(model: Any, said: _Said) -> torch.Tensor:
    """How far it is from what transformers says: of each scored token, of each greedy token from
    the likeliest, of a greedy token on average, and of the hidden states."""
    logprobs, hidden = _alone(model, said.text)
    chosen = logprobs.gather(-1, torch.tensor(said.text[1:], device=logprobs.device)[:, None])[:, 0]
    likeliest = logprobs[-said.new :].max(-1).values
    scored = torch.tensor(said.steps, device=chosen.device) - chosen[-len(said.steps) :]
    total = (said.total - chosen[-said.new :].sum()) / said.new
    state = torch.tensor(said.state, device=hidden.device) - hidden
    farthest = state.abs().max() / hidden.abs().max().clamp(min=1.0)
    greedy = likeliest - chosen[-said.new :]
    return torch.cat([scored.abs(), greedy, total.abs()[None], farthest[None]]).cpu()


def _alone(model: Any, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers says of one text: log-probabilities after each token but the last, and the
    mean of the last hidden states."""
    ids = torch.tensor([text], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    states = last_states(model, ids)
    return logits[0, :-1].float().log_softmax(-1), states[0].float().mean(0)


def _texts(model: Any, special: Collection[int]) -> list[tuple[int, ...]]:
    """Random prompts: some begin alike and go on at unequal length, one stands apart; where that
    is affordable, two are longer than the model's window."""
    limit = length_limit(model) or 1 << 30
    most = max(TAILS) + SHARED + NEW
    fits = min(1.0, limit / most)  # beyond the limit an engine has no say
    begin = _random(model, max(2, int(SHARED * fits)), special, 0)
    tails = [max(1, int(tail * fits)) for tail in TAILS]
    texts = [(*begin, *_random(model, tail, special, 1 + i)) for i, tail in enumerate(tails)]
    texts.append(_random(model, max(1, int(APART * fits)), special, 9))
    window = max(_reaches(model).values(), default=0)
    long = window + BEYOND + NEW
    if len(begin) < window and long <= limit and _affordable(model, 2 * long):
        far = _random(model, window + 2, special, 10)
        texts += [(*far, *_random(model, BEYOND - 2 * i, special, 11 + i)) for i in range(2)]
    return texts


def _random(model: Any, tokens: int, special: Collection[int], seed: int) -> tuple[int, ...]:
    draw = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(model.config.get_text_config().vocab_size), list(special))
    return tuple(draw.choice(allowed, size=tokens).tolist())


def _reaches(model: Any) -> dict[str, int]:
    """The settings beyond which attention changes, and their values."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return {}
    values = {name: getattr(config, name, None) for name in LIMITS}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _affordable(model: Any, tokens: int) -> bool:
    return model.num_parameters() * tokens <= AFFORDABLE.get(model.device.type, 0)


def _untold(model: Any, engine: Decoder, prompts: Sequence[Sequence[int]]) -> str:
    """What the fast engine would do wrong beyond the length of the prompts; else an empty text."""
    tried = max(map(len, prompts))
    far = {name: value for name, value in _reaches(model).items() if value >= tried}
    for name, value in far.items():
        if name != "sliding_window":
            return f"its attention changes beyond {value:,} tokens ({name})"
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        for layer, told in engine.windows.items():
            if (kinds is None or kinds[layer] == "sliding_attention") and told != value:
                return f"layer {layer} does not tell its window of {value:,} tokens"
    return ""


def _in_few_bits(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))


# What was found is remembered ----------------------------------------------------------------


def _verdict(
    model: PreTrainedModel, choice: Choice, special: Collection[int], digest: str | None
) -> EngineChoice:
    """`find`, once for each model, way of holding it, and version of what computes.

    An adapter's values make no difference: whether there is one changes the way to the layers.
    """
    if digest is None:
        return find(model, choice, special)
    facts = [digest, choice, model.dtype, model.device.type, _in_few_bits(model),
             hasattr(model, "peft_config"), _version()]  # fmt: skip
    key, file = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest(), _memory()
    if (known := _read(file).get(key)) is not None:
        return known
    verdict = find(model, choice, special)
    _write(file, {**_read(file), key: verdict})
    return verdict


def _version() -> str:
    """Of the engines and of what they call."""
    import peft
    import transformers

    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    code = hashlib.sha256(b"\0".join(sources)).hexdigest()
    return f"{code} {torch.__version__} {transformers.__version__} {peft.__version__}"


def _memory() -> Path:
    return Path(os.environ.get("STAPLE_HOME") or ".staple").absolute() / "engines.json"


def _read(file: Path) -> dict[str, EngineChoice]:
    """What is known; a damaged file says nothing, and is written anew."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        found: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
        return {
            key: EngineChoice(cast(Way, way), str(why))
            for key, (way, why) in found.items()
            if way in WAYS["auto"]
        }
    return {}


def _write(file: Path, known: Mapping[str, EngineChoice]) -> None:
    """Whole or not at all. A folder that cannot be written to costs another check, no more."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch.write_text(json.dumps({k: [v.way, v.why] for k, v in known.items()}))
        scratch.replace(file)
