"""Only the logits that somebody asks for: the output layer of a large vocabulary is dear.

The engines ask for those after prompts, `models/training/loop.py` for those of trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

Tensor = torch.Tensor


def last_states(model: Any, ids: Tensor) -> Tensor:
    """What the output layer would be given after each token of some texts, (texts, length, hidden).

    Not the model's own list of hidden states: not every architecture has one of that shape.
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
    """Let the output layer see these states only: its input becomes (1, places, hidden).

    A hook, not a call of the layer, because some architectures scale its output afterwards, and
    because the wrapper of several processes must be called to notice the gradients.
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
    """The model itself, out of its wrapper for several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model
