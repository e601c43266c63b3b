"""SAMI's objective: the mutual information between constitutions and the policy's own responses.

`models/training/loop.py` trains on it; `tasks/sami` samples the groups and estimates the
information. A group is one query x under C constitutions, with a response to each of them; the
policy learns which response belongs to which constitution (arXiv 2404.14313, section 3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch.nn import functional

from models.engine.output_layer import bare, output_only
from models.engine.shared_prefix import unsupported
from models.training.encoding import Group

Tensor = torch.Tensor


def sami_loss(logprobs: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean of two cross-entropies against the diagonal, in nats (a scalar).

    A row compares the responses under one constitution, a column the constitutions of one response.
    log C − loss is a lower bound of I(Y; C | X), and at most log C. A policy that ignores its
    constitutions has the loss log C (arXiv 2404.14313, section 3).

    Args:
        logprobs: (constitutions, responses), square: the mean log-probability per token of
            response j under constitution i, whose own response is i.

    Raises:
        ValueError: the matrix is not square, or empty.
    """
    if logprobs.ndim != 2 or logprobs.shape[0] != logprobs.shape[1] or not len(logprobs):
        raise ValueError(
            f"expected a (constitutions, responses) matrix, square; found {tuple(logprobs.shape)}"
        )
    own = torch.arange(len(logprobs), device=logprobs.device)
    rows = functional.cross_entropy(logprobs, own)
    columns = functional.cross_entropy(logprobs.T, own)
    return (rows + columns) / 2


def divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Divergence of the policy from the reference per token: a scalar ≥ 0, and 0 where both agree.

    It is the mean of exp(r) − 1 − r with r = log π_ref − log π_θ, as in GRPO: an unbiased estimate
    of KL(π_θ ‖ π_ref) where π_θ sampled the tokens. Here π_ref, the policy at the start, sampled
    them: the estimate is right to second order, and steeper for tokens that become improbable.

    Args:
        logprobs, reference: (tokens,): log p of each token by the policy and by the reference.
    """
    ratio = reference - logprobs
    return (ratio.exp() - 1 - ratio).mean()


# Rows: a constitution's prompt, and all responses after it -------------------------


@dataclass(frozen=True)
class Rows:
    """The prompts of a group, each followed by all responses, which do not see one another.

    A row of P prompt tokens and C responses of R tokens takes P + C·R positions, where C whole rows
    would take C·(P + R): the prompt is computed once. `ids` and `positions` are (rows, length),
    padded on the right; `segment` is 0 in the prompt, j + 1 in response j, −1 in the padding.
    """

    ids: Tensor
    positions: Tensor
    segment: Tensor
    row: Tensor
    """Row of every predicted token, in the order of (row, response, token)."""
    place: Tensor
    """Position in its row of the token before it."""
    target: Tensor
    lengths: tuple[int, ...]
    """Tokens of each response."""

    @property
    def seen(self) -> Tensor:
        """(rows, length, length): a token sees its prompt, and its response up to itself."""
        mine, other = self.segment[:, :, None], self.segment[:, None, :]
        length, device = self.ids.shape[1], self.ids.device
        before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=device)
        return before & ((other == 0) | (other == mine)) | itself

    def within(self, window: int) -> Tensor:
        """`seen`, limited to the last `window` positions."""
        distance = self.positions[:, :, None] - self.positions[:, None, :]
        return self.seen & (distance < window)

    def to(self, device: torch.device) -> Rows:
        """A copy on another device."""
        there = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(there, name, value.to(device))
        return there


def rows_of(group: Group, members: Sequence[int]) -> Rows:
    """The rows of the group's constitutions with these indices."""
    tails = [response[:-1] for response in group.responses]  # a last token predicts nothing
    starts = [0, *accumulate(map(len, tails))]
    longest = max(len(group.prompts[i]) for i in members) + starts[-1]
    ids = torch.zeros(len(members), longest, dtype=torch.long)
    positions, segment = torch.zeros_like(ids), torch.full_like(ids, -1)
    places: list[tuple[int, int]] = []
    for row, i in enumerate(members):
        prompt = group.prompts[i]
        laid = [(prompt, 0, 0)] + [(t, len(prompt), j) for j, t in enumerate(tails, start=1)]
        start = 0
        for part, position, number in laid:
            stop = start + len(part)
            ids[row, start:stop] = torch.tensor(part, dtype=torch.long)
            positions[row, start:stop] = torch.arange(position, position + len(part))
            segment[row, start:stop] = number
            start = stop
        for begin, tail in zip(starts, tails, strict=False):
            first = len(prompt) + begin
            places += [(row, len(prompt) - 1), *((row, first + k) for k in range(len(tail)))]
    target = [token for response in group.responses for token in response] * len(members)
    return Rows(
        ids=ids,
        positions=positions,
        segment=segment,
        row=torch.tensor([row for row, _ in places]),
        place=torch.tensor([place for _, place in places]),
        target=torch.tensor(target),
        lengths=tuple(map(len, group.responses)),
    )


