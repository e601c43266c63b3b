"""What all generation engines share: samples, what ends them, and how many fit into the memory.

`models/engine/decoding.py` is the fast engine, `models/engine/plain.py` the one for every
architecture; `models/engine/exact.py` says which of them a model gets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from constitutions.errors import UserError
from models.engine.output_layer import last_states
from models.engine.sampling import seed_of
from models.policy import Request

Tensor = torch.Tensor
Tokens = Sequence[int]
Pairs = Sequence[tuple[Tokens, Tokens]]
"""(prompt, response), one token each at least."""

PASS_TOKENS = 8192
"""Most prompt tokens in one forward pass, padding included: more are no faster, and take memory."""
SCORED_LOGITS = 1 << 28
"""Most logits in one pass over given responses (4 bytes each)."""
MEMORY_SHARE = 0.8
"""Share of the free memory, in [0, 1], that the rows may fill."""
MOST_ROWS = {"cpu": 256, "cuda": 512}
"""Most rows at once: more are no faster."""


@dataclass(slots=True)
class Decoding:
    """What ends a sample, and how many samples are decoded together."""

    stop: Collection[int] = frozenset()
    """Tokens that end a turn."""
    rows: int | None = None
    """None: as many as the free memory holds. It is halved, for good, when the memory runs out."""
    spell: Callable[[Tokens], str] = str
    """Token ids as text, in which the requests' stop strings are looked for."""


@dataclass(slots=True)
class Sample:
    """One sample of a request, finished or not."""

    request: int
    """Index of its request."""
    number: int
    """From 0 to the request's n - 1."""
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Sum over the tokens and the token that ended it (nats, temperature 1)."""
    finish: str = ""
    """Why it ended (`Completion.finish`); empty while it has not."""


@dataclass(frozen=True, slots=True)
class WantedSamples:
    """Prompts as token ids, their requests, and the numbers of the samples still to be made."""

    prompts: Sequence[Tokens]
    requests: Sequence[Request]
    wanted: Sequence[Collection[int]]
    end: Callable[[Sample], None]
    """Called with each sample that has ended."""


class Engine(ABC):
    """Samples from a model, many rows at once."""

    def __init__(self, model: PreTrainedModel, decoding: Decoding | None = None) -> None:
        self.model, self.decoding = model, decoding or Decoding()
        self.prompt_tokens = 0
        """Prompt tokens computed so far."""
        self.steps = 0
        """Forward passes so far that made a token for each of their rows."""
        self.fitted = 0
        """Rows at once in the last call."""

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Tokens],
        requests: Sequence[Request],
        ended: Callable[[Sample], None],
    ) -> None:
        """Make every sample of every request.

        Args:
            prompts: token ids of each request's prompt, at least one.
            ended: called with each sample as soon as it has ended, in any order.

        Raises:
            UserError: not even one row fits into the memory.
        """
        wanted = [set(range(request.n)) for request in requests]

        def end(sample: Sample) -> None:
            wanted[sample.request].discard(sample.number)
            ended(sample)

        while any(wanted):
            try:
                self._make(WantedSamples(prompts, requests, wanted, end))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.decoding.rows = self._fewer(self.fitted)

    @torch.inference_mode()
    def score(self, pairs: Pairs) -> list[list[float]]:
        """log p of each token of each response, given its prompt and the tokens before (nats)."""
        vocabulary = self.model.config.get_text_config().vocab_size
        found: dict[int, list[float]] = {}
        for part in self._scores(pairs, min(PASS_TOKENS, SCORED_LOGITS // vocabulary)):
            found |= part
        return [found[i] for i in range(len(pairs))]

    @torch.inference_mode()
    def states(self, texts: Sequence[Tokens]) -> np.ndarray:
        """The mean last-layer hidden state of each text: (texts, hidden size), float32."""
        tokens = self._padded(texts)
        lengths = self._column([len(text) for text in texts])[:, None]
        there = (torch.arange(tokens.shape[1], device=tokens.device) < lengths)[..., None]
        states = last_states(self.model, tokens).float().masked_fill(~there, 0.0)
        return (states.sum(1) / lengths).cpu().numpy()

    @abstractmethod
    def _make(self, work: WantedSamples) -> None:
        """Make the wanted samples; set `fitted` to the number of rows at once."""

    @abstractmethod
    def _scores(self, pairs: Pairs, tokens: int) -> Iterator[Mapping[int, list[float]]]:
        """The scores by the index of the pair, in passes of at most so many tokens."""

    def _append(
        self,
        work: WantedSamples,
        samples: Sequence[Sample],
        tokens: Tokens,
        logprobs: Sequence[float],
    ) -> None:
        """Append its token to each unfinished sample, and report the samples that end with it."""
        for sample, token, logprob in zip(samples, tokens, logprobs, strict=True):
            if not sample.finish:
                sample.finish = self._finish(sample, work.requests[sample.request], token, logprob)
                if sample.finish:
                    work.end(sample)

    def _finish(self, sample: Sample, request: Request, token: int, logprob: float) -> str:
        """Append a token; returns why the sample ends with it, or "" where it does not end."""
        if logprob != logprob:
            return "invalid"
        sample.logprob += logprob
        if token in self.decoding.stop:
            return "stop"
        sample.tokens.append(token)
        if request.stop:
            text = self.decoding.spell(sample.tokens)
            if any(stop in text for stop in request.stop):
                return "stop"
        return "length" if len(sample.tokens) >= request.max_tokens else ""

    def _padded(self, rows: Sequence[Tokens]) -> Tensor:
        """(rows, longest), padded on the right, where causal attention ignores it."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(
            self.model.device
        )

    def _column(self, values: Tokens) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)

    def _places(self, places: Sequence[range]) -> tuple[Tensor, Tensor]:
        """The row and the position of each logit that is needed, row by row."""
        row = self._column([row for row, some in enumerate(places) for _ in some])
        return row, self._column([place for some in places for place in some])

    def _logprobs(self, logits: Tensor, targets: Sequence[Tokens]) -> list[list[float]]:
        """log p of each row's targets, from the logits that predict them: (targets, vocabulary)."""
        ids = self._column([token for row in targets for token in row])
        steps = logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return [steps[a:b].tolist() for a, b in pairwise(accumulate(map(len, targets), initial=0))]

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
        """Half of the rows that did not fit; raises UserError where that was a single one."""
        if rows == 1:
            raise UserError(
                "the memory does not hold a single sample",
                where=f"policy, on {self.model.device}",
                fix="lower the token limits, or take a smaller or a quantised model",
            )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows // 2


def row_settings(
    samples: Sequence[Sample], requests: Sequence[Request], device: torch.device
) -> dict[str, Tensor | None]:
    """The arguments of `choose` that stay the same while the rows do, on the device."""
    owners = [requests[sample.request] for sample in samples]
    keys = [seed_of(r.key, s.number) for r, s in zip(owners, samples, strict=True)]
    found: dict[str, Tensor | None] = {"keys": torch.tensor(keys, device=device)}
    for name, usual in (("temperature", 0), ("top_p", 1)):
        values = [float(getattr(request, name)) for request in owners]
        found[name] = None
        if any(value != usual for value in values):
            found[name] = torch.tensor(values, device=device)
    return found


def key_value_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers, by a text model's configuration.

    It is an upper bound where some layers keep none, or where the configuration names no heads.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return int(2 * config.num_hidden_layers * config.hidden_size * itemsize)
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * groups * size * itemsize)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes, the reserve that torch holds included."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reserve)
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: torch has a class for it on GPUs, and only messages on CPUs."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)
