"""E-step, the validator: which candidates are kept, and with what weight.

p(yG | x, y1, z, y2) is 0 unless f(y2, yG) > f(y1, yG), else proportional to the gain
f(y2, yG) − f(y1, yG) (STaPLe, section 3). Every candidate and prompt is kept, or rejected with
a reason. `cluster` reads what is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from models.policy import NO_ANSWER, UNFINISHED
from models.settings import Settings
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Rejected, Scored, ScoredCandidate, Trajectory, fields

LONGEST_PRINCIPLE = 40
"""Words. A longer principle is malformed: it is a response or an argument, not a principle."""
LEAK = 6
"""Words. A principle that quotes so many consecutive words of the gold response leaks it."""


class FilterSettings(Settings):
    """How the posterior over candidates is turned into trajectories."""

    selection: Literal["best_of_n", "rejection", "soft"] = "best_of_n"
    """best_of_n keeps the best improving candidate; rejection draws one in proportion to its
    weight; soft keeps every improving candidate, weighted."""
    temperature: float = Field(1.0, gt=0, le=100)
    """τ: weights are proportional to gain^(1/τ); towards 0 only the best counts (hard EM)."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """How much f(y2, yG) must exceed f(y1, yG)."""
    keep_truncated: bool = False
    """Keep candidates that were cut at their token limit."""


@stage("filter")
def filter_stage(
    at: Slot, settings: FilterSettings, scored: Attempt, guided: bool = True
) -> Attempt:
    """scored → trajectories, rejected; `guided` as `filter_rows` has it."""

    def compute(work: Workspace) -> Metrics:
        rows = scored.read("scored", Scored)
        kept, rejected = filter_rows(rows, settings, f"{at.seed}/{at.iteration}", guided)
        work.write("trajectories", kept, Trajectory)
        work.write("rejected", rejected, Rejected)
        return _metrics(rows, kept, rejected)

    noted = at if guided else at.using(guided="no")
    return noted.attempt("filter", settings, {"scored": scored}, compute)


def filter_rows(
    rows: Sequence[Scored], settings: FilterSettings, key: str, guided: bool = True
) -> tuple[list[Trajectory], list[Rejected]]:
    """Trajectories and rejections; each candidate is in exactly one of the two.

    A prompt without a trajectory has a row of its own in the rejections (sample None).

    Args:
        key: "<seed>/<iteration>"; with prompt_id it seeds the draw of `rejection`.
        guided: whether candidates have a principle, which then must be well-formed.
    """
    kept: list[Trajectory] = []
    rejected: list[Rejected] = []
    for row in rows:
        trajectories, rejections = _filter_row(row, settings, key, guided)
        kept += trajectories
        rejected += rejections
    return kept, rejected


def weights(scores: Sequence[float], initial_score: float, temperature: float) -> list[float]:
    """Posterior weights of one prompt's candidates: ∝ (f(y2, yG) − f(y1, yG))^(1/τ), summing to 1.

    Candidates that do not improve weigh 0; when none does, all weights are 0.
    """
    gains = np.maximum(np.asarray(scores, dtype=float) - initial_score, 0.0)
    if not gains.any():
        return [0.0] * len(scores)
    powers = (gains / gains.max()) ** (1.0 / temperature)  # scaled first: no underflow at small τ
    return [float(w) for w in powers / powers.sum()]


def _filter_row(
    row: Scored, settings: FilterSettings, key: str, guided: bool
) -> tuple[list[Trajectory], list[Rejected]]:
    unfinished = bool(row.initial_thoughts) and not row.initial
    if unfinished or row.initial_score is None:
        reason = "truncated" if unfinished else "unscored"
        detail = UNFINISHED if unfinished else row.initial_unscored or ""
        whole = _reject(row, None, reason, detail)
        each = [_reject(row, c, reason, "the first response") for c in row.candidates]
        return [], [*each, whole]
    faults = {c.sample: _fault(row, c, settings, guided) for c in row.candidates}
    sound = [c for c in row.candidates if faults[c.sample] is None]
    shares = weights([c.score or 0.0 for c in sound], row.initial_score, settings.temperature)
    chosen = _select(sound, shares, settings.selection, f"{key}/{row.prompt_id}")
    kept = [_trajectory(row, c, w) for c, w in chosen.values()]
    passed_over = [
        _reject(row, c, *(faults[c.sample] or ("not selected", settings.selection)))
        for c in row.candidates
        if c.sample not in chosen
    ]
    if kept:
        return kept, passed_over
    reasons = sorted({r.reason for r in passed_over}) or ["no candidate"]
    return [], [*passed_over, _reject(row, None, "no candidate kept", ", ".join(reasons))]


def _select(
    sound: Sequence[ScoredCandidate], shares: Sequence[float], selection: str, key: str
) -> dict[int, tuple[ScoredCandidate, float]]:
    """Sample number → (candidate, weight) of those that are kept."""
    if not sound:
        return {}
    if selection == "soft":
        return {c.sample: (c, w) for c, w in zip(sound, shares, strict=True) if w > 0}
    if selection == "rejection":
        draw = np.random.default_rng(list(key.encode())).choice(len(sound), p=shares)
        return {sound[draw].sample: (sound[draw], 1.0)}
    best = max(sound, key=lambda c: (c.score or 0.0, -c.sample))
    return {best.sample: (best, 1.0)}


def _fault(
    row: Scored, candidate: ScoredCandidate, settings: FilterSettings, guided: bool
) -> tuple[str, str] | None:
    """Why a candidate cannot be kept, as (reason, detail); None when it improves on y1."""
    if candidate.finish in NO_ANSWER:
        reason = "prompt too long" if candidate.finish == "overflow" else candidate.finish
        return reason, NO_ANSWER[candidate.finish]
    if _unfinished(candidate):
        return "truncated", UNFINISHED
    if candidate.finish == "length" and not settings.keep_truncated:
        return "truncated", "cut at its token limit"
    if guided and (malformed := _malformed(candidate.principle)):
        return "malformed principle", malformed
    if leaked := _leak(candidate.principle, row):
        return "gold leak", leaked
    if candidate.score is None:
        return "unscored", candidate.unscored or ""
    gain = candidate.score - (row.initial_score or 0.0)
    if gain <= settings.min_gain:
        return "not better", f"gain {gain:.4f}"
    return None


def _unfinished(candidate: ScoredCandidate) -> bool:
    """Whether a part of it is thoughts that came to no answer."""
    parts = (
        (candidate.principle_thoughts, candidate.principle),
        (candidate.critique_thoughts, candidate.critique),
        (candidate.refined_thoughts, candidate.refined),
    )
    return any(thoughts and not text for thoughts, text in parts)


def _malformed(principle: str) -> str:
    words = len(principle.split())
    if not re.search(r"\w", principle):
        return "empty"
    if words > LONGEST_PRINCIPLE:
        return f"{words} words, at most {LONGEST_PRINCIPLE}"
    if len(principle.strip().splitlines()) > 1:
        return "more than one line"
    if "\0" in principle:
        return "holds the character NUL"  # a constitution with it could not be read back
    return ""


def _leak(principle: str, row: Scored) -> str:
    """The words that a principle shares with the gold and with nothing the policy saw before."""
    known = _grams(row.initial).union(*(_grams(m["content"]) for m in row.prompt))
    leaked = (_grams(principle) & _grams(row.gold)) - known
    return f"quotes “{' '.join(min(leaked))}”" if leaked else ""


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + LEAK]) for i in range(len(words) - LEAK + 1)}


def _trajectory(row: Scored, candidate: ScoredCandidate, weight: float) -> Trajectory:
    known = {**fields(row), **fields(candidate), "weight": weight}
    return Trajectory(**{name: known[name] for name in Trajectory.__dataclass_fields__})


def _reject(row: Scored, candidate: ScoredCandidate | None, reason: str, detail: str) -> Rejected:
    """A candidate, or (None) the whole prompt."""
    return Rejected(
        prompt_id=row.prompt_id,
        sample=candidate.sample if candidate else None,
        source=row.source,
        reason=reason,
        detail=detail,
    )


def _metrics(
    rows: Sequence[Scored], kept: Sequence[Trajectory], rejected: Sequence[Rejected]
) -> Metrics:
    reasons = Counter(r.reason for r in rejected if r.sample is not None)
    return {
        "prompts_in": len(rows),
        "prompts_kept": len({t.prompt_id for t in kept}),
        "prompts_rejected": sum(r.sample is None for r in rejected),
        "candidates_in": sum(len(row.candidates) for row in rows),
        "trajectories": len(kept),
        "refinement_rate": sum(map(_improved, rows)) / len(rows) if rows else 0.0,
        **{f"rejected/{why.replace(' ', '_')}": reasons[why] for why in sorted(reasons)},
    }


def _improved(row: Scored) -> bool:
    """Whether at least one y2 beat y1, kept or not."""
    return row.initial_score is not None and any(
        c.score is not None and c.score > row.initial_score for c in row.candidates
    )
