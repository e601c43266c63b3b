"""E-step, the scores: f(y, yG), how near each response comes to the gold (STaPLe, section 3).

`score` gives y1 and every y2 a score by the similarity that the settings choose
(`tasks.similarity`); `tasks.filter` reads them. A text that cannot be scored has no score and a
reason, never a 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from constitutions.errors import UserError
from models.policy import Progress
from models.pools.base import Finished
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace, shards
from tasks.rows import CandidateScore, Mined, Scores
from tasks.similarity.base import NOTHING_TO_SCORE, Similarity, not_empty, responses
from tasks.similarity.registry import SimilaritySettings, open_similarity


class ScoreSettings(SimilaritySettings):
    """How a response is compared with the gold."""

    max_unscored: float = Field(default=0.5, ge=0, le=1)
    """Share of failed scores above which the stage ends with an error."""


@stage("score")
def score_stage(at: Slot, settings: ScoreSettings, mined: Attempt) -> Attempt:
    """mined → scored (scores alone: the texts stay in mined), shard by shard.

    Raises:
        UserError: more than `max_unscored` of the scores failed; the finished shards are kept.
    """
    similarity = open_similarity(settings)

    def compute(work: Workspace) -> Metrics:
        rows = mined.rows("mined", Mined)
        budget = _Budget(rows, similarity.advice, settings.max_unscored)
        opener = partial(open_similarity, settings, at.seed)
        total = len(rows) + int(mined.metrics.get("mined_candidates", 0))
        showing = progress(f"score {at.iteration}", total, "responses")
        with similarity.pool(opener) as pool, showing as tick:
            parts = work.sharded(
                "scored",
                Scores,
                shards(rows, work.shard_size),
                lambda missing: budget.checked(pool.map(score, missing, tick)),
                found=lambda shard: tick(sum(len(responses(row)) for row in shard)),
            )
        budget.check(list(_failures(parts)))
        return _metrics(work.table(parts))

    return similarity.noted(at).attempt("score", settings, {"mined": mined}, compute)


def score(
    similarity: Similarity[Any], rows: Iterable[Mined], advance: Progress | None = None
) -> list[Scores]:
    """The scores of y1 and every y2 of each row against its gold, in order.

    Args:
        advance: called with the number of responses that were scored.
    """
    return [
        Scores(
            prompt_id=row.prompt_id,
            initial_score=initial.value,
            initial_unscored=initial.unscored,
            candidates=tuple(
                CandidateScore(sample=candidate.sample, score=s.value, unscored=s.unscored)
                for candidate, s in zip(row.candidates, refined, strict=True)
            ),
        )
        for row, (initial, *refined) in similarity.scores(rows, advance)
    ]


class _Budget:
    """How many scores may fail. A similarity without advice has no limit."""

    def __init__(self, rows: Iterable[Mined], advice: str, share: float) -> None:
        self.advice, self.share = advice, share
        self.asked = sum(len(not_empty(row)) for row in rows) if advice else 0

    def checked(self, shards: Iterable[Finished]) -> Iterator[Finished]:
        """The shards, until too many of their scores failed: then no further one is computed."""
        failures: list[str] = []
        for done in shards:
            yield done
            failures += _failures(done.rows)
            self.check(failures)

    def check(self, failures: Sequence[str]) -> None:
        """Refuse too many failures.

        Raises:
            UserError: there are more than the share that may fail.
        """
        if not self.advice or len(failures) <= self.share * self.asked:
            return
        kinds = Counter(map(_kind, failures))
        (kind, count), *_ = kinds.most_common(1)
        example = next(reason for reason in failures if _kind(reason) == kind)
        raise UserError(
            f"{len(failures):,} scores failed, of {self.asked:,} in all; {count:,} of them like "
            f"this: {example}",
            where="setting 'score.similarity'",
            expected=f"one that fails on at most {self.share:.0%} (score.max_unscored)",
            fix=self.advice,
        )


def _failures(scored: Iterable[Scores]) -> Iterator[str]:
    """Why a response that is not empty has no score, for each such response."""
    for row in scored:
        for reason in (row.initial_unscored, *(c.unscored for c in row.candidates)):
            if reason and reason not in NOTHING_TO_SCORE:
                yield reason


def _kind(reason: str) -> str:
    """The kind of a failure: the text before the colon."""
    return reason.partition(":")[0]


def _metrics(scored: Iterable[Scores]) -> Metrics:
    """Figures of all rows, each of which is read once."""
    total, count = defaultdict[str, float](float), Counter[str]()
    for row in scored:
        each = [("initial", row.initial_score), *(("candidate", c.score) for c in row.candidates)]
        for kind, score in each:
            count[f"{kind}s" if score is not None else f"unscored {kind}s"] += 1
            total[kind] += score or 0.0
    return {
        "unscored_candidates": float(count["unscored candidates"]),
        "unscored_prompts": float(count["unscored initials"]),
        **{
            f"{kind}_similarity": total[kind] / count[f"{kind}s"]
            for kind in ("initial", "candidate")
            if count[f"{kind}s"]
        },
    }