def token_logprobs(model: Any, rows: Rows) -> list[list[Tensor]]:
    """log p of each response's tokens under each row's constitution: [row][response] (tokens,).

    The output layer computes the predicting positions only.

    Raises:
        UserError: the model has layers whose attention is neither full nor sliding.
    """
    with output_only(model, rows.row, rows.place):
        logits = model(
            input_ids=rows.ids,
            attention_mask=_masks(model, rows),
            position_ids=rows.positions,
            use_cache=False,
        ).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = -functional.cross_entropy(logits, rows.target.to(logits.device), reduction="none")
    return [list(part.split(rows.lengths)) for part in found.split(sum(rows.lengths))]


def _masks(model: Any, rows: Rows) -> Tensor | dict[str, Tensor]:
    """The masks that attention adds to its scores: one, or one for each kind of layer."""
    model = bare(model)
    config = model.config.get_text_config()
    window = cast(int, getattr(config, "sliding_window", None))
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention" if window else "full_attention"}
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise unsupported(model, f"has layers with {', '.join(sorted(kinds))}")
    found = {
        kind: _added(rows.within(window) if kind == "sliding_attention" else rows.seen, model.dtype)
        for kind in kinds
    }
    return found if len(found) > 1 else next(iter(found.values()))


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token is seen, else the type's least number: (rows, 1, length, length)."""
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return added.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


# The objective of a training -------------------------------------------------


@dataclass(frozen=True)
class Information:
    """`models.training.loop.Objective` over groups: the mean over queries of `sami_loss` + β · KL.

    Memory holds as many rows as fit `budget` tokens (at least one), however many constitutions
    there are. The loss couples all rows: where they do not fit together, the matrix is computed
    first, without gradients, and its gradient is then applied to some rows at a time. That costs
    one more forward pass and is exact.
    """

    budget: int
    """Most tokens of rows in memory at once, padding included."""
    kl: float = 0.0
    """β: weight of the divergence from the policy at the start of the training."""

    idle = Group(((0,),), ((0,),), weight=0.0)

    def tokens(self, item: Group) -> int:
        """The number of tokens in a group's rows."""
        return item.tokens

    def worth(self, item: Group) -> float:
        """Its weight in a step's mean."""
        return item.weight

    def micro_batches(self, rows: Sequence[Group]) -> list[list[Group]]:
        """One group each."""
        return [[row] for row in rows]

    def collate(self, rows: Sequence[Group]) -> dict[str, Any]:
        """The group itself: its tensors are made row by row."""
        (group,) = rows
        return {"group": group}

    def parts(self, model: Any, batch: dict[str, Any]) -> list[Callable[[], Tensor]]:
        """Functions of scalars that sum to the group's loss, as their gradients sum to its own."""
        return _Matrix(model, batch["group"], self).parts()


