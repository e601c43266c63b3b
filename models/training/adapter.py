"""How an adapter is trained: its settings, the rows of each step, the curve. Imports no torch.

`models/training/loop.py` trains by it; `flows.plan` reads the settings and plans batches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeVar

from pydantic import Field

from models.settings import Settings

Item = TypeVar("Item")
POOL_BATCHES = 8
"""Rows are sorted by length within random pools of this many batches: that saves padding, and each
epoch still has other batches."""


class AdapterSettings(Settings):
    """What of the model is trained, and how it is optimised."""

    update: Literal["lora", "full"] = "lora"
    """A LoRA adapter on all linear layers, or every weight (needs policy.quantization: none, and
    on a GPU some ten bytes of memory a weight)."""
    lora_rank: int = Field(16, ge=1, le=1024)
    """Rank of the update of each linear layer: more can learn more, and takes more memory."""
    lora_alpha: int = Field(32, ge=1, le=4096)
    """The update is scaled by alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped in training."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW (8-bit and paged on a GPU), or RMSprop, with which SAMI's authors trained all weights.
    """
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to the end (to 0, unless constant)."""
    warmup: float = Field(0.05, ge=0, le=0.5)
    """Share of the steps in which the learning rate rises from 0."""
    epochs: int = Field(1, ge=1, le=100)
    """How often each trajectory, or query, is trained on."""
    tokens: int | None = Field(None, ge=1)
    """Tokens to train on in all, context included, whatever `epochs` says: trajectories come again
    until they are spent. For comparisons at equal budgets."""
    batch_size: int = Field(16, ge=1, le=4096)
    """Trajectories, or queries, per optimiser step."""
    micro_batch_tokens: int = Field(2048, ge=16, le=1_000_000)
    """At most this many tokens, padding included, in memory at once; a longer trajectory (SAMI: a
    constitution with all responses) goes alone. Changes speed and memory; the result by rounding
    only."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    processes: int = Field(1, ge=1, le=4096)
    """Processes that share each optimiser step, one a GPU, each with the whole base (`accelerate
    launch`, DDP). The result differs by rounding only."""


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimiser step of the training curve."""

    step: int
    """From 1."""
    loss: float
    """In nats: the step's weighted negative log-likelihood divided by the mean number of weighted
    tokens of a step; or SAMI's loss per query."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens processed so far, context included."""


def plan_batches(lengths: Sequence[int], settings: AdapterSettings, seed: int) -> list[list[int]]:
    """The rows of each optimiser step: every row `epochs` times, rows of similar length together.

    Only the last step may have fewer than `batch_size` rows. With `settings.tokens` there are as
    many steps, at least one, as come nearest to that budget.

    Args:
        lengths: tokens of each row, at least one row.

    Returns:
        Indices into `lengths`, a list for each step.
    """
    order, size = random.Random(seed), settings.batch_size
    steps: list[list[int]] = []
    carried: list[int] = []
    # enough epochs for the budget of tokens, where there is one
    epochs = 1 + settings.tokens // sum(lengths) if settings.tokens else settings.epochs
    for _ in range(epochs):
        rows = carried + order.sample(range(len(lengths)), len(lengths))
        whole = len(rows) - len(rows) % size
        pools = chunks(rows[:whole], POOL_BATCHES * size)
        sorted_pools = [sorted(pool, key=lambda i: lengths[i]) for pool in pools]
        epoch = [batch for pool in sorted_pools for batch in chunks(pool, size)]
        order.shuffle(epoch)
        steps, carried = steps + epoch, rows[whole:]
    steps = [*steps, carried] if carried else steps
    if settings.tokens is None:
        return steps
    budget = settings.tokens
    spent = list(accumulate(sum(lengths[i] for i in rows) for rows in steps))
    nearest = min(range(len(steps)), key=lambda k: abs(spent[k] - budget))
    return steps[: nearest + 1]


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Consecutive pieces of `size` items; the last may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
