"""Makes the engine of each way of generating, and combines two where RoPE depends on the length.

With "longrope" all texts of a pass get other numbers as soon as one of them exceeds a limit.
`ByLength` therefore gives short texts to the fast engine and longer ones to the plain engine, so
that each text gets the numbers that it would get alone.
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
"""The fast engine ("shared"), or how the plain engine batches."""


def make_engine(model: Any, way: Way, decoding: Decoding | None = None) -> Engine:
    """The engine of a way of generating; whether it is exact is not checked.

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
        self.short, self.long = Decoder(model, self.decoding), Plain(model, self.decoding, "equal")
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
        for engine, is_short in ((self.short, True), (self.long, False)):
            if numbers := [i for i, n in enumerate(lengths) if (n <= self.limit) == is_short]:
                yield engine, numbers


def length_limit(model: Any) -> int | None:
    """The length, in tokens, up to which a text's numbers do not depend on the texts in the same
    pass; None where they never do."""
    limits = []
    for rope, prefix, kind in length_dependent(model):
        settings = rope.config.rope_parameters
        settings = settings[prefix.removesuffix("_")] if prefix else settings
        given = settings["original_max_position_embeddings"] if kind == "longrope" else None
        limits.append(given or rope.original_max_seq_len)
    return min(limits, default=None)
