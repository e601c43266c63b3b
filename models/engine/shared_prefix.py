"""Attention in which many rows share one prefix, whose keys and values are stored and read once.

A *family* is a prefix (a prompt, or the shared beginning of several prompts); a *row* is a sample
that continues it. One matrix product multiplies the queries of all rows of a family with the
family's keys, another each row's queries with its private keys; one softmax covers both.
`models/engine/decoding.py` fills the cache and removes rows. It works for every transformers model
whose attention goes through the library's interface.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, count
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from constitutions.errors import UserError

Tensor = torch.Tensor
NAME = "shared_prefix"
MASKED = -1e30
"""Added to the scores of masked positions: finite, so that no score becomes NaN."""
GROWTH = 64
"""Least number of tokens by which private keys and values grow."""
KeyValue = tuple[Tensor, Tensor]
_NUMBERS = count()


def use_shared_prefixes(model: PreTrainedModel) -> None:
    """Let the model's attention read from a `PrefixCache`; without one it stays causal attention.

    Raises:
        UserError: its attention does not go through the library's interface.
    """
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if heads is None or not model._can_set_attn_implementation():
        raise unsupported(model, "has no attention that could be replaced")
    model.set_attn_implementation(NAME)


def unsupported(model: PreTrainedModel, why: str) -> UserError:
    """The error for an architecture that this engine cannot sample from."""
    return UserError(
        f"{type(model).__name__} {why}",
        where="policy.model",
        expected="a decoder whose layers all have full or sliding-window attention",
        fix="leave policy.engine at auto, or serve it behind an OpenAI-compatible endpoint",
    )


class PrefixCache:
    """Keys and values of families and rows, in place of transformers' cache.

    Rows are ordered by family. Shapes in one layer: `prefix` (families, heads, longest, size),
    `private` (rows, heads, capacity, size). What lies beyond the length of a family or a row is
    never read.
    """

    is_compileable = False

    def __init__(self, prefix_lengths: Tensor) -> None:
        self.prefix: list[KeyValue] = []
        self.private: list[KeyValue] = []
        self.prefix_lengths = prefix_lengths
        self.family = prefix_lengths.new_zeros(0)
        """The family of each row, ascending."""
        self.lengths = prefix_lengths.new_zeros(0)
        """The number of private tokens of each row."""
        self.longest = 0
        """An upper bound of `lengths` that is known on the host."""
        self.call: _Call | None = None
        """The current forward pass over rows; None during one over prefixes."""
        self.reached: dict[int, int | None] = {}
        """The layers whose attention used this cache in the pass over rows, and their windows."""
        self._number = next(_NUMBERS)
        self._changes = 0
        self._whole = False

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.family)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Equal while this cache's tensors keep their shapes, and of no two caches: (the cache's
        number, changes of the rows, private capacity)."""
        return self._number, self._changes, self._capacity

    @property
    def room(self) -> int:
        """Tokens that every row can still take before the private tensors grow."""
        return self._capacity - self.longest

    @property
    def _capacity(self) -> int:
        return self.private[0][0].shape[2] if self.private else 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block a CUDA graph records a pass; its shapes must hold until `room` is 0."""
        longest, self._whole = self.longest, True
        try:
            yield
        finally:
            self.longest, self._whole = longest, False

    def moved(self) -> None:
        """Count the token that a replayed pass has added to every row."""
        self.longest += 1

    def seat(self, family: Tensor) -> None:
        """Replace the rows: one without private tokens for each given family (ascending)."""
        self.family, self.lengths, self.longest = family, torch.zeros_like(family), 0
        self.private = []
        self._arranged()

    def _arranged(self) -> None:
        self.call, self.seats = None, _Seats(self.family, len(self.prefix_lengths))
        self._changes += 1

    def begin(self, width: int, new: Tensor) -> Tensor:
        """Start a pass over `width` tokens of every row, of which `new` (rows,) count.

        Returns:
            Their positions in the whole texts (rows, width).
        """
        self.reached.clear()
        extent = self._capacity if self._whole else self.longest + width
        self.call = _Call(self, self.seats, width, extent)
        self.lengths += new  # in place: a recording knows tensors by their address
        self.longest += width
        return self.prefix_lengths[self.family][:, None] + self.call.index

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order (families ascending), and their families.

        A row that is named several times is copied.
        """
        self.private = [_rows_of(kv, rows) for kv in self.private]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0
        kept, self.family = self.family[rows].unique_consecutive(return_inverse=True)
        if len(kept) < len(self.prefix_lengths):
            self.prefix = [_rows_of(kv, kept) for kv in self.prefix]
            self.prefix_lengths = self.prefix_lengths[kept]
        self._arranged()

    def join(self, others: Sequence[PrefixCache]) -> None:
        """Append the others' families and rows; the others become unusable."""
        all_ = [self, *others]
        for name in ("prefix", "private"):
            for _ in range(len(self.prefix)):  # layer by layer: all at once need not fit
                parts = [getattr(cache, name).pop(0) for cache in all_]
                getattr(self, name).append(_stacked(parts))
        before = [0, *accumulate(len(cache.prefix_lengths) for cache in all_)]
        self.family = torch.cat([c.family + b for c, b in zip(all_, before[:-1], strict=True)])
        self.prefix_lengths = torch.cat([cache.prefix_lengths for cache in all_])
        self.lengths = torch.cat([cache.lengths for cache in all_])
        self.longest = max(cache.longest for cache in all_)
        self._arranged()

    # The interface of transformers' caches ------------------------------------------------------

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> KeyValue:
        """Add a layer's new keys and values, of shape (rows, heads, width, size).

        Raises:
            ValueError: a layer before this one has added none.
        """
        held = self.prefix if self.call is None else self.private
        if layer_idx > len(held):
            raise ValueError(f"layer {layer_idx} comes after layer {len(held) - 1}")
        if layer_idx == len(held):
            held.append((keys, values) if self.call is None else (keys[:, :, :0], values[:, :, :0]))
        if self.call is not None:
            held[layer_idx] = self.call.on(keys.device).write(held[layer_idx], (keys, values))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the model gets its positions as an argument instead."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The size of the library's masks, which only right-padded prefixes use."""
        return query_length, 0


