"""The fast engine: it decodes many samples at once and computes what they share only once.

The beginning that several prompts share is computed once, and each prompt once for all of its
samples. When enough rows have ended, the next prompts take their place. `models/engine/exact.py`
opens the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

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
from models.engine.families import Family, PromptSamples, families, within
from models.engine.graphs import Steps
from models.engine.output_layer import output_only
from models.engine.sampling import choose
from models.engine.shared_prefix import PrefixCache, unsupported, use_shared_prefixes
from models.policy import Request

Tensor = torch.Tensor

REFILL = 0.25
"""The next families start when this share of the rows is free: each time, the cache is copied."""
COMPACT = 0.125
"""Ended rows are dropped when they make up this share of all rows."""


class _Batch:
    """The rows that are being decoded, and their cache."""

    def __init__(
        self, cache: PrefixCache, samples: list[Sample], requests: Sequence[Request], logits: Tensor
    ) -> None:
        self.cache, self.samples, self.requests, self.logits = cache, samples, requests, logits
        self._settings: dict[str, Tensor | None] | None = None

    @property
    def unfinished(self) -> list[int]:
        """The rows whose samples have not ended."""
        return [row for row, sample in enumerate(self.samples) if not sample.finish]

    def choose(self) -> tuple[Tensor, list[int], list[float]]:
        """The next token of every row: on the device, and with its log-probability on the host."""
        if self._settings is None:
            self._settings = row_settings(self.samples, self.requests, self.logits.device)
        steps = self._tensor([len(sample.tokens) for sample in self.samples])
        token, logprob = choose(self.logits, steps=steps, **self._settings)  # type: ignore[arg-type]
        return token, token.tolist(), logprob.tolist()

    def compact(self) -> None:
        """Keep the rows whose samples have not ended."""
        rows = self.unfinished
        index = self._tensor(rows)
        self.cache.select(index)
        self.logits, self._settings = self.logits[index], None
        self.samples = [self.samples[row] for row in rows]

    def join(self, others: Sequence[_Batch]) -> None:
        """Append the others' rows; the others become unusable."""
        self.cache.join([other.cache for other in others])
        self.logits = torch.cat([self.logits, *(other.logits for other in others)])
        self.samples = [s for batch in (self, *others) for s in batch.samples]
        self._settings = None

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.logits.device)


