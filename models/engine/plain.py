"""The plain engine: transformers' own `generate`, for every architecture that it can run.

It draws the same noise as the fast engine: in float32 both give the same samples. Every row holds
its own copy of its prompt, and a batch takes as long as its longest sample.
"""

from __future__ import annotations

import operator
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
    StoppingCriteriaList,
)

from models.engine.base import (
    PASS_TOKENS,
    Decoding,
    Engine,
    Pairs,
    Sample,
    Tokens,
    WantedSamples,
    row_settings,
)
from models.engine.output_layer import output_only
from models.engine.sampling import choose

Tensor = torch.Tensor
Batching = Literal["padded", "equal", "single", "recomputed"]
"""Which rows are computed together: all ("padded"), those of equal length, or none ("single").
"recomputed": those of equal length, without a cache, so that each step computes all tokens."""
PREFILLED = 4 * PASS_TOKENS
"""Most prompt tokens of one batch."""


class Plain(Engine):
    """The engine for every architecture.

    Args:
        batching: a way that `models/engine/exact.py` has found exact for this model.
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
        limits = [work.requests[sample.request].max_tokens for sample in samples]
        longest = max(map(operator.add, lengths, limits))
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
            max_new_tokens=max(work.requests[sample.request].max_tokens for sample in samples),
            do_sample=False,
            pad_token_id=0,
            use_cache=self.batching != "recomputed",
        )
        self._reset_rope()
        with _default_generation(bare_of_adapter(self.model)) as model:
            model.generate(
                input_ids=torch.tensor(tokens, device=self.model.device),
                attention_mask=torch.tensor(seen, device=self.model.device),
                generation_config=how,
                logits_processor=LogitsProcessorList([batch]),
                stopping_criteria=StoppingCriteriaList([batch.ended]),
            )

    def _scores(self, pairs: Pairs, tokens: int) -> Iterator[Mapping[int, list[float]]]:
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        for part in self._parts(lengths, len(pairs), tokens):
            yield dict(zip(part, self._score([pairs[i] for i in part]), strict=True))

    def _score(self, pairs: Pairs) -> list[list[float]]:
        self._reset_rope()
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
            self._reset_rope()
            found.append(super().states([texts[i] for i in part]))
        order = np.argsort([i for part in parts for i in part])
        return np.concatenate(found)[order]

    def _reset_rope(self) -> None:
        """Reset dynamic RoPE, whose numbers depend on the longest text since the last reset."""
        for rope, prefix, kind in self._ropes:
            if "dynamic" in kind:
                original = getattr(rope, f"{prefix}original_inv_freq")
                setattr(rope, f"{prefix}inv_freq", original.clone())
                setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)

    def _parts(self, lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
        """The indices of the rows that are computed together, the longest first: at most so many
        rows, and so many tokens with padding, but at least one row."""
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
    """The rows of one `generate`: it masks every token except the one that is sampled."""

    def __init__(self, engine: Plain, samples: Sequence[Sample], work: WantedSamples) -> None:
        self.engine, self.samples, self.work, self.step = engine, samples, work, 0
        self.settings = row_settings(samples, work.requests, engine.model.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full((len(scores),), self.step, device=scores.device)
        token, logprob = choose(scores.float(), steps=steps, **self.settings)  # type: ignore[arg-type]
        self.step += 1
        self.engine.steps += 1
        self.engine._append(self.work, self.samples, token.tolist(), logprob.tolist())
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)

    def ended(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether each row's sample has ended (transformers' interface of stopping criteria)."""
        return torch.tensor([bool(s.finish) for s in self.samples], device=input_ids.device)


@contextmanager
def _default_generation(model: Any) -> Iterator[Any]:
    """Within the block the model has no generation settings of its own, such as penalties."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def bare_of_adapter(model: Any) -> Any:
    """The model without the wrapper that peft puts around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def length_dependent(model: Any) -> list[tuple[Any, str, str]]:
    """The RoPE modules whose numbers depend on the longest text of a pass: (module, prefix of its
    buffers' names, kind of RoPE)."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                found.append((module, f"{layer}_" if layer else "", kind))
    return found