class _Seats:
    """The place of each row in a rectangle of (families, most rows of a family) slots."""

    def __init__(self, family: Tensor, families: int) -> None:
        counts = family.bincount(minlength=families)
        self.sisters = int(counts.max()) if families else 0
        here = torch.arange(len(family), device=family.device)
        self.slot = family * self.sisters + here - (counts.cumsum(0) - counts)[family]
        self.row = torch.zeros(families * self.sisters, dtype=torch.long, device=family.device)
        """The row in each slot; an empty slot names any row."""
        self.row[self.slot] = here
        self.alone = self.sisters == 1 and families == len(family)

    def to(self, device: torch.device) -> _Seats:
        """A copy on another device."""
        there = copy.copy(self)
        there.slot, there.row = self.slot.to(device), self.row.to(device)
        return there

    def gather(self, own: Tensor) -> Tensor:
        """(rows, groups, queries, size) → (families, groups, sisters x queries, size)."""
        if self.alone:
            return own
        _, groups, queries, size = own.shape
        slots = own[self.row].view(-1, self.sisters, groups, queries, size)
        return slots.transpose(1, 2).reshape(-1, groups, self.sisters * queries, size)

    def spread(self, gathered: Tensor, queries: int) -> Tensor:
        """The inverse of `gather`: one entry for each row again."""
        if self.alone:
            return gathered
        _, groups, _, size = gathered.shape
        slots = gathered.view(-1, groups, self.sisters, queries, size)
        return slots.transpose(1, 2).flatten(0, 1)[self.slot]


