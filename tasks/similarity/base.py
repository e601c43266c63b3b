"""The base of every similarity f(y, yG): how near a response comes to the gold response, in [0, 1].

Of several golds the nearest counts, as in ROUGE with several references (Lin 2004, section 2.1).

`tasks.score` scores the E-step with one, `tasks.judging.panel` compares answers with the same one.
A text that cannot be scored has no score but a reason, never a 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

from models.policy import PolicySettings, Progress
from models.pools.base import E, Opener, Pool, Where
from models.pools.opening import open_pool
from models.settings import Settings
from tasks.record.slot import Slot
from tasks.rows import Mined

EMPTY = "the text is empty"
NOTHING_TO_SCORE = (EMPTY, f"gold: {EMPTY}")
"""Reasons that are no failure of the similarity."""


class Score(NamedTuple):
    """f(y, yG) in [0, 1], or None with the reason why there is none."""

    value: float | None
    unscored: str | None


class Chosen(Settings):
    """Base of every similarity's settings."""

    similarity: str = "rouge_l"


S = TypeVar("S", bound=Chosen)


class Similarity(ABC, Generic[S]):
    """A similarity with its settings. Its model is loaded when it first scores.

    Args:
        seed: of a similarity that samples.
        where: a model's path on the driver → its path on this machine.
    """

    reads_prompt: ClassVar[bool] = False
    """It cannot compare two answers by the gold alone."""
    advice: ClassVar[str] = ""
    """What the user can change where more than `score.max_unscored` of the scores fail; "" where
    there is no limit, because no model and no code of the user's could fail."""

    def __init__(self, settings: S, seed: int = 0, where: Where = str) -> None:
        self.settings, self.seed, self.where = settings, seed, where

    def pool(self, opener: Opener[E]) -> Pool[E]:
        """The pool that computes its scores: in this process, unless its model has another one.

        Raises:
            UserError: Ray is asked for and not installed.
        """
        return open_pool(PolicySettings(), opener, models=())

    def check(self) -> str:
        """Describe it in words, for the checks before a run; loads nothing.

        Raises:
            UserError: what it needs is missing.
        """
        return self.settings.similarity

    def noted(self, at: Slot) -> Slot:
        """The slot with what its scores depend on beside the settings, and the device it takes."""
        return at.using(type(self).__module__)

    @abstractmethod
    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """One score for each text, in order.

        Raises:
            UserError: its model or the user's code cannot be loaded, or it cannot compare by the
                gold alone (`reads_prompt`).
        """

    def best(self, golds: Sequence[str], texts: Sequence[str]) -> list[Score]:
        """The score of each text beside the nearest of several golds, in order.

        A gold that cannot be compared with is left out where another one can.

        Args:
            golds: at least one.

        Raises:
            UserError: as `compare`.
        """
        return nearest([self.compare(gold, texts) for gold in golds])

    def scores(
        self, rows: Iterable[Mined], advance: Progress | None = None
    ) -> Iterator[tuple[Mined, list[Score]]]:
        """Each row with the scores of its `responses`, in order; `advance` counts responses.

        Raises:
            UserError: its model or the user's code cannot be loaded.
        """
        for row in rows:
            texts = responses(row)
            yield row, self.best(row.golds, texts)
            if advance:
                advance(len(texts))


def nearest(scores: Sequence[Sequence[Score]]) -> list[Score]:
    """Of each text the best of its scores; `scores` has those of all texts for each gold."""
    return [max(of_text, key=_rank) for of_text in zip(*scores, strict=True)]


def _rank(score: Score) -> float:
    return -1.0 if score.value is None else score.value


def responses(row: Mined) -> list[str]:
    """y1 and every y2."""
    return [row.initial, *(candidate.refined for candidate in row.candidates)]


def not_empty(row: Mined) -> list[str]:
    """The responses that are not empty; none where the gold is empty."""
    return [text for text in responses(row) if text.strip()] if row.gold.strip() else []
