"""E-step, the validator: which candidates are kept, and with what weight.

p(yG | x, y1, z, y2) is 0 unless f(y2, yG) > f(y1, yG), else proportional to the gain
f(y2, yG) − f(y1, yG) (STaPLe, section 3). Every candidate and prompt is kept, or rejected with
a reason. `cluster` reads what is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
from pydantic import Field

from models.policy import NO_ANSWER, UNFINISHED, Progress
from models.pools.processes import ProcessPool
from models.settings import Settings
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.tables import Beside
from tasks.record.work import Metrics, Workspace
from tasks.rows import (
    NOT_BETTER,
    Mined,
    Rejected,
    Scored,
    ScoredCandidate,
    Scores,
    Trajectory,
    fields,
)

LONGEST_PRINCIPLE = 40
"""Words. A longer principle is malformed: it is a response or an argument, not a principle."""
CUT = "cut at its token limit"
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
    """Keep candidates that were cut at their token limit, and prompts whose first response was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """What the filter makes of one prompt; each candidate is in exactly one of the two."""

    kept: tuple[Trajectory, ...]
    rejected: tuple[Rejected, ...]
    """With a row for the prompt itself (sample None) where nothing is kept."""
    improved: bool
    """Whether at least one y2 beats y1, kept or not."""


@stage("filter")
def filter_stage(
    at: Slot, settings: FilterSettings, mined: Attempt, scored: Attempt, guided: bool = True
) -> Attempt:
    """mined and its scores → trajectories, rejected; `guided` as `filter_row` takes it."""

    def compute(work: Workspace) -> Metrics:
        rows = Beside(mined.rows("mined", Mined), scored.rows("scored", Scores))
        job = partial(_filter_shard, settings, f"{at.seed}/{at.iteration}", guided)
        with ProcessPool(str) as pool:
            filtered = work.in_shards(
                "filtered", Filtered, rows, pool, job, what=f"filter {at.iteration}", unit="prompts"
            )
        work.items_table("trajectories", filtered, "kept", Trajectory)
        work.items_table("rejected", filtered, "rejected", Rejected)
        return _metrics(filtered.read(_Outcome))

    noted = at if guided else at.using(guided="no")
    return noted.attempt("filter", settings, {"mined": mined, "scored": scored}, compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fate:
    """The columns of a kept or rejected candidate that `_metrics` reads."""

    sample: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """The columns of `Filtered` that `_metrics` reads."""

    kept: tuple[_Fate, ...]
    rejected: tuple[_Fate, ...]
    improved: bool


def _filter_shard(
    settings: FilterSettings,
    key: str,
    guided: bool,
    _engine: object,
    rows: Sequence[tuple[Mined, Scores]],
    advance: Progress,
) -> list[Filtered]:
    filtered = [filter_row(Scored.of(*row), settings, key, guided) for row in rows]
    advance(len(rows))
    return filtered


def weights(scores: Sequence[float], initial_score: float, temperature: float) -> list[float]:
    """Posterior weights of one prompt's candidates: ∝ (f(y2, yG) − f(y1, yG))^(1/τ), summing to 1.

    Candidates that do not improve weigh 0; when none does, all weights are 0.
    """
    gains = np.maximum(np.asarray(scores, dtype=float) - initial_score, 0.0)
    if not gains.any():
        return [0.0] * len(scores)
    powers = (gains / gains.max()) ** (1.0 / temperature)  # scaled first: no underflow at small τ
    return [float(w) for w in powers / powers.sum()]


def filter_row(row: Scored, settings: FilterSettings, key: str, guided: bool = True) -> Filtered:
    """What is kept of one prompt, and why the rest is not.

    Args:
        key: "<seed>/<iteration>"; with prompt_id it seeds the draw of `rejection`.
        guided: whether candidates have a principle, which then must be well-formed.
    """
    if (fault := _initial_fault(row, settings)) is not None:
        reason, detail = fault
        whole = _reject(row, None, reason, detail)
        each = [_reject(row, c, reason, "the first response") for c in row.candidates]
        return Filtered(kept=(), rejected=(*each, whole), improved=_improved(row))
    assert row.initial_score is not None, "else that is the fault"
    leak = _Leak(row)
    faults = {c.sample: _fault(row, c, settings, guided, leak) for c in row.candidates}
    sound = [c for c in row.candidates if faults[c.sample] is None]
    shares = weights([c.score or 0.0 for c in sound], row.initial_score, settings.temperature)
    chosen = _select(sound, shares, settings.selection, f"{key}/{row.prompt_id}")
    kept = tuple(_trajectory(row, c, w) for c, w in chosen.values())
    passed_over = [
        _reject(row, c, *(faults[c.sample] or ("not selected", settings.selection)))
        for c in row.candidates
        if c.sample not in chosen
    ]
    if not kept:
        reasons = sorted({r.reason for r in passed_over}) or ["no candidate"]
        passed_over.append(_reject(row, None, "no candidate kept", ", ".join(reasons)))
    return Filtered(kept=kept, rejected=tuple(passed_over), improved=_improved(row))


def _initial_fault(row: Scored, settings: FilterSettings) -> tuple[str, str] | None:
    """Why nothing can be learned from a prompt whatever its candidates are, as (reason, detail): a
    first response that was cut is easily improved, and must not be learned."""
    if row.initial_thoughts and not row.initial:
        return "truncated", UNFINISHED
    if row.initial_finish == "length" and not settings.keep_truncated:
        return "truncated", CUT
    if row.initial_score is None:
        return "unscored", row.initial_unscored or ""
    return None


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
    row: Scored, candidate: ScoredCandidate, settings: FilterSettings, guided: bool, leak: _Leak
) -> tuple[str, str] | None:
    """Why a candidate cannot be kept, as (reason, detail); None when it improves on y1."""
    if candidate.finish in NO_ANSWER:
        reason = "prompt too long" if candidate.finish == "overflow" else candidate.finish
        return reason, NO_ANSWER[candidate.finish]
    if _unfinished(candidate):
        return "truncated", UNFINISHED
    if candidate.finish == "length" and not settings.keep_truncated:
        return "truncated", CUT
    if guided and (malformed := _malformed(candidate.principle)):
        return "malformed principle", malformed
    if leaked := leak.of(candidate.principle):
        return "gold leak", leaked
    if candidate.score is None:
        return "unscored", candidate.unscored or ""
    gain = candidate.score - (row.initial_score or 0.0)
    if gain <= settings.min_gain:
        return NOT_BETTER, f"gain {gain:.4f}"
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


