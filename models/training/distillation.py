"""Distillation of the policy under its own principle into the bare prompt (context distillation).

`models/training/loop.py` trains by it where an example names a teacher's prompt. The teacher is the
same model with its adapter as it was when the training started: no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from models.engine.output_layer import bare, output_only

Tensor = torch.Tensor
TOP = 64
"""The teacher's likeliest tokens that are told apart; all others are one outcome together."""
LEAST = 1e-6
"""Least probability of that outcome: below it, float32 has no digits of one minus the others."""


class Start:
    """A model's update as it is now, to be had back while the model is trained.

    Args:
        model: an adapter in float32 is copied; of all weights this would be a second model.
    """

    def __init__(self, model: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self._held = [(p, p.detach().clone()) for p in trained]

    @contextmanager
    def restored(self, model: Any) -> Iterator[None]:
        """Within the block the model answers as it did then, without dropout."""
        now, training = [p.data for p, _ in self._held], model.training
        try:
            for p, held in self._held:
                p.data = held
            yield model.eval()
        finally:
            for (p, _), data in zip(self._held, now, strict=True):
                p.data = data
            model.train(training)


def distillation_loss(
    model: Any, start: Start, batch: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Tensor:
    """Σ_i weight_i · Σ_t J(p_T(· | x', y_<t), p_θ(· | x, y_<t)), in nats (a scalar).

    x is the prompt alone, x' the conversation with the principle, y the trained tokens. J(p, q) is
    the mean of KL(p ‖ q) and KL(q ‖ p) over the teacher's `TOP` tokens and the rest of the
    vocabulary as one outcome: a lower bound of that over all tokens.

    Args:
        batch: as of `models.training.loop.weighted_loss`.
        teacher: the same after x': `input_ids` and `trained`, with the same trained tokens.
    """
    with torch.no_grad(), start.restored(bare(model)):
        known = _logprobs(bare(model), teacher)
    top = known.topk(min(TOP, known.shape[-1]))
    wanted = _with_rest(top.values)
    own = _with_rest(_logprobs(model, batch).gather(-1, top.indices))
    apart = ((wanted.exp() - own.exp()) * (wanted - own)).sum(-1) / 2  # both KLs in one sum
    row, _ = batch["trained"][:, 1:].nonzero(as_tuple=True)
    return (apart * batch["weight"][row]).sum()


def _logprobs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """log p of every token where a trained one is predicted: (trained tokens, vocabulary)."""
    row, position = batch["trained"][:, 1:].nonzero(as_tuple=True)
    with output_only(model, row, position):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _with_rest(top: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together as a last column."""
    rest = (1 - top.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([top, rest], dim=-1)
