"""MT-Bench on the policy of an iteration: dialogues of two turns, each answered y1 → z → y2.

The second turn follows the policy's own answer to the first. Writes FastChat's files: the answers
(`mt_bench/model_answer.jsonl`, without time stamps: the same answers are the same bytes) and the
judgements (`mt_bench/model_judgment_single.jsonl`, `…_pair.jsonl`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

from pydantic import BaseModel, Field

from constitutions.errors import UserError
from models.judges.base import Judge
from models.judges.llm import Asker, control_of
from models.judges.registry import JudgeSettings
from models.policy import Message, Policy, Progress
from tasks.benchmarks.base import Column, RunSettings
from tasks.benchmarks.mt_bench.data import (
    FAILED,
    TURNS,
    Game,
    JudgePrompts,
    Question,
    Rating,
    Turns,
    mt_bench_metrics,
    play,
    rate,
    read_answers,
    read_judge_prompts,
    read_questions,
    win_rates,
)
from tasks.benchmarks.rows import single_turn, spread, write_lines
from tasks.judging.panel import Judges, Panel
from tasks.judging.rates import order_figures, rate_metrics, too_many_failed
from tasks.policies.answers import Generation, Respondent, Which, given
from tasks.record.work import Metrics
from tasks.rows import Answer, DialogueAnswer, Prompt, fields, prompt_id

Judged = TypeVar("Judged", bound=BaseModel)

NAME = "mt_bench"
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
"""At which FastChat samples the answers to each category."""


class MTBenchSettings(RunSettings):
    """MT-Bench: ratings from 1 to 10 over two turns, and games against a reference's answers.

    The judge's model reads MT-Bench's own prompts; its kind and its rubric do not matter here.
    """

    size = 80
    turns = len(TURNS)
    columns = (
        Column("MT-Bench", f"{NAME}/score", form="score"),
        Column("MT-Bench, turn 2", f"{NAME}/turn_2", form="score"),
    )
    needs_judge = True

    questions: str = Field(min_length=1)
    """The benchmark's `question.jsonl`."""
    judge_prompts: str = Field(min_length=1)
    """The benchmark's `judge_prompts.jsonl`."""
    references: str | None = None
    """Reference answers for the judge (`gpt-4.jsonl`); when empty those within the questions."""
    against: str | None = None
    """Another model's answers, to be played against as well."""
    category_temperatures: bool = True
    """Answer each category at FastChat's temperature, and not at evaluate's."""

    @classmethod
    def can_judge(cls, judge: type[Judge]) -> bool:
        """See `RunSettings.can_judge`."""
        return judge.generates

    def judge_questions(self, judge: JudgeSettings) -> tuple[int, int]:
        """See `RunSettings.judge_questions`: it rates each turn, and may play it in both orders."""
        return 3 if self.against else 1, 1

    def load(self, judge: JudgeSettings | None) -> MTBench:
        """See `RunSettings.load`; each question needs its judge prompts and opponent's answer."""
        assert judge is not None, "it needs a judge"
        questions = spread(read_questions(self.questions), self.limit)
        prompts = JudgePrompts(
            prompts=read_judge_prompts(self.judge_prompts),
            references=read_answers(self.references) if self.references else _own(questions),
        )
        against = read_answers(self.against) if self.against else None
        missing = [q.question_id for q in questions if q.question_id not in (against or {})]
        if self.against and missing:
            raise UserError(f"questions without an answer: {missing[:10]}", where=self.against)
        for question, turn in product(questions, TURNS):  # a missing judge prompt raises
            prompts.single(question, turn, ("", ""))
            if self.against:
                prompts.pair(question, turn, ("", ""), ("", ""))
        return MTBench(
            judge=judge,
            which=self.answer,
            questions=questions,
            prompts=prompts,
            against=against,
            temperatures=TEMPERATURES if self.category_temperatures else {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FastChatLine:
    """A row of one of FastChat's files, as JSON."""

    json: str


@dataclass(frozen=True, kw_only=True)
class MTBench:
    """The benchmark as its files have it."""

    judge: JudgeSettings
    which: Which
    questions: Sequence[Question]
    prompts: JudgePrompts
    against: Mapping[int, Turns] | None
    """Another model's answers by question; None: there are no games."""
    temperatures: Mapping[str, float]
    """By category; other categories are answered at evaluate's temperature."""

    def answer(self, respondent: Respondent) -> list[DialogueAnswer]:
        """Two rows a question."""
        return respondent.in_shards(
            f"{NAME}-answers",
            DialogueAnswer,
            self.questions,
            partial(self._dialogues, respondent.generation),
            prompts_each=len(TURNS),
        )

    def _dialogues(
        self, generation: Generation, policy: Policy, questions: Sequence[Question], tick: Progress
    ) -> list[DialogueAnswer]:
        groups: dict[float | None, list[Question]] = {}
        for question in questions:
            groups.setdefault(self.temperatures.get(question.category), []).append(question)
        rows = []
        for temperature, group in groups.items():
            asked = [single_turn(q.turns[0], NAME) for q in group]
            first = generation.ask(policy, asked, tick, temperature)
            asked = [self._second(q, a) for q, a in zip(group, first, strict=True)]
            second = generation.ask(policy, asked, tick, temperature)
            for turn, answers in zip(TURNS, (first, second), strict=True):
                rows += [
                    DialogueAnswer(**fields(a), question_id=q.question_id, turn=turn)
                    for q, a in zip(group, answers, strict=True)
                ]
        return rows

    def _second(self, question: Question, first: Answer) -> Prompt:
        """The second turn, after the answer to the first one that is measured."""
        turns = (
            Message(role="user", content=question.turns[0]),
            Message(role="assistant", content=given(first, self.which).text),
            Message(role="user", content=question.turns[1]),
        )
        return Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source=NAME)

    def measure(self, answers: Sequence[DialogueAnswer], panel: Panel) -> Metrics:
        """Scores from 1 to 10, overall, per turn and per category; the win rate in [0, 1]."""
        texts = {(a.question_id, a.turn): given(a, self.which).text for a in answers}
        ours = {
            q.question_id: (texts[q.question_id, 1], texts[q.question_id, 2])
            for q in self.questions
        }
        self._write(
            panel, "model_answer", [_answer_line(panel.model, *item) for item in ours.items()]
        )
        figures = self._rated(ours, panel)
        return figures | (self._played(ours, self.against, panel) if self.against else {})

    def _rated(self, ours: Mapping[int, Turns], panel: Panel) -> Metrics:
        job = partial(rate, answers=ours, model=panel.model)
        ratings = self._judged(panel, "single", Rating, job, len(TURNS))
        failures = [row.failure or "" for row in ratings if row.score == FAILED]
        self._accept(failures, len(ratings), "MT-Bench's ratings", panel)
        how = {"seed": panel.seed, "resamples": panel.resamples}
        return mt_bench_metrics(ratings, self.questions, **how)

    def _played(
        self, ours: Mapping[int, Turns], theirs: Mapping[int, Turns], panel: Panel
    ) -> Metrics:
        job = partial(play, ours=ours, theirs=theirs, models=(panel.model, "reference"))
        games = self._judged(panel, "pair", Game, job, 2 * len(TURNS))
        failures = [game.failure or "" for game in games if game.outcome is None]
        self._accept(failures, len(games), "MT-Bench's games", panel)
        rates = win_rates(games, self.questions, seed=panel.seed, resamples=panel.resamples)
        figures = order_figures(NAME, [game.both_orders for game in games])
        for name, found in rates.items():
            place = f"{NAME}/win_rate" if name == "overall" else f"{NAME}/win_rate/{name}"
            figures |= rate_metrics(place, found)
        return figures

    def _judged(
        self,
        panel: Panel,
        kind: str,
        row_type: type[Judged],
        judge: Callable[..., Sequence[Judged]],
        each: int,
    ) -> list[Judged]:
        """Rows of one of the judgements' files, made in shards of questions, and the file.

        Args:
            judge: `rate` or `play`, with the arguments that only it takes.
            each: judgements of a question.
        """
        lines = panel.in_shards(
            f"{NAME}-{kind}",
            FastChatLine,
            self.questions,
            self.judge,
            partial(_lines, judge, self.prompts, self.judge, panel.seed),
            each=each,
        )
        self._write(panel, f"model_judgment_{kind}", [line.json for line in lines])
        return [row_type.model_validate_json(line.json) for line in lines]

    def _accept(self, failures: Sequence[str], of: int, what: str, panel: Panel) -> None:
        if len(failures) == of or len(failures) / of > panel.max_failed:
            raise too_many_failed(failures, of, what, self.judge.model_name, panel.max_failed)

    def _write(self, panel: Panel, name: str, lines: Sequence[str]) -> None:
        write_lines(panel.work.outputs / NAME / f"{name}.jsonl", lines)


def _lines(
    judge: Callable[..., Sequence[BaseModel]],
    prompts: JudgePrompts,
    settings: JudgeSettings,
    seed: int,
    judges: Judges,
    questions: Sequence[Question],
    tick: Progress,
) -> list[FastChatLine]:
    policy = judges.model(settings)
    found = judge(
        questions,
        prompts=replace(prompts, control=control_of(policy)),
        judge=Asker(policy=policy, settings=settings, seed=seed),
        judge_name=settings.model_name,
        advance=tick,
    )
    return [FastChatLine(json=row.model_dump_json(exclude_none=True)) for row in found]


def _answer_line(model: str, question: int, turns: Turns) -> str:
    identity = hashlib.sha256(f"{model}/{question}".encode()).hexdigest()[:22]
    return json.dumps(
        {
            "question_id": question,
            "answer_id": identity,
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
        },
        ensure_ascii=False,
    )


def _own(questions: Sequence[Question]) -> dict[int, Turns]:
    """The reference answers within the questions' file."""
    given_ = ((q.question_id, q.reference or ()) for q in questions)
    return {number: (own[0], own[1]) for number, own in given_ if len(own) == len(TURNS)}
