"""What every generation engine does: samples in the making, how they end, how many at a time.

`models/engine/decoding.py` is the fast engine, `models/engine/plain.py` the one for every
architecture; `models/engine/exact.py` says which of them a model gets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from constitutions.errors import UserError
from models.engine.output_layer import last_states
from models.policy import Request

Tensor = torch.Tensor

PASS_TOKENS = 8192
"""Prompt tokens in one forward pass, padding included: more gains nothing, and takes memory."""
SCORED_LOGITS = 1 << 28
"""Logits in one pass over given responses (4 bytes each)."""
MEMORY_SHARE = 0.8
"""Of the free memory, what the rows may fill."""
MOST_ROWS = {"cpu": 256, "cuda": 512}
"""More rows at once gain nothing."""


@dataclass(slots=True)
class Sample:
    """One sample in the making."""

    request: int
    number: int
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: str = ""
    """Empty while it goes on."""


Wanted = Sequence[Collection[int]]
"""The numbers of the samples that are still to be made, for each request."""
Ended = Callable[[Sample], None]


class Engine(ABC):
    """Samples from a model, many rows at once.

    Args:
        stop: tokens that end a turn.
        rows: samples decoded together; None: as many as the free memory holds. Halved, for good,
            when memory runs out all the same.
        spell: token ids as text, to find the requests' stop strings in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop: Collection[int],
        rows: int | None,
        spell: Callable[[Sequence[int]], str],
    ) -> None:
        self.model, self.stop, self.rows, self.spell = model, frozenset(stop), rows, spell
        self.prompt_tokens = 0
        """Prompt tokens computed so far."""
        self.steps = 0
        """Forward passes so far that made a token for each of their rows."""
        self.fitted = 0
        """Rows at once in the last call."""

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request], ended: Ended
    ) -> None:
        """Every sample of every request, told to `ended` as they end, in no order.

        Raises:
            UserError: not even one row fits into the memory.
        """
        wanted = [set(range(request.n)) for request in requests]

        def end(sample: Sample) -> None:
            wanted[sample.request].discard(sample.number)
            ended(sample)

        while any(wanted):
            try:
                self._make(prompts, requests, wanted, end)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.rows = self._fewer(self.fitted)

    @abstractmethod
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[float]]:
        """log p of each token of a response after its prompt.

        Args:
            pairs: (prompt, response), one token each at least.
        """

    @torch.inference_mode()
    def states(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Mean last-layer hidden state of each text, (texts, hidden), float32."""
        tokens = self._padded(texts)
        lengths = self._column([len(text) for text in texts])[:, None]
        there = (torch.arange(tokens.shape[1], device=tokens.device) < lengths)[..., None]
        states = last_states(self.model, tokens).float().masked_fill(~there, 0.0)
        return (states.sum(1) / lengths).cpu().numpy()

    @abstractmethod
    def _make(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        wanted: Wanted,
        end: Ended,
    ) -> None:
        """Make the wanted samples, `fitted` rows at once."""

    def _append(self, sample: Sample, request: Request, token: int, logprob: float) -> None:
        """Write a token down, and whether it was the last one."""
        if logprob != logprob:
            sample.finish = "invalid"
            return
        sample.logprob += logprob
        if token in self.stop:
            sample.finish = "stop"
            return
        sample.tokens.append(token)
        if request.stop and any(text in self.spell(sample.tokens) for text in request.stop):
            sample.finish = "stop"
        elif len(sample.tokens) >= request.max_tokens:
            sample.finish = "length"

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Padded on the right, where no token sees it."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(
            self.model.device
        )

    def _column(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)

    # Memory ---------------------------------------------------------------------------------

    def _fitting(self, tokens: float) -> int:
        """How many rows the free memory holds when each has so many tokens in the cache."""
        config = self.model.config.get_text_config()
        token = key_value_bytes(config, self.model.dtype.itemsize)
        row = tokens * token + 32 * config.vocab_size
        room = MEMORY_SHARE * free_bytes(self.model.device)
        most = MOST_ROWS.get(self.model.device.type, MOST_ROWS["cpu"])
        return max(1, min(most, int(room / row)))

    def _fewer(self, rows: int) -> int:
        if rows == 1:
            raise UserError(
                "the memory does not hold a single sample",
                where=f"policy, on {self.model.device}",
                fix="lower the token limits, or take a smaller or a quantised model",
            )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows // 2


def key_value_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers; a layer without keys counts as one with
    them, as wide as the model where the configuration has no heads."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return int(2 * config.num_hidden_layers * config.hidden_size * itemsize)
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * groups * size * itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device: what torch holds in reserve counts."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reserve)
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: torch has a class for it on GPUs, and words on CPUs."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)
