"""The plain engine: transformers' own `generate`, for every architecture that it runs.

Tokens are chosen by the same noise as in `models/engine/decoding.py`: in float32 both give the same
samples. Every row has its own copy of its prompt, and a batch lasts as long as its longest sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
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

from models.engine.base import PASS_TOKENS, SCORED_LOGITS, Ended, Engine, Sample, Wanted
from models.engine.output_layer import output_only
from models.engine.sampling import choose, seed_of
from models.policy import Request

Tensor = torch.Tensor
Batching = Literal["padded", "equal", "single", "recomputed"]
"""Which rows may be computed together: any, only those of equal length, or none; "recomputed" is
those of equal length, and without a cache, every token anew at each step."""
PREFILLED = 4 * PASS_TOKENS
"""Prompt tokens of one batch."""


class Plain(Engine):
    """The engine for every architecture.

    Args:
        batching: what changes no number in this model; `models/engine/exact.py` finds it out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop: Collection[int],
        rows: int | None,
        spell: Callable[[Sequence[int]], str],
        batching: Batching = "padded",
    ) -> None:
        super().__init__(model, stop, rows, spell)
        self.batching = batching
        self._ropes = length_dependent(model)

    def _make(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        wanted: Wanted,
        end: Ended,
    ) -> None:
        samples = [Sample(i, number) for i, some in enumerate(wanted) for number in sorted(some)]
        lengths = [len(prompts[sample.request]) for sample in samples]
        longest = max(n + requests[s.request].max_tokens
                      for n, s in zip(lengths, samples, strict=True))  # fmt: skip
        self.fitted = self.rows or self._fitting(longest)
        for part in self._parts(lengths, self.fitted, PREFILLED):
            self._generate([samples[i] for i in part], prompts, requests, end)

    def _generate(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        end: Ended,
    ) -> None:
        rows = [prompts[sample.request] for sample in samples]
        longest = max(map(len, rows))
        self.prompt_tokens += sum(map(len, rows))
        batch = _Batch(self, samples, requests, end)
        tokens = [[0] * (longest - len(row)) + list(row) for row in rows]
        seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        how = GenerationConfig(
            max_new_tokens=max(requests[sample.request].max_tokens for sample in samples),
            do_sample=False,
            pad_token_id=0,
            use_cache=self.batching != "recomputed",
        )
        with _nothing_of_its_own(self._whole) as model:
            model.generate(
                input_ids=torch.tensor(tokens, device=self.model.device),
                attention_mask=torch.tensor(seen, device=self.model.device),
                generation_config=how,
                logits_processor=LogitsProcessorList([batch]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(batch)]),
            )

    @property
    def _whole(self) -> Any:
        """The model that has `generate`: an adapter lies inside of it."""
        self._begin_anew()
        return bare_of_adapter(self.model)

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[float]]:
        """See `Engine.score`."""
        passed = min(PASS_TOKENS, SCORED_LOGITS // self.model.config.get_text_config().vocab_size)
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        found: dict[int, list[float]] = {}
        for part in self._parts(lengths, len(pairs), passed):
            found |= zip(part, self._score([pairs[i] for i in part]), strict=True)
        return iter([found[i] for i in range(len(pairs))])

    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        self._begin_anew()
        tokens = self._padded([[*prompt, *response] for prompt, response in pairs])
        places = [range(len(p) - 1, len(p) + len(r) - 1) for p, r in pairs]
        row = self._column([i for i, some in enumerate(places) for _ in some])
        place = self._column([p for some in places for p in some])
        with output_only(self.model, row, place):
            logits = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        targets = self._column([token for _, response in pairs for token in response])
        steps = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
        ends = [0, *accumulate(map(len, places))]
        return [steps[a:b].tolist() for a, b in pairwise(ends)]

    def states(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Engine.states`."""
        parts = list(self._parts([len(text) for text in texts], len(texts), 1 << 30))
        found = []
        for part in parts:
            self._begin_anew()
            found.append(super().states([texts[i] for i in part]))
        order = np.argsort([i for part in parts for i in part])
        return np.concatenate(found)[order]

    def _begin_anew(self) -> None:
        """Forget the longest text so far: with dynamic RoPE it would tell in the next one."""
        for rope, prefix, kind in self._ropes:
            if "dynamic" in kind:
                original = getattr(rope, f"{prefix}original_inv_freq")
                setattr(rope, f"{prefix}inv_freq", original.clone())
                setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)

    def _parts(self, lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
        """Numbers of rows that are computed together, the longest first: at most so many rows, and
        so many tokens, padding included."""
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
    """The rows of one `generate`: leaves the token that the noise chooses as the only one."""

    def __init__(
        self, engine: Plain, samples: Sequence[Sample], requests: Sequence[Request], end: Ended
    ) -> None:
        self.engine, self.samples, self.end = engine, samples, end
        self.requests = [requests[sample.request] for sample in samples]
        self.going = [True] * len(samples)
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
        for row, (t, p) in enumerate(zip(token.tolist(), logprob.tolist(), strict=True)):
            if self.going[row]:
                self.engine._append(self.samples[row], self.requests[row], t, p)
                if self.samples[row].finish:
                    self.going[row] = False
                    self.end(self.samples[row])
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


class _AllEnded(StoppingCriteria):
    """Which rows of a batch have ended."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([not going for going in self.batch.going], device=input_ids.device)


@contextmanager
def _nothing_of_its_own(model: Any) -> Iterator[Any]:
    """The model without its generation settings: penalties and the like are no part of it."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def bare_of_adapter(model: Any) -> Any:
    """The architecture's own model, in which an adapter's layers lie."""
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
