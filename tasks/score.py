"""E-step, the scores: f(y, yG), how near each response comes to the gold (STaPLe, section 3).

`score` gives y1 and every y2 a score by the similarity that the settings choose
(`tasks.similarity`); `tasks.filter` reads them. A text that cannot be scored has no score and a
reason, never a 0.
"""

from __future__ import annotations

from collections import Counter
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
from tasks.rows import Mined, Scored, ScoredCandidate, fields
from tasks.similarity.base import Similarity, not_empty, responses
from tasks.similarity.registry import SimilaritySettings, open_similarity


class ScoreSettings(SimilaritySettings):
    """How a response is compared with the gold."""

    max_unscored: float = Field(default=0.5, ge=0, le=1)
    """Share of failed scores above which the stage ends with an error."""


@stage("score")
def score_stage(at: Slot, settings: ScoreSettings, mined: Attempt) -> Attempt:
    """mined → scored, shard by shard.

    Raises:
        UserError: more than `max_unscored` of the scores failed; the finished shards are kept.
    """
    similarity = open_similarity(settings)

    def compute(work: Workspace) -> Metrics:
        rows = mined.read("mined", Mined)
        budget = _Budget(rows, similarity.advice, settings.max_unscored)
        opener = partial(open_similarity, settings, at.seed)
        showing = progress(f"score {at.iteration}", _responses(rows), "responses")
        with similarity.pool(opener) as pool, showing as tick:
            scored = work.sharded(
                "scored",
                Scored,
                shards(rows, work.shard_size),
                lambda missing: budget.checked(pool.map(_score_shard, missing, tick)),
                found=lambda shard: tick(_responses(shard)),
            )
        budget.check(list(_failures(scored)))
        return _metrics(scored)

    return similarity.noted(at).attempt("score", settings, {"mined": mined}, compute)


def score(
    rows: Iterable[Mined], similarity: Similarity[Any], advance: Progress | None = None
) -> Iterator[Scored]:
    """Score y1 and every y2 of each row against its gold, in order.

    Args:
        advance: called with the number of responses that were scored.
    """
    for row, (initial, *refined) in similarity.scores(rows, advance):
        candidates = tuple(
            ScoredCandidate(**fields(candidate), score=s.value, unscored=s.unscored)
            for candidate, s in zip(row.candidates, refined, strict=True)
        )
        yield Scored(
            **fields(row) | {"candidates": candidates},
            initial_score=initial.value,
            initial_unscored=initial.unscored,
        )


def _score_shard(
    similarity: Similarity[Any], rows: Sequence[Mined], advance: Progress
) -> list[Scored]:
    return list(score(rows, similarity, advance))


class _Budget:
    """How many scores may fail. A similarity without advice has no limit."""

    def __init__(self, rows: Iterable[Mined], advice: str, share: float) -> None:
        self.asked = sum(len(not_empty(row)) for row in rows)
        self.advice, self.share = advice, share

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


def _failures(scored: Iterable[Scored]) -> Iterator[str]:
    """Why a response that is not empty has no score, for each such response."""
    for row in scored:
        compared = set(not_empty(row))
        reasons = [row.initial_unscored, *(c.unscored for c in row.candidates)]
        pairs = zip(responses(row), reasons, strict=True)
        yield from (reason for text, reason in pairs if reason and text in compared)


def _kind(reason: str) -> str:
    """The kind of a failure: the text before the colon."""
    return reason.partition(":")[0]


def _responses(rows: Sequence[Mined]) -> int:
    return sum(len(responses(row)) for row in rows)


def _metrics(scored: Sequence[Scored]) -> Metrics:
    all_candidates = [c.score for row in scored for c in row.candidates]
    candidates = [score for score in all_candidates if score is not None]
    initial = [row.initial_score for row in scored if row.initial_score is not None]
    means = {"initial_similarity": initial, "candidate_similarity": candidates}
    return {
        "unscored_candidates": float(len(all_candidates) - len(candidates)),
        "unscored_prompts": float(len(scored) - len(initial)),
        **{name: sum(values) / len(values) for name, values in means.items() if values},
    }
