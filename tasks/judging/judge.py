"""A judge's model as a part of a stage: what its judgements depend on, and the device it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from constitutions.errors import UserError
from models.endpoint.client import open_endpoint
from models.files import text_sha256
from models.judges import llm
from models.judges.registry import JudgeSettings
from tasks.policies.base import check_model, files_of, open_model
from tasks.record.slot import Slot


def judge_notes(settings: JudgeSettings, home: Path) -> dict[str, str]:
    """What a judge's answers depend on beside its settings and our code, for a fingerprint.

    "judge" identifies the model: the digest of its files, or its name where they are not on this
    machine (at an endpoint, on the hub); "judge_wording" and "rubric" are an LLM judge's prompts
    and rubric. A judge without a model has no notes.

    Args:
        home: where the digests of unchanged files are kept.

    Raises:
        UserError: the model's directory lacks what transformers needs.
    """
    if not settings.judge_type.needs_model:
        return {}
    found = {"judge": _model(settings, home)}
    if settings.judge_type.generates:
        rubric = text_sha256(settings.chosen_rubric.model_dump_json())
        found |= {"judge_wording": llm.WORDING, "rubric": rubric}
    return found


def judge_uses(settings: JudgeSettings) -> tuple[str, ...]:
    """The modules whose code decides what a judge says: its kind's, and its model's."""
    kind, policy = settings.judge_type, settings.policy
    engine = (policy.answered_by,) if policy and kind.generates else ()
    return (kind.__module__, *engine)


def noted(at: Slot, settings: JudgeSettings | None) -> Slot:
    """The slot with `judge_notes`, and the device that a judge in this process takes.

    A device that the slot holds already (the policy's) stays held.

    Raises:
        UserError: the model's directory lacks what transformers needs.
    """
    if settings is None:
        return at
    device = settings.policy.answers_on if settings.policy else "cpu"
    at = replace(at, device=device if at.device == "cpu" else at.device)
    return at.using(*judge_uses(settings), **judge_notes(settings, at.record.home))


def check_judge(settings: JudgeSettings, opens: bool = True) -> str:
    """A description of the judge's model; loads nothing, and sends no request.

    Args:
        opens: whether the model's files are looked into.

    Raises:
        UserError: there is no such directory, or it lacks what transformers needs; an endpoint
            without an address or key.
    """
    if settings.policy is None or not settings.judge_type.needs_model:
        return f"none: {settings.kind}"
    try:
        if settings.policy.endpoint:
            open_endpoint(settings.policy)  # its address and key
            return f"{settings.policy.served_name} at {settings.policy.endpoint}"
        if not opens:
            return check_model(settings.policy)
        return open_model(settings.policy, "sampled" if settings.judge_type.generates else "reward")
    except UserError as error:
        raise UserError(
            error.what, where=f"judge: {error.where}", expected=error.expected, fix=error.fix
        ) from None


def _model(settings: JudgeSettings, home: Path) -> str:
    assert settings.policy is not None, "JudgeSettings sees to it"
    if settings.policy.endpoint:
        return settings.policy.served_name
    check_judge(settings, opens=False)
    return files_of(settings.policy, home).digest