class Decoder(Engine):
    """The fast engine; `prompt_tokens` counts each shared token once.

    Raises:
        UserError: the model's attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, decoding: Decoding | None = None) -> None:
        super().__init__(model, decoding)
        use_shared_prefixes(model)
        self.recorded = Steps(self._one_more, {p.device for p in model.parameters()})
        self.longest: int | None = None
        """The length limit of texts, where longer ones would change the numbers of all rows; the
        positions of padding and of ended rows are held below it. None: no limit."""
        self.windows: dict[int, int | None] = {}
        """The attention window of each layer in the last pass over rows; None: no window."""

    def _make(self, work: WantedSamples) -> None:
        left = families(work.prompts, work.wanted)
        longest = max(
            len(ask.tail) + work.requests[ask.request].max_tokens for f in left for ask in f.asks
        )
        prefix = max(len(f.prefix) / f.rows for f in left)
        self.fitted = self.decoding.rows or self._fitting(longest + prefix)
        try:
            self._serve(deque(left), work)
        finally:
            self.recorded.forget()

    def _scores(self, pairs: Pairs, tokens: int) -> Iterator[Mapping[int, list[float]]]:
        texts = [[*prompt, *response] for prompt, response in pairs]
        for part in within(families(texts, [{0}] * len(texts)), tokens):
            yield self._score(part, [len(prompt) for prompt, _ in pairs])

    # One batch ------------------------------------------------------------------------------

    def _serve(self, waiting: deque[Family], work: WantedSamples) -> None:
        batch: _Batch | None = None
        while waiting or batch:
            free = self.fitted - (len(batch.unfinished) if batch else 0)
            if waiting and (free == self.fitted or free >= REFILL * self.fitted):
                batch = self._refilled(batch, waiting, work, free)
            if batch:
                batch = self._step(batch, work)

    def _refilled(
        self, batch: _Batch | None, waiting: deque[Family], work: WantedSamples, room: int
    ) -> _Batch | None:
        """The batch with as many of the waiting families as `room` more rows hold."""
        chosen: list[Family] = []
        while waiting and room:
            family = waiting.popleft()
            if family.rows > room:
                if chosen or batch:
                    waiting.appendleft(family)
                    break
                family, rest = family.split(room)
                waiting.appendleft(rest)
            chosen.append(family)
            room -= family.rows
        if not chosen:
            return batch
        parts = [self._begin(part, work) for part in within(chosen, PASS_TOKENS)]
        if batch:
            batch.compact()
            parts = [batch, *parts]
        parts[0].join(parts[1:])
        return parts[0]

    def _begin(self, chosen: Sequence[Family], work: WantedSamples) -> _Batch:
        """Compute the families' prompts: each prefix once, each tail once, a row per sample."""
        cache, asks = self._seated(chosen)
        tails = [ask.tail for ask in asks]
        logits = self._extend(cache, tails, [range(len(tail) - 1, len(tail)) for tail in tails])
        index = self._column([i for i, ask in enumerate(asks) for _ in ask.samples])
        samples = [Sample(ask.request, number) for ask in asks for number in ask.samples]
        if len(samples) > len(asks):
            cache.select(index)
        return _Batch(cache, samples, work.requests, logits[index])

    def _step(self, batch: _Batch, work: WantedSamples) -> _Batch | None:
        """Decode one more token of every row; None when all samples have ended."""
        self.steps += 1
        chosen, tokens, logprobs = batch.choose()
        self._append(work, batch.samples, tokens, logprobs)
        rows = batch.unfinished
        if not rows:
            return None
        if len(rows) < (1 - COMPACT) * len(batch.samples):
            chosen = chosen[rows]
            batch.compact()
        batch.logits = self.recorded.step(batch.cache, chosen)
        return batch

    def _score(self, part: Sequence[Family], starts: Sequence[int]) -> dict[int, list[float]]:
        """The log-probabilities of the responses in some families, by request number."""
        # a prefix ends before the responses, because all of their tokens are scored
        cut = [family.starting(min(starts[a.request] for a in family.asks)) for family in part]
        cache, asks = self._seated(cut)
        lengths = [len(family.prefix) for family in cut for _ in family.asks]
        pairs = list(zip(asks, lengths, strict=True))
        places = [range(starts[a.request] - before - 1, len(a.tail) - 1) for a, before in pairs]
        logits = self._extend(cache, [a.tail for a in asks], places)
        targets = [a.tail[p.start + 1 :] for a, p in zip(asks, places, strict=True)]
        steps = self._logprobs(logits, targets)
        return {a.request: some for a, some in zip(asks, steps, strict=True)}

    # The model ------------------------------------------------------------------------------

    def _seated(self, chosen: Sequence[Family]) -> tuple[PrefixCache, list[PromptSamples]]:
        """A cache with the families' prefixes, and a row without tokens for each of the prompts."""
        cache = self._prefixes([family.prefix for family in chosen])
        numbers = [number for number, family in enumerate(chosen) for _ in family.asks]
        cache.seat(self._column(numbers))
        return cache, [ask for family in chosen for ask in family.asks]

    def _prefixes(self, prefixes: Sequence[Tokens]) -> PrefixCache:
        """A cache with the prefixes' keys and values, and no rows."""
        lengths = [len(prefix) for prefix in prefixes]
        self.prompt_tokens += sum(lengths)
        cache = PrefixCache(self._column(lengths))
        tokens = self._padded([prefix or (0,) for prefix in prefixes])
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        with output_only(self.model, self._column([]), self._column([])):
            self._call(cache, tokens, positions)
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(cache.prefix) != layers:
            raise unsupported(self.model, f"keeps keys in {len(cache.prefix)} of {layers} layers")
        return cache

    def _extend(
        self, cache: PrefixCache, tails: Sequence[Tokens], places: Sequence[range]
    ) -> Tensor:
        """Add private tokens to every row; returns the logits at the given positions of each row,
        (positions, vocabulary)."""
        self.prompt_tokens += sum(map(len, tails))
        lengths = self._column([len(tail) for tail in tails])
        with output_only(self.model, *self._places(places)):
            return self._forward(cache, self._padded(tails), lengths)[0].float()

    def _one_more(self, cache: PrefixCache, tokens: Tensor) -> Tensor:
        return self._forward(cache, tokens[:, None], torch.ones_like(tokens))[:, -1].float()

    def _forward(self, cache: PrefixCache, tokens: Tensor, new: Tensor) -> Tensor:
        positions = cache.begin(tokens.shape[1], new)
        if self.longest is not None:
            positions = positions.clamp(max=self.longest - 1)
        logits = self._call(cache, tokens, positions)
        if len(cache.reached) != len(cache.prefix):
            reached = f"{len(cache.reached)} of {len(cache.prefix)}"
            raise unsupported(self.model, f"lets the engine's attention reach {reached} layers")
        self.windows = cache.reached
        return logits

    def _call(self, cache: PrefixCache, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            shared=cache,
            use_cache=True,
        ).logits
