"""Computes the output layer at chosen positions only, since a large vocabulary makes it expensive.

The engines need the logits after prompts, `models/training/loop.py` those of trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

Tensor = torch.Tensor


def last_states(model: Any, ids: Tensor) -> Tensor:
    """The output layer's input after each token of some texts, (texts, length, hidden).

    A hook takes it, because not every architecture returns hidden states of that shape.
    """
    found: list[Tensor] = []

    def keep(_: Any, states: tuple[Tensor]) -> tuple[Tensor]:
        found.append(states[0])
        return (states[0][:1, :1],)

    hook = bare(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found[0]


@contextmanager
def output_only(model: Any, row: Tensor, place: Tensor) -> Iterator[None]:
    """Within the block the output layer computes the states at these positions only.

    Its input becomes (1, positions, hidden). A hook does it, because some architectures scale the
    layer's output afterwards, and because the wrapper for several processes adds up gradients only
    where it is called itself.

    Args:
        row, place: (positions,): the row and the position in it of each state.
    """

    def select(_: Any, states: tuple[Tensor]) -> tuple[Tensor]:
        seen = states[0]
        return (seen[row.to(seen.device), place.to(seen.device)][None],)

    hook = bare(model).get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def bare(model: Any) -> Any:
    """The model without its wrapper for several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model
