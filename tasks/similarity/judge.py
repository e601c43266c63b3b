"""The grade of an LLM judge that reads the prompt and the gold response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from pydantic import field_validator, model_validator

from constitutions.errors import UserError
from models.judges.absolute import AbsoluteJudge, Graded
from models.judges.base import Grade
from models.judges.registry import JudgeSettings, judge_pool, located, open_policy
from models.policy import Progress
from models.pools.base import E, Opener, Pool
from tasks.judging.judge import check_judge, noted
from tasks.record.slot import Slot
from tasks.rows import Mined
from tasks.similarity.base import EMPTY, Chosen, Score, Similarity, not_empty, responses


class GradeSettings(Chosen):
    """Settings of the similarity "judge"."""

    judge: JudgeSettings | None = None
    """The LLM judge of the similarity "judge": kind "absolute". Its `show_gold` is always on."""

    @field_validator("judge")
    @classmethod
    def _grades_beside_the_gold(cls, judge: JudgeSettings | None) -> JudgeSettings | None:
        if judge is None:
            return None
        if not judge.judge_type.grades:
            raise ValueError(f"a judge that grades: kind 'absolute', not '{judge.kind}'")
        if judge.chosen_rubric.principle:
            raise ValueError("a rubric without a principle: the first response has none")
        return judge.model_copy(update={"show_gold": True})

    @model_validator(mode="after")
    def _judge_where_it_is_asked(self) -> GradeSettings:
        if self.similarity == "judge" and self.judge is None:
            raise ValueError("score.judge to be set where score.similarity is 'judge'")
        if self.similarity != "judge" and self.judge is not None:
            raise ValueError("score.similarity to be 'judge', or score.judge to be unset")
        return self


class JudgeGrade(Similarity[GradeSettings]):
    """f(y, yG) = (n - 1) / 4 for the grade n from 1 to 5."""

    reads_prompt = True
    advice = "change the model, max_tokens, retries or rubric of score.judge"

    @property
    def _settings(self) -> JudgeSettings:
        assert self.settings.judge is not None, "GradeSettings sees to it"
        return self.settings.judge

    @cached_property
    def judge(self) -> AbsoluteJudge:
        """The judge, with its model in memory.

        Raises:
            UserError: the model cannot be loaded, or its endpoint cannot be used.
        """
        settings = located(self._settings, self.where)
        return AbsoluteJudge(open_policy(settings), settings, seed=self.seed)

    def pool(self, opener: Opener[E]) -> Pool[E]:
        """See `Similarity.pool`."""
        return judge_pool(self._settings, opener)

    def check(self) -> str:
        """See `Similarity.check`."""
        return f"{super().check()} ({check_judge(self._settings)})"

    def noted(self, at: Slot) -> Slot:
        """See `Similarity.noted`."""
        return noted(super().noted(at), self._settings)

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """Not possible: the grade needs the prompt.

        Raises:
            UserError: always.
        """
        raise UserError(
            "the similarity 'judge' grades an answer to a prompt; it cannot compare two answers",
            where="settings 'score.similarity' and 'evaluate.judge.kind'",
            expected="a judge of its own for the held-out answers",
            fix="set evaluate.judge to the judge of score.judge, with show_gold: true",
        )

    def scores(
        self, rows: Iterable[Mined], advance: Progress | None = None
    ) -> Iterator[tuple[Mined, list[Score]]]:
        """Ask about the responses of all rows at once; about equal responses to a prompt once."""
        rows = list(rows)
        asked = [(row, text) for row in rows for text in dict.fromkeys(not_empty(row))]
        if advance:
            advance(sum(len(responses(row)) for row in rows) - len(asked))
        items = [Graded(prompt=row.prompt, gold=row.gold, response=text) for row, text in asked]
        grades = iter(self.judge.grade(items, advance))
        for row in rows:
            of_text = {text: next(grades) for text in dict.fromkeys(not_empty(row))}
            yield row, [_score(row, text, of_text) for text in responses(row)]


def _score(row: Mined, text: str, grades: Mapping[str, Grade]) -> Score:
    if text in grades:
        grade, failure = grades[text]
        return Score(None if grade is None else (grade - 1) / 4, failure)
    return Score(None, EMPTY if row.gold.strip() else f"gold: {EMPTY}")
