"""The generation engine's loop: prompts in families, samples in rows, the device kept full.

What several prompts begin with is computed once, and every prompt once, however many samples it
has. When enough rows have ended, the next families take their place. `models/engine/local.py` calls
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from transformers import PreTrainedModel

from models.engine.base import PASS_TOKENS, SCORED_LOGITS, Ended, Engine, Sample, Wanted
from models.engine.graphs import Steps
from models.engine.output_layer import output_only
from models.engine.sampling import choose, seed_of
from models.engine.shared_prefix import PrefixCache, unsupported, use_shared_prefixes
from models.policy import Request

Tensor = torch.Tensor

REFILL = 0.25
"""New families are taken in when this share of the rows is free: each time, the cache is copied."""
COMPACT = 0.125
"""Ended rows are dropped when they are this share of all."""


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """What is sampled from one prompt: the samples' numbers, of a request with this number."""

    request: int
    tail: tuple[int, ...]
    """The prompt after the family's prefix: one token at least."""
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Prompts that begin alike."""

    prefix: tuple[int, ...]
    asks: tuple[PromptSamples, ...]

    @property
    def rows(self) -> int:
        """Samples of all its prompts."""
        return sum(len(ask.samples) for ask in self.asks)

    def split(self, rows: int) -> tuple[Family, Family]:
        """The first `rows` samples, and the others."""
        ends = list(accumulate(len(ask.samples) for ask in self.asks))
        cuts = [max(0, min(len(a.samples), rows - end + len(a.samples)))
                for a, end in zip(self.asks, ends, strict=True)]  # fmt: skip
        halves = [(replace(a, samples=a.samples[:c]), replace(a, samples=a.samples[c:]))
                  for a, c in zip(self.asks, cuts, strict=True)]  # fmt: skip
        first, second = (tuple(a for a in half if a.samples) for half in zip(*halves, strict=True))
        return replace(self, asks=first), replace(self, asks=second)


def families(prompts: Sequence[Sequence[int]], wanted: Sequence[Collection[int]]) -> list[Family]:
    """Group prompts that share at least half of their tokens; the longest family first.

    Args:
        prompts: token ids, one at least.
        wanted: the sample numbers of each.
    """
    order = sorted((i for i, w in enumerate(wanted) if w), key=lambda i: list(prompts[i]))
    groups: list[tuple[int, list[int]]] = []
    for i in order:
        # the last token stays out: its logits are what a sample begins with
        whole = len(prompts[i]) - 1
        if groups:
            common, members = groups[-1]
            shared = min(common, whole, _common(prompts[members[-1]], prompts[i]))
            if 2 * shared >= max(len(prompts[j]) for j in (i, members[0], members[-1])):
                groups[-1] = (shared, [*members, i])
                continue
        groups.append((whole, [i]))
    found = [_family(prompts, wanted, common, members) for common, members in groups]
    return sorted(found, key=lambda f: len(f.prefix), reverse=True)


def _family(
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Collection[int]],
    common: int,
    members: Sequence[int],
) -> Family:
    asks = (PromptSamples(i, tuple(prompts[i][common:]), tuple(sorted(wanted[i]))) for i in members)
    return Family(tuple(prompts[members[0]][:common]), tuple(asks))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


_PER_ROW = ("samples", "temperature", "top_p", "limit", "keys", "going")


class _Batch:
    """The rows at work, and their place in the cache."""

    def __init__(
        self, cache: PrefixCache, samples: list[Sample], requests: Sequence[Request], logits: Tensor
    ) -> None:
        self.cache, self.samples, self.logits = cache, samples, logits
        self.temperature = [requests[s.request].temperature for s in samples]
        self.top_p = [requests[s.request].top_p for s in samples]
        self.limit = [requests[s.request].max_tokens for s in samples]
        self.keys = [seed_of(requests[s.request].key, s.number) for s in samples]
        self.going = [True] * len(samples)
        self._columns: dict[str, Tensor | None] = {}

    def choose(self) -> tuple[Tensor, list[int], list[float]]:
        """The next token of every row: on the device, and with its log-probability on the host."""
        if not self._columns:
            self._columns = self._on_device()
        steps = self.column([len(s.tokens) for s in self.samples], torch.int64)
        token, logprob = choose(self.logits, steps=steps, **self._columns)  # type: ignore[arg-type]
        return token, token.tolist(), logprob.tolist()

    def _on_device(self) -> dict[str, Tensor | None]:
        sampled, nucleus = any(self.temperature), any(p < 1 for p in self.top_p)
        return {
            "keys": self.column(self.keys, torch.int64),
            "temperature": self.column(self.temperature, torch.float32) if sampled else None,
            "top_p": self.column(self.top_p, torch.float32) if nucleus else None,
        }

    def column(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """A number for each row, on the device."""
        return torch.tensor(values, dtype=dtype, device=self.logits.device)

    def select(self, rows: list[int]) -> None:
        """Keep these rows."""
        self._columns = {}
        index = self.column(rows, torch.int64)
        self.cache.select(index)
        self.logits = self.logits[index]
        for name in _PER_ROW:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

    def join(self, others: Sequence[_Batch]) -> None:
        """Take in the others' rows, after one's own."""
        self._columns = {}
        self.cache.join([other.cache for other in others])
        self.logits = torch.cat([self.logits, *(other.logits for other in others)])
        for name, other in product(_PER_ROW, others):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Decoder(Engine):
    """The fast engine; `prompt_tokens` counts each shared token once.

    Raises:
        UserError: the model's attention cannot be replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop: Collection[int],
        rows: int | None,
        spell: Callable[[Sequence[int]], str],
    ) -> None:
        super().__init__(model, stop, rows, spell)
        use_shared_prefixes(model)
        self.recorded = Steps(self._one_more, {p.device for p in model.parameters()})
        self.longest: int | None = None
        """No text may be longer where positions beyond would change the numbers of all rows; those
        of padding, and of rows that have ended, do not go beyond."""
        self.windows: dict[int, int | None] = {}
        """The window that each layer told in the last pass over rows."""

    def _make(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        wanted: Wanted,
        end: Ended,
    ) -> None:
        left = families(prompts, wanted)
        longest = max(
            len(ask.tail) + requests[ask.request].max_tokens for f in left for ask in f.asks
        )
        prefix = max(len(f.prefix) / f.rows for f in left)
        rows = self.fitted = self.rows or self._fitting(longest + prefix)
        try:
            self._serve(deque(left), requests, rows, end)
        finally:
            self.recorded.forget()

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[float]]:
        """See `Engine.score`. What texts begin with is computed once."""
        texts = [[*prompt, *response] for prompt, response in pairs]
        found: dict[int, list[float]] = {}
        passed = min(PASS_TOKENS, SCORED_LOGITS // self.model.config.get_text_config().vocab_size)
        for part in _within(families(texts, [{0}] * len(texts)), passed):
            found |= self._score(part, [len(prompt) for prompt, _ in pairs])
        return iter([found[i] for i in range(len(pairs))])

    # One batch ------------------------------------------------------------------------------

    def _serve(
        self,
        waiting: deque[Family],
        requests: Sequence[Request],
        rows: int,
        end: Ended,
    ) -> None:
        batch: _Batch | None = None
        while waiting or batch:
            going = sum(batch.going) if batch else 0
            if waiting and (not going or rows - going >= REFILL * rows):
                batch = self._refilled(batch, waiting, requests, rows - going)
            if batch:
                batch = self._step(batch, requests, end)

    def _refilled(
        self, batch: _Batch | None, waiting: deque[Family], requests: Sequence[Request], room: int
    ) -> _Batch | None:
        """The batch with as many of the waiting families as there is room for."""
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
        parts = [self._begin(part, requests) for part in _within(chosen, PASS_TOKENS)]
        first, *others = [self._compacted(batch), *parts] if batch else parts
        first.join(others)
        return first

    def _begin(self, chosen: Sequence[Family], requests: Sequence[Request]) -> _Batch:
        """Compute the families' prompts: each prefix once, each tail once, a row per sample."""
        cache = self._prefixes([f.prefix for f in chosen])
        asks = [(number, ask) for number, f in enumerate(chosen) for ask in f.asks]
        cache.seat(self._column([number for number, _ in asks]))
        tails = [ask.tail for _, ask in asks]
        logits = self._extend(cache, tails, [len(tail) - 1 for tail in tails])
        source = [i for i, (_, ask) in enumerate(asks) for _ in ask.samples]
        samples = [Sample(ask.request, number) for _, ask in asks for number in ask.samples]
        index = self._column(source)
        if len(source) > len(asks):
            cache.select(index)
        return _Batch(cache, samples, requests, logits[index])

    def _step(self, batch: _Batch, requests: Sequence[Request], end: Ended) -> _Batch | None:
        """One more token for every row; None when the last one ended."""
        self.steps += 1
        chosen, tokens, logprobs = batch.choose()
        for row, sample in enumerate(batch.samples):
            if batch.going[row]:
                self._append(sample, requests[sample.request], tokens[row], logprobs[row])
                if sample.finish:
                    batch.going[row] = False
                    end(sample)
        if not any(batch.going):
            return None
        if batch.going.count(False) > COMPACT * len(batch.going):
            chosen = chosen[[row for row, going in enumerate(batch.going) if going]]
            batch = self._compacted(batch)
        batch.logits = self.recorded.step(batch.cache, chosen)
        return batch

    def _compacted(self, batch: _Batch) -> _Batch:
        batch.select([row for row, going in enumerate(batch.going) if going])
        return batch

    def _score(self, part: Sequence[Family], starts: Sequence[int]) -> dict[int, list[float]]:
        """The log-probabilities of the responses in some families, by request number."""
        # what of a response lies in a prefix that several share must be scored as well
        cut = [_before(family, min(starts[a.request] for a in family.asks)) for family in part]
        cache = self._prefixes([f.prefix for f in cut])
        asks = [(number, ask) for number, f in enumerate(cut) for ask in f.asks]
        cache.seat(self._column([number for number, _ in asks]))
        first = [starts[ask.request] - len(cut[number].prefix) - 1 for number, ask in asks]
        places = [range(f, len(a.tail) - 1) for f, (_, a) in zip(first, asks, strict=True)]
        logits = self._extend(cache, [a.tail for _, a in asks], places)
        targets = [t for (_, a), p in zip(asks, places, strict=True) for t in a.tail[p.start + 1 :]]
        steps = logits.gather(-1, self._column(targets)[:, None]).squeeze(-1) - logits.logsumexp(-1)
        ends = [0, *accumulate(map(len, places))]
        parts = zip(asks, pairwise(ends), strict=True)
        return {ask.request: steps[a:b].tolist() for (_, ask), (a, b) in parts}

    # The model ------------------------------------------------------------------------------

    def _prefixes(self, prefixes: Sequence[Sequence[int]]) -> PrefixCache:
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
        self,
        cache: PrefixCache,
        tails: Sequence[Sequence[int]],
        places: Sequence[int] | Sequence[range],
    ) -> Tensor:
        """Add private tokens to every row; the logits at the given places of each, (places, V)."""
        self.prompt_tokens += sum(map(len, tails))
        wanted = [p if isinstance(p, range) else range(p, p + 1) for p in places]
        row = self._column([r for r, some in enumerate(wanted) for _ in some])
        place = self._column([p for some in wanted for p in some])
        lengths = self._column([len(tail) for tail in tails])
        with output_only(self.model, row, place):
            return self._forward(cache, self._padded(tails), lengths, last=False)

    def _forward(
        self, cache: PrefixCache, tokens: Tensor, new: Tensor, last: bool = True
    ) -> Tensor:
        positions = cache.begin(tokens.shape[1], new)
        if self.longest is not None:
            positions = positions.clamp(max=self.longest - 1)
        logits = self._call(cache, tokens, positions)
        if len(cache.reached) != len(cache.prefix):
            reached = f"{len(cache.reached)} of {len(cache.prefix)}"
            raise unsupported(self.model, f"lets the engine's attention reach {reached} layers")
        self.windows = cache.reached
        return (logits[:, -1] if last else logits[0]).float()

    def _one_more(self, cache: PrefixCache, tokens: Tensor) -> Tensor:
        return self._forward(cache, tokens[:, None], torch.ones_like(tokens))

    def _call(self, cache: PrefixCache, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            shared=cache,
            use_cache=True,
        ).logits


def _within(all_: Sequence[Family], tokens: int) -> Iterator[list[Family]]:
    """Families in consecutive parts of at most so many padded tokens, but one family at least."""
    part: list[Family] = []
    for family in all_:
        wider = [*part, family]
        if part and _padded_tokens(wider) > tokens:
            yield part
            wider = [family]
        part = wider
    if part:
        yield part


def _padded_tokens(part: Sequence[Family]) -> int:
    prefixes = len(part) * max(len(f.prefix) for f in part)
    tails = [len(ask.tail) for f in part for ask in f.asks]
    return max(prefixes, len(tails) * max(tails))


def _before(family: Family, end: int) -> Family:
    """The family with a prefix that ends before place `end` - 1: the rest goes into the tails."""
    keep = min(len(family.prefix), end - 1)
    rest = family.prefix[keep:]
    asks = tuple(replace(ask, tail=(*rest, *ask.tail)) for ask in family.asks)
    return Family(family.prefix[:keep], asks)