class _Call:
    """One forward pass over the rows: where each layer writes its new keys, and the masks."""

    def __init__(self, cache: PrefixCache, seats: _Seats, width: int, extent: int) -> None:
        self.cache, self.seats, self.width, self.extent = cache, seats, width, extent
        self.index = cache.lengths[:, None] + torch.arange(width, device=cache.lengths.device)
        """Index of each new token among its row's private ones, (rows, width)."""
        self.row = torch.arange(cache.rows, device=self.index.device)
        self._biases: dict[int | None, Tensor] = {}
        self._elsewhere: dict[torch.device, _Call] = {}

    def on(self, device: torch.device) -> _Call:
        """The call on the device of some layers: a large model may occupy several devices."""
        if device == self.index.device:
            return self
        if device not in self._elsewhere:
            there = copy.copy(self)
            there.index, there.row = self.index.to(device), self.row.to(device)
            there.seats, there._biases = self.seats.to(device), {}
            self._elsewhere[device] = there
        return self._elsewhere[device]

    def write(self, held: KeyValue, new: KeyValue) -> KeyValue:
        """The private keys and values with the new ones at their indices."""
        return self._write(held[0], new[0]), self._write(held[1], new[1])

    def _write(self, held: Tensor, new: Tensor) -> Tensor:
        if held.shape[2] < self.extent:
            room = max(self.extent + GROWTH, held.shape[2] * 3 // 2)
            held = functional.pad(held, (0, 0, 0, room - held.shape[2]))
        if self.width == 1:
            held[self.row, :, self.index[:, 0]] = new[:, :, 0]
        else:
            held[self.row[:, None], :, self.index] = new.transpose(1, 2)
        return held

    def attend(
        self, layer: int, query: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of queries (rows, heads, width, size): (rows, width, heads, size)."""
        cache, (rows, heads, width, size) = self.cache, query.shape
        keys, values = cache.prefix[layer]
        own_keys, own_values = (part[:, :, : self.extent] for part in cache.private[layer])
        groups, longest = keys.shape[1:3]
        queries = heads // groups * width
        own = (query * scaling).reshape(rows, groups, queries, size)
        above = torch.matmul(self.seats.gather(own), keys.transpose(-1, -2))
        below = torch.matmul(own, own_keys.transpose(-1, -2))
        scores = torch.cat([self.seats.spread(above, queries), below], -1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + self._bias(window, heads // groups).to(scores.dtype)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        seen, mine = weights.split([longest, self.extent], -1)
        shared = torch.matmul(self.seats.gather(seen), values)
        out = self.seats.spread(shared, queries) + torch.matmul(mine, own_values)
        return out.reshape(rows, heads, width, -1).transpose(1, 2)

    def _bias(self, window: int | None, repeats: int) -> Tensor:
        """The mask that is added to the scores: (rows, 1, queries or 1, longest + extent)."""
        if window not in self._biases:
            seen = self._seen(window)
            if self.width > 1:  # one token is the same for all heads of its group
                seen = seen.repeat(1, repeats, 1)
            self._biases[window] = _as_bias(seen[:, None])
        return self._biases[window]

    def _seen(self, window: int | None) -> Tensor:
        """Whether each new token sees each place of its prefix and of its row: (rows, width, …)."""
        cache, index = self.cache, self.index[..., None]
        lengths = cache.prefix_lengths[cache.family][:, None, None].to(index.device)
        prefix = torch.arange(cache.prefix[0][0].shape[2], device=index.device)
        own = torch.arange(self.extent, device=index.device)
        above, below = (prefix < lengths).expand(-1, self.width, -1), own <= index
        if window is not None:
            above, below = (
                above & (prefix > lengths + index - window),
                below & (own > index - window),
            )
        return torch.cat([above, below], -1)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared: PrefixCache | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface; `shared` is an argument of the model's call.

    Outside of a pass over rows it is the library's own attention.

    Raises:
        ValueError: attention with sinks or position biases.
    """
    if more.get("s_aux") is not None or more.get("position_bias") is not None:
        raise ValueError("attention with sinks or position biases is not supported")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if shared is not None and shared.call is not None:
        layer = cast(int, module.layer_idx)
        shared.reached[layer] = sliding_window
        call = shared.call.on(query.device)
        return call.attend(layer, query, scaling, sliding_window, softcap), None
    if softcap is not None:
        return _softcapped(query, key, value, attention_mask, scaling, softcap), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **more
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    groups, (new, all_) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    if mask is None:  # causal
        mask = torch.ones(new, all_, dtype=torch.bool, device=query.device).tril(all_ - new)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2)).float()
    weights = (torch.tanh(scores / softcap) * softcap + _as_bias(mask)).softmax(-1)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2)


def _as_bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, MASKED)


def _rows_of(kv: KeyValue, rows: Tensor) -> KeyValue:
    rows = rows.to(kv[0].device)
    return kv[0][rows], kv[1][rows]


def _stacked(parts: Sequence[KeyValue]) -> KeyValue:
    """The parts concatenated along the rows, padded along the tokens."""
    room = max(keys.shape[2] for keys, _ in parts)
    keys, values = (
        torch.cat([functional.pad(part, (0, 0, 0, room - part.shape[2])) for part in column])
        for column in zip(*parts, strict=True)
    )
    return keys, values