class _Matrix:
    """The loss of a group's C × C matrix, computed as a whole or some rows at a time."""

    def __init__(self, model: Any, group: Group, objective: Information) -> None:
        self.model, self.group, self.objective = model, group, objective
        if objective.kl and group.weight and not group.reference:
            raise ValueError("a group without the reference's log-probabilities; see `referred`")

    def parts(self) -> list[Callable[[], Tensor]]:
        chunks = list(_chunks(self.group, self.objective.budget))
        if len(chunks) == 1:
            return [partial(self._whole, chunks[0])]
        return [partial(self._share, members) for members in chunks]

    def _whole(self, members: Sequence[int]) -> Tensor:
        rows = self._rows(members)
        return self.group.weight * (sami_loss(_means(rows)) + self._divergence(members, rows))

    def _share(self, members: Sequence[int]) -> Tensor:
        """A scalar: its gradient is that of some rows, its value their share of the loss."""
        loss, slope = self._ahead
        rows = self._rows(members)
        mine = (_means(rows) * slope[list(members)]).sum()
        share = loss * len(members) / len(self.group.prompts)
        whole = mine - mine.detach() + share + self._divergence(members, rows)
        return self.group.weight * whole

    @cached_property
    def _ahead(self) -> tuple[Tensor, Tensor]:
        """The loss, and its derivative with respect to each entry of the matrix."""
        matrix = matrix_of(self.model, self.group, self.objective.budget).requires_grad_()
        loss = sami_loss(matrix)
        (slope,) = torch.autograd.grad(loss, matrix)
        return loss.detach(), slope

    def _rows(self, members: Sequence[int]) -> list[list[Tensor]]:
        return token_logprobs(self.model, rows_of(self.group, members).to(bare(self.model).device))

    def _divergence(self, members: Sequence[int], rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """These rows' part of β times the mean divergence of each constitution's own response."""
        if not self.objective.kl or not self.group.weight:
            return torch.zeros((), device=rows[0][0].device)
        each = [
            divergence(rows[row][i], rows[row][i].new_tensor(self.group.reference[i]))
            for row, i in enumerate(members)
        ]
        return self.objective.kl * torch.stack(each).sum() / len(self.group.prompts)


@torch.no_grad()
def matrix_of(model: Any, group: Group, budget: int) -> Tensor:
    """Mean log p per token of every response under every constitution, without gradients: (C, C).

    Args:
        budget: most tokens of rows in memory at once, padding included.
    """
    return _means(_all_rows(model, group, budget))


@torch.no_grad()
def referred(model: Any, groups: Sequence[Group], budget: int) -> list[Group]:
    """The groups with the model's own log-probabilities as the reference of the KL term."""
    found = []
    for group in groups:
        own = enumerate(_all_rows(model, group, budget))
        found.append(replace(group, reference=tuple(tuple(r[i].tolist()) for i, r in own)))
    return found


def _all_rows(model: Any, group: Group, budget: int) -> list[list[Tensor]]:
    """`token_logprobs` of all constitutions, computed in chunks."""
    chunks = _chunks(group, budget)
    parts = [token_logprobs(model, rows_of(group, m).to(model.device)) for m in chunks]
    return [row for part in parts for row in part]


def information(matrix: Tensor) -> float:
    """The estimate of I(Y; C | X) from one query's matrix: log C − loss, in nats; may be < 0."""
    return math.log(len(matrix)) - sami_loss(matrix).item()


def _means(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([part.mean() for part in row]) for row in rows])


def _chunks(group: Group, budget: int) -> Iterator[list[int]]:
    """Indices of constitutions whose padded rows fit the budget together; at least one each."""
    after = sum(len(response) - 1 for response in group.responses)
    chunk: list[int] = []
    for i in range(len(group.prompts)):
        longest = max(len(group.prompts[k]) for k in (*chunk, i)) + after
        if chunk and longest * (len(chunk) + 1) > budget:
            yield chunk
            chunk = []
        chunk.append(i)
    yield chunk
