"""The plain engine: transformers' own `generate`, for every architecture that it runs.

It uses the noise of `models/engine/decoding.py`: in float32 both give the same samples. Every row
has its own copy of its prompt, and a batch lasts as long as its longest sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from models.engine.base import PASS_TOKENS, Decoding, Engine, Pairs, Sample, Tokens, WantedSamples
from models.engine.output_layer import output_only
from models.engine.sampling import choose, seed_of

Tensor = torch.Tensor
Batching = Literal["padded", "equal", "single", "recomputed"]
"""Which rows are computed together: any, those of equal length, or none; "recomputed": those of
equal length, without a cache, so that each step computes all tokens."""
PREFILLED = 4 * PASS_TOKENS
"""Most prompt tokens of one batch."""


class Plain(Engine):
    """The engine for every architecture.

    Args:
        batching: the way that `models/engine/exact.py` has found exact for this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoding: Decoding | None = None,
        batching: Batching = "padded",
    ) -> None:
        super().__init__(model, decoding)
        self.batching = batching
        self._ropes = length_dependent(model)

    def _make(self, work: WantedSamples) -> None:
        samples = [Sample(i, n) for i, some in enumerate(work.wanted) for n in sorted(some)]
        lengths = [len(work.prompts[sample.request]) for sample in samples]
        longest = max(len(work.prompts[s.request]) + work.requests[s.request].max_tokens
                      for s in samples)  # fmt: skip
        self.fitted = self.decoding.rows or self._fitting(longest)
        for part in self._parts(lengths, self.fitted, PREFILLED):
            self._generate([samples[i] for i in part], work)

    def _generate(self, samples: Sequence[Sample], work: WantedSamples) -> None:
        rows = [work.prompts[sample.request] for sample in samples]
        longest = max(map(len, rows))
        self.prompt_tokens += sum(map(len, rows))
        batch = _Batch(self, samples, work)
        tokens = [[0] * (longest - len(row)) + list(row) for row in rows]
        seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        how = GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in batch.requests),
            do_sample=False,
            pad_token_id=0,
            use_cache=self.batching != "recomputed",
        )
        self._begin_anew()
        with _nothing_of_its_own(bare_of_adapter(self.model)) as model:
            model.generate(
                input_ids=torch.tensor(tokens, device=self.model.device),
                attention_mask=torch.tensor(seen, device=self.model.device),
                generation_config=how,
                logits_processor=LogitsProcessorList([batch]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(batch)]),
            )

    def _scores(self, pairs: Pairs, tokens: int) -> Iterator[Mapping[int, list[float]]]:
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        for part in self._parts(lengths, len(pairs), tokens):
            yield dict(zip(part, self._score([pairs[i] for i in part]), strict=True))

    def _score(self, pairs: Pairs) -> list[list[float]]:
        self._begin_anew()
        tokens = self._padded([[*prompt, *response] for prompt, response in pairs])
        places = [range(len(p) - 1, len(p) + len(r) - 1) for p, r in pairs]
        with output_only(self.model, *self._places(places)):
            logits = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        return self._logprobs(logits, [response for _, response in pairs])

    def states(self, texts: Sequence[Tokens]) -> np.ndarray:
        """See `Engine.states`."""
        parts = list(self._parts([len(text) for text in texts], len(texts), 1 << 30))
        found = []
        for part in parts:
            self._begin_anew()
            found.append(super().states([texts[i] for i in part]))
        order = np.argsort([i for part in parts for i in part])
        return np.concatenate(found)[order]

    def _begin_anew(self) -> None:
        """Forget the longest text so far: dynamic RoPE would change the next one's numbers."""
        for rope, prefix, kind in self._ropes:
            if "dynamic" in kind:
                original = getattr(rope, f"{prefix}original_inv_freq")
                setattr(rope, f"{prefix}inv_freq", original.clone())
                setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)

    def _parts(self, lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
        """The rows (by number) that are computed together, the longest first: at most so many rows
        and so many tokens each time, padding included."""
        part: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            alike = self.batching == "padded" or (
                self.batching != "single" and part and lengths[part[0]] == lengths[i]
            )
            full = len(part) == rows or (len(part) + 1) * lengths[(part or [i])[0]] > tokens
            if part and (full or not alike):
                yield part
                part = []
            part.append(i)
        if part:
            yield part


class _Batch(LogitsProcessor):
    """The rows of one `generate`: it masks every token but the one that is sampled."""

    def __init__(self, engine: Plain, samples: Sequence[Sample], work: WantedSamples) -> None:
        self.engine, self.samples, self.work = engine, samples, work
        self.requests = [work.requests[sample.request] for sample in samples]
        self.step = 0
        keys = [seed_of(r.key, s.number) for r, s in zip(self.requests, samples, strict=True)]
        self.keys = engine._column(keys)
        self.temperature = self._column([request.temperature for request in self.requests], 0.0)
        self.top_p = self._column([request.top_p for request in self.requests], 1.0)

    def _column(self, values: Sequence[float], usual: float) -> Tensor | None:
        if all(value == usual for value in values):
            return None
        return torch.tensor(values, dtype=torch.float32, device=self.engine.model.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full_like(self.keys, self.step)
        token, logprob = choose(scores.float(), self.keys, steps, self.temperature, self.top_p)
        self.step += 1
        self.engine.steps += 1
        self.engine._append(self.work, self.samples, token.tolist(), logprob.tolist())
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


class _AllEnded(StoppingCriteria):
    """Which rows of a batch have ended."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ended = [bool(sample.finish) for sample in self.batch.samples]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _nothing_of_its_own(model: Any) -> Iterator[Any]:
    """The model without its generation settings, such as penalties, which change its samples."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def bare_of_adapter(model: Any) -> Any:
    """The model itself, without the wrapper of an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def length_dependent(model: Any) -> list[tuple[Any, str, str]]:
    """Where RoPE depends on the longest text of a pass: (module, prefix of its buffers, kind)."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                found.append((module, f"{layer}_" if layer else "", kind))
    return found