class _Leak:
    """The words of a prompt's gold that the policy saw nowhere before it saw the gold."""

    def __init__(self, row: Scored) -> None:
        self._row = row

    def of(self, principle: str) -> str:
        """Which of them a principle quotes, in words; "" for none."""
        words = _words(principle)
        grams = (words[i : i + LEAK] for i in range(len(words) - LEAK + 1))
        quoted = [gram for gram in map(_spaced, grams) if gram in self._gold]
        leaked = [gram for gram in quoted if not any(gram in text for text in self._known)]
        return f"quotes “{min(leaked).strip()}”" if leaked else ""

    @cached_property
    def _gold(self) -> str:
        return _spaced(_words(self._row.gold))

    @cached_property
    def _known(self) -> list[str]:
        texts = (self._row.initial, *(message["content"] for message in self._row.prompt))
        return [_spaced(_words(text)) for text in texts]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _spaced(words: Sequence[str]) -> str:
    """Words with a space on both sides: they follow each other in a text where it holds this."""
    return f" {' '.join(words)} "


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


def _metrics(filtered: Iterable[_Outcome]) -> Metrics:
    """Figures of all prompts, each of which is read once."""
    total, reasons = Counter[str](), Counter[str]()
    for row in filtered:
        why = [r.reason for r in row.rejected if r.sample is not None]
        reasons.update(why)
        total.update(
            prompts=1,
            kept=bool(row.kept),
            trajectories=len(row.kept),
            candidates=len(row.kept) + len(why),
            improved=row.improved,
        )
    prompts = total["prompts"]
    return {
        "prompts_in": prompts,
        "prompts_kept": total["kept"],
        "prompts_rejected": prompts - total["kept"],
        "candidates_in": total["candidates"],
        "trajectories": total["trajectories"],
        "refinement_rate": total["improved"] / prompts if prompts else 0.0,
        **{f"rejected/{why.replace(' ', '_')}": reasons[why] for why in sorted(reasons)},
    }


def _improved(row: Scored) -> bool:
    """Whether at least one y2 beat y1, kept or not."""
    return row.initial_score is not None and any(
        c.score is not None and c.score > row.initial_score for c in row.candidates
    )
