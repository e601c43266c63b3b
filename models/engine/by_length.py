"""An engine for each way of generating, and two by the length of a text where RoPE needs it.

With "longrope" a pass turns all of its positions differently once one text in it is beyond a limit.
The fast engine takes the texts that stay short, the plain one the others: each gets what it would
get alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from models.engine.base import Decoding, Engine, Pairs, Tokens, WantedSamples
from models.engine.decoding import Decoder
from models.engine.plain import Plain, length_dependent

Way = Literal["shared", "padded", "equal", "single", "recomputed"]
"""The fast engine, or how the plain one batches."""


def make_engine(model: Any, way: Way, decoding: Decoding | None = None) -> Engine:
    """The engine of that way; nothing is tried.

    Raises:
        UserError: the model's attention cannot be replaced, as the fast engine needs it.
    """
    if way != "shared":
        return Plain(model, decoding, way)
    limit = length_limit(model)
    return Decoder(model, decoding) if limit is None else ByLength(model, decoding, limit)


class ByLength(Engine):
    """The fast engine for texts of at most `limit` tokens, the plain one for longer ones."""

    def __init__(self, model: Any, decoding: Decoding | None, limit: int) -> None:
        super().__init__(model, decoding)
        self.short, self.long = (
            Decoder(model, self.decoding),
            Plain(model, self.decoding, "equal"),
        )
        self.short.longest = self.limit = limit

    def _make(self, work: WantedSamples) -> None:
        pairs = zip(work.prompts, work.requests, strict=True)
        for engine, numbers in self._split([len(p) + r.max_tokens for p, r in pairs]):
            own = set(numbers)
            some = [samples if i in own else () for i, samples in enumerate(work.wanted)]
            try:
                if any(some):
                    engine._make(replace(work, wanted=some))
            finally:
                self.fitted = engine.fitted

    def _scores(self, pairs: Pairs, tokens: int) -> Iterator[Mapping[int, list[float]]]:
        for engine, numbers in self._split([len(p) + len(r) for p, r in pairs]):
            for part in engine._scores([pairs[i] for i in numbers], tokens):
                yield {numbers[i]: steps for i, steps in part.items()}

    def states(self, texts: Sequence[Tokens]) -> np.ndarray:
        """See `Engine.states`."""
        return self.long.states(texts)

    def _split(self, lengths: Sequence[int]) -> Iterator[tuple[Engine, list[int]]]:
        short = [i for i, length in enumerate(lengths) if length <= self.limit]
        long = [i for i, length in enumerate(lengths) if length > self.limit]
        yield from ((e, some) for e, some in ((self.short, short), (self.long, long)) if some)


def length_limit(model: Any) -> int | None:
    """The length up to which a text's numbers do not depend on the texts beside it; None: any."""
    limits = []
    for rope, prefix, kind in length_dependent(model):
        settings = rope.config.rope_parameters
        settings = settings[prefix.removesuffix("_")] if prefix else settings
        longrope = kind == "longrope"
        limits.append(
            settings["original_max_position_embeddings"] if longrope else rope.original_max_seq_len
        )
    return min(limits, default=None)
