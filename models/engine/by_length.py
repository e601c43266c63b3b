"""Two engines by the length of a text: where RoPE depends on the longest text of a pass.

With "longrope" a pass turns all of its positions otherwise once one text in it is beyond a limit.
Texts that stay short go to the fast engine; the plain one gives others what they would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models.engine.base import Ended, Engine, Wanted
from models.engine.decoding import Decoder
from models.engine.plain import Plain, length_dependent
from models.policy import Request


class ByLength(Engine):
    """The fast engine for texts that stay short, the plain one for others: where RoPE depends on
    the longest text of a pass, each gets what it would get alone."""

    def __init__(self, short: Decoder, long: Plain, limit: int) -> None:
        self.short, self.long, self.limit = short, long, limit
        super().__init__(short.model, (), None, short.spell)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in ("stop", "rows", "spell"):
            for part in (self.short, self.long):
                setattr(part, name, value)

    def _make(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        wanted: Wanted,
        end: Ended,
    ) -> None:
        lengths = [len(p) + r.max_tokens for p, r in zip(prompts, requests, strict=True)]
        for engine, numbers in self._split(lengths):
            own = set(numbers)
            some = [samples if i in own else () for i, samples in enumerate(wanted)]
            try:
                if any(some):
                    engine._make(prompts, requests, some, end)
            finally:
                self.fitted = engine.fitted

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[float]]:
        """See `Engine.score`."""
        found: dict[int, list[float]] = {}
        for engine, numbers in self._split([len(p) + len(r) for p, r in pairs]):
            found |= zip(numbers, engine.score([pairs[i] for i in numbers]), strict=True)
        return iter([found[i] for i in range(len(pairs))])

    def states(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Engine.states`."""
        return self.long.states(texts)

    def _split(self, lengths: Sequence[int]) -> Iterator[tuple[Engine, list[int]]]:
        short = [i for i, length in enumerate(lengths) if length <= self.limit]
        long = [i for i, length in enumerate(lengths) if length > self.limit]
        yield from ((e, some) for e, some in ((self.short, short), (self.long, long)) if some)


def length_limit(model: Any) -> int | None:
    """The length up to which a text's numbers do not depend on what is beside it; None: any."""
    limits = []
    for rope, prefix, kind in length_dependent(model):
        settings = rope.config.rope_parameters
        settings = settings[prefix.removesuffix("_")] if prefix else settings
        longrope = kind == "longrope"
        limits.append(
            settings["original_max_position_embeddings"] if longrope else rope.original_max_seq_len
        )
    return min(limits, default=None)
