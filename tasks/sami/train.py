"""SAMI, training: the policy learns which of its responses belongs to which constitution.

Maximises a lower bound of I(Y; C | X) by `models.training.sami.sami_loss` (arXiv 2404.14313,
section 3), with an optional divergence from the policy that the training starts from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from models.files import text_sha256
from models.prompts import ConstitutionWording, under_constitution
from models.training.encoding import Encoder, EncodingError, Group
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Rejected, Sampled
from tasks.train import (
    Training,
    TrainSettings,
    in_one_process,
    nothing_to_train_on,
    training_slot,
    write_curve,
)


class Groups(NamedTuple):
    """The tokenised queries, and those that cannot be trained on."""

    groups: tuple[Group, ...]
    skipped: tuple[Rejected, ...]


def groups_of(
    rows: Iterable[Sampled], encoder: Encoder, wording: ConstitutionWording, *, end_token: bool
) -> Groups:
    """Encode every query, or say why not: a response is missing, empty or too long, or all are the
    same, so that none can become more probable under its own constitution.

    Args:
        end_token: whether the end of the turn counts, where a response was not cut off.
    """
    groups: list[Group] = []
    skipped: list[Rejected] = []
    for row in rows:
        reason = _unusable(row)
        try:
            if not reason:
                groups.append(_group(row, encoder, wording, end_token))
                continue
        except EncodingError as error:
            reason = str(error)
        skipped.append(
            Rejected(
                prompt_id=row.prompt_id,
                sample=None,
                source=row.source,
                reason="cannot be trained on",
                detail=reason,
            )
        )
    return Groups(tuple(groups), tuple(skipped))


def _unusable(row: Sampled) -> str:
    """Why nothing can be learned from a query's responses; empty where it can."""
    if any(not draw.response.strip() for draw in row.draws):
        return "a response is empty"
    if len({draw.response for draw in row.draws}) == 1:
        return "the responses are the same under all constitutions"
    return ""


def _group(row: Sampled, encoder: Encoder, wording: ConstitutionWording, end_token: bool) -> Group:
    return encoder.group(
        [under_constitution(wording, draw.principles, row.prompt) for draw in row.draws],
        [draw.response for draw in row.draws],
        ends=[end_token and draw.finish == "stop" for draw in row.draws],
    )


@stage("train")
def train_stage(
    at: Slot, settings: TrainSettings, policy: PolicySource, sampled: Attempt
) -> Attempt:
    """sampled, the adapter of iteration t−1 (inside `policy`) → adapter, curve, skipped.

    Raises:
        UserError: no query can be trained on, or the training fails as `tasks.train.train` says.
    """

    def compute(work: Workspace) -> Metrics:
        rows = sampled.read("sampled", Sampled)
        training = Training.of(policy, settings, at.seed, work.outputs / "adapter")
        data = groups_of(rows, training.encoder(), policy.wording, end_token=settings.end_token)
        if not data.groups:
            raise nothing_to_train_on(data.skipped, "queries", settings)
        total = len(training.planned(data.groups))
        with work.device(), progress(f"train {at.iteration}", total, "steps") as tick:
            curve = training.fit(data.groups, text_sha256(repr(data.groups)), tick)
        return write_curve(work, curve, data.skipped) | _counts(data, curve[-1].tokens)

    inputs = policy.begun(settings.start, sampled=sampled)
    where = training_slot(policy, at).using("models.training.sami")
    return where.attempt("train", in_one_process(settings), inputs, compute, takes_device=True)


def _counts(data: Groups, tokens: int) -> Metrics:
    return {
        "train/queries": float(len(data.groups) + len(data.skipped)),
        "train/trained": float(len(data.groups)),
        "train/skipped": float(len(data.skipped)),
        "train/tokens": float(tokens),
    }
