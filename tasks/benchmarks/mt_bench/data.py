"""MT-Bench: eighty dialogues of two turns, rated by a judge, or compared with another model's.

The benchmark of Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv
2306.05685), in the files of FastChat's `llm_judge`. `rate` and `play` ask a judge about answers;
`mt_bench_metrics` and `win_rates` turn its judgements, or a published file's, into figures.

The first turn is judged alone, the second with the whole dialogue; mathematics, reasoning and
coding with a reference answer. A pair is played twice with the places swapped, and a disagreement
is a tie. What differs from FastChat:

- Of several ratings in a judge's text the last counts (FastChat: the first), since the prompt asks
  for the explanation first, which may quote others. Of several choices also the last (FastChat: an
  [[A]] anywhere, then a [[B]]). Where there is only one, as there should be, it is the same.
- A rating outside 1 to 10, or one in a text that was cut off, is a failed judgement; the judge is
  asked again, as often as its settings say (FastChat: never).
- An answer that contains the prompt's own markers, a chat template's or a verdict gets a space
  into each of them (`disarmed`); any other answer is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from string import Formatter
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from constitutions.errors import UserError
from constitutions.foreign_text import disarm
from models.judges.llm import Asker, JudgeReply
from models.policy import Message, Messages, Progress
from tasks.benchmarks.rows import Source, clustered_mean, read_rows
from tasks.judging.rates import interval_metrics
from tasks.judging.winrate import BothOrders, NoOutcomeError, WinRate, settle, win_rate

REFERENCED = frozenset({"math", "reasoning", "coding"})
"""Categories that are judged against a reference answer."""

FAILED = -1.0
"""The score of a judgement that failed, as the files have it."""

Turns = tuple[str, str]
Turn = Literal[1, 2]
TURNS: tuple[Turn, Turn] = (1, 2)
Winner = Literal["model_1", "model_2", "tie", "error"]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Question(_Row):
    """A row of `question.jsonl`, or of the hub's copy of it."""

    question_id: int = Field(validation_alias=AliasChoices("question_id", "prompt_id"))
    category: str = Field(pattern=r"^[\w. -]+$")
    """Part of a figure's name."""
    turns: Turns = Field(validation_alias=AliasChoices("turns", "prompt"))
    reference: tuple[str, ...] | None = None
    """Reference answers to both turns, in files that have them here."""


class JudgePrompt(_Row):
    """A row of `judge_prompts.jsonl`."""

    name: str
    type: Literal["single", "pairwise"]
    system_prompt: str
    prompt_template: str

    @field_validator("prompt_template")
    @classmethod
    def _known_fields(cls, template: str) -> str:
        unknown = sorted({f for _, f, *_ in Formatter().parse(template) if f is not None} - _FIELDS)
        if unknown:
            raise ValueError(f"the template has unknown fields: {', '.join(unknown)}")
        return template


class _Choice(_Row):
    turns: Turns


class ModelAnswer(_Row):
    """A row of a model's or a reference's answers; only the first choice counts."""

    question_id: int
    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]


class Rating(_Row):
    """A row of `…_single.jsonl`: one judgement of one turn; score −1: it failed."""

    question_id: int
    model: str
    judge: tuple[str, str]
    """The judge's name and the prompt's."""
    user_prompt: str = ""
    judgment: str
    score: float
    turn: Turn
    failure: str | None = None
    """Why it failed, where we know."""

    @field_validator("score")
    @classmethod
    def _in_range(cls, score: float) -> float:
        if score != FAILED and not 0 <= score <= 10:
            raise ValueError(f"{score} is not a rating from 0 to 10, nor −1 for a failed one")
        return score


class Game(_Row):
    """A row of `…_pair.jsonl`: two models' answers in both orders (g1: model_1 first)."""

    question_id: int
    model_1: str
    model_2: str
    g1_winner: Winner
    g2_winner: Winner
    judge: tuple[str, str]
    g1_judgment: str = ""
    g2_judgment: str = ""
    turn: Turn
    failure: str | None = None
    """Why a game failed, where we know."""

    @property
    def both_orders(self) -> BothOrders:
        """model_1's outcomes when it was read first and when second; None: that game failed."""
        return BothOrders(_POINTS.get(self.g1_winner), _POINTS.get(self.g2_winner))

    @property
    def outcome(self) -> float | None:
        """1 when model_1 won both games, 0 when it lost both, else ½; None when one failed."""
        return settle(self.both_orders)


_POINTS = {"model_1": 1.0, "tie": 0.5, "model_2": 0.0}
_ANSWERS = ("answer", "answer_1", "answer_2", "answer_a", "answer_b")
_ANSWERS_OF_TWO = ("answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2")
_ASKED = ("question", "question_1", "question_2", "ref_answer_1", "ref_answer_2")
_FIELDS = frozenset((*_ANSWERS, *_ANSWERS_OF_TWO, *_ASKED))


def read_questions(path: Source) -> list[Question]:
    """The dialogues of `question.jsonl`.

    Raises:
        UserError: see `read_rows`.
    """
    return read_rows(path, Question, lambda row: row.question_id)


def read_judge_prompts(path: Source) -> dict[str, JudgePrompt]:
    """The prompts of `judge_prompts.jsonl`, by name.

    Raises:
        UserError: see `read_rows`.
    """
    return {row.name: row for row in read_rows(path, JudgePrompt, lambda row: row.name)}


def read_answers(path: Source) -> dict[int, Turns]:
    """A model's answers, or the reference's, by question.

    Raises:
        UserError: see `read_rows`.
    """
    rows = read_rows(path, ModelAnswer, lambda row: row.question_id)
    return {row.question_id: row.choices[0].turns for row in rows}


def mt_bench_metrics(
    ratings: Sequence[Rating],
    questions: Sequence[Question],
    *,
    seed: int,
    resamples: int = 10_000,
) -> dict[str, float]:
    """One model's scores from 1 to 10, with intervals: `mt_bench/score`, per turn, per category.

    A score is the mean over judgements that did not fail, and is left out when all did. Its
    interval comes from a bootstrap over questions. `mt_bench/failed` counts the turns of the
    questions that have no score: failed and absent ones.

    Raises:
        ValueError: the ratings are of several models, or of unknown questions.
    """
    if len({r.model for r in ratings}) > 1:
        raise ValueError("the ratings are of several models: choose one")
    categories = _categories((r.question_id for r in ratings), questions)
    judged = [r for r in ratings if r.score != FAILED]
    groups = {"score": judged}
    for turn in TURNS:
        groups[f"turn_{turn}"] = [r for r in judged if r.turn == turn]
    for name in dict.fromkeys(categories.values()):
        groups[name] = [r for r in judged if categories[r.question_id] == name]
    figures = {"mt_bench/failed": float(len(TURNS) * len(questions) - len(judged))}
    for name, rows in groups.items():
        if rows:
            mean = clustered_mean(_by_question(rows), seed=seed, resamples=resamples)
            figures |= interval_metrics(f"mt_bench/{name}", mean)
    return figures


def win_rates(
    games: Sequence[Game],
    questions: Sequence[Question],
    *,
    seed: int,
    resamples: int = 10_000,
) -> dict[str, WinRate]:
    """model_1's win rate: "overall", "turn_1", "turn_2" and the categories, where any game counts.

    The rate is that of the games. A question's games win or lose together, because the second
    turn's answers follow the first's: interval, p-value and counts are of questions, each with the
    mean of its games.

    Raises:
        ValueError: the games are of several pairs of models, or of unknown questions.
    """
    if len({(g.model_1, g.model_2) for g in games}) > 1:
        raise ValueError("the games are of several pairs of models: choose one")
    categories = _categories((g.question_id for g in games), questions)
    groups: dict[str, dict[int, list[float | None]]] = {}
    for game in games:
        category = categories[game.question_id]
        for name in ("overall", f"turn_{game.turn}", category):
            groups.setdefault(name, {}).setdefault(game.question_id, []).append(game.outcome)
    rates = {}
    for name, of_questions in groups.items():
        with suppress(NoOutcomeError):
            rates[name] = _clustered(list(of_questions.values()), seed, resamples)
    return rates


def _clustered(games: Sequence[Sequence[float | None]], seed: int, resamples: int) -> WinRate:
    """The win rate of the games of several questions."""
    judged = [[outcome for outcome in some if outcome is not None] for some in games]
    means = [fmean(some) if some else None for some in judged]
    found = win_rate(means, seed=seed, resamples=1)
    sums = [(sum(some), len(some)) for some in judged]
    mean, low, high = clustered_mean(sums, seed=seed, resamples=resamples)
    return replace(found, rate=mean, low=low, high=high)


def _categories(asked: Iterable[int], questions: Sequence[Question]) -> dict[int, str]:
    categories = {q.question_id: q.category for q in questions}
    unknown = sorted(set(asked) - set(categories))
    if unknown:
        raise ValueError(f"there are judgements of unknown questions: {unknown[:10]}")
    return categories


def _by_question(ratings: Iterable[Rating]) -> list[tuple[float, int]]:
    groups: dict[int, tuple[float, int]] = {}
    for rating in ratings:
        total, count = groups.get(rating.question_id, (0.0, 0))
        groups[rating.question_id] = (total + rating.score, count + 1)
    return list(groups.values())


_VERDICT = r"\[(?=\[\s*(?:\d+(?:\.\d+)?|[ABC])\s*\]\])"
LONGEST_MARKER = 80
"""Longest line of a template, in characters, that marks a place and is no instruction."""


@dataclass(frozen=True, kw_only=True)
class JudgePrompts:
    """What a judge reads: prompts, filled in with questions, answers and reference answers."""

    prompts: Mapping[str, JudgePrompt]
    """By name."""
    references: Mapping[int, Turns]
    """Reference answers by question, for the categories that want one."""
    control: Collection[str] = ()
    """The judge's own control strings (`models.judges.llm.control_of`)."""

    def single(self, question: Question, turn: Turn, answers: Turns) -> tuple[str, Messages]:
        """The prompt's name and the messages that ask for a rating of one turn.

        Raises:
            UserError: there is no such judge prompt.
        """
        shown = [self.disarmed(answer) for answer in answers]
        fields = {"answer": shown[0], "answer_1": shown[0], "answer_2": shown[1]}
        return self._filled(("single-v1", "single-math-v1"), question, turn, fields)

    def pair(
        self, question: Question, turn: Turn, first: Turns, second: Turns
    ) -> tuple[str, Messages]:
        """The prompt's name and the messages that compare two answers, the `first` as assistant A.

        Raises:
            UserError: there is no such judge prompt.
        """
        fields: dict[str, str] = {}
        for letter, answers in (("a", first), ("b", second)):
            shown = [self.disarmed(answer) for answer in answers]
            fields |= {f"answer_{letter}": shown[0], f"answer_{letter}_1": shown[0]}
            fields |= {f"answer_{letter}_2": shown[1]}
        return self._filled(("pair-v2", "pair-math-v1"), question, turn, fields)

    def _filled(
        self, names: tuple[str, str], question: Question, turn: Turn, fields: Mapping[str, str]
    ) -> tuple[str, Messages]:
        """The prompt of these two names (without and with a reference), filled in once: braces in
        an answer stay braces. Without a reference answer, a question is judged without one.
        """
        reference = self.references.get(question.question_id)
        referenced = question.category in REFERENCED and reference is not None
        name = names[referenced] + ("-multi-turn" if turn == 2 else "")
        if name not in self.prompts:
            raise UserError(
                f"there is no judge prompt {name}",
                where="MT-Bench's judge prompts",
                expected="one of each name, as in judge_prompts.jsonl; found "
                f"{sorted(self.prompts)}",
            )
        prompt, (one, two) = self.prompts[name], reference or ("", "")
        text = prompt.prompt_template.format(
            question=question.turns[0],
            question_1=question.turns[0],
            question_2=question.turns[1],
            ref_answer_1=one,
            ref_answer_2=two,
            **fields,
        )
        system = Message(role="system", content=prompt.system_prompt)
        return name, (system, Message(role="user", content=text))

    def disarmed(self, answer: str) -> str:
        """An answer with a space inside whatever a judge could take for more than words.

        That is a line that marks a place in any of the prompts ("[The End of Assistant's Answer]",
        in any case and spacing), a verdict ([[10]], [[A]]), and what chat templates write between
        turns (`disarm`). So no answer can end itself, and no quotation of it is a verdict.
        """
        return disarm(self._armed.sub(r"\g<0> ", answer), self.control)

    @cached_property
    def _armed(self) -> re.Pattern[str]:
        """Where `disarmed` puts a space: after a verdict's first bracket, or a marker's."""
        texts = (p.prompt_template for p in self.prompts.values())
        lines = {line.strip() for text in texts for line in text.split("\n")}
        short = sorted(x for x in lines if x and "{" not in x and len(x) < LONGEST_MARKER)
        markers = [r"\s+".join(map(re.escape, line.split())).replace("'", "['’]") for line in short]
        return re.compile(rf"{_VERDICT}|(?=(?:{'|'.join(markers) or '(?!)'})).", re.I | re.S)


def rate(
    questions: Sequence[Question],
    answers: Mapping[int, Turns],
    prompts: JudgePrompts,
    judge: Asker,
    *,
    model: str,
    judge_name: str,
    advance: Progress | None = None,
) -> list[Rating]:
    """Have every answer rated: two ratings a question, in the order of the questions.

    Raises:
        UserError: an answer or a judge prompt is missing.
    """
    _complete(questions, answers)
    asked = [
        (q, turn, *prompts.single(q, turn, answers[q.question_id]))
        for q in questions
        for turn in TURNS
    ]
    replies = judge.ask([messages for *_, messages in asked], _rating, advance)
    return [
        Rating(
            question_id=q.question_id,
            model=model,
            judge=(judge_name, name),
            user_prompt=messages[-1]["content"],
            judgment=reply.feedback,
            score=float(reply.result or FAILED),
            turn=turn,
            failure=reply.failure,
        )
        for (q, turn, name, messages), reply in zip(asked, replies, strict=True)
    ]


def play(
    questions: Sequence[Question],
    ours: Mapping[int, Turns],
    theirs: Mapping[int, Turns],
    prompts: JudgePrompts,
    judge: Asker,
    *,
    models: tuple[str, str],
    judge_name: str,
    advance: Progress | None = None,
) -> list[Game]:
    """Have two models' answers compared in both orders: a game row for each turn of a question.

    Raises:
        UserError: an answer or a judge prompt is missing.
    """
    _complete(questions, ours)
    _complete(questions, theirs)
    rounds = [(q, turn) for q in questions for turn in TURNS]
    asked = [
        prompts.pair(q, turn, first[q.question_id], second[q.question_id])
        for q, turn in rounds
        for first, second in ((ours, theirs), (theirs, ours))
    ]
    replies = judge.ask([messages for _, messages in asked], read_choice, advance)
    return [
        Game(
            question_id=q.question_id,
            model_1=models[0],
            model_2=models[1],
            g1_winner=_winner(g1, ("model_1", "model_2")),
            g2_winner=_winner(g2, ("model_2", "model_1")),
            judge=(judge_name, name),
            g1_judgment=g1.feedback,
            g2_judgment=g2.feedback,
            turn=turn,
            failure=g1.failure or g2.failure,
        )
        for (q, turn), (name, _), g1, g2 in zip(
            rounds, asked[::2], replies[::2], replies[1::2], strict=True
        )
    ]


def _complete(questions: Sequence[Question], answers: Mapping[int, Turns]) -> None:
    missing = [q.question_id for q in questions if q.question_id not in answers]
    if missing:
        raise UserError(f"questions without an answer: {missing[:10]}", where="MT-Bench")


def _rating(judgment: str) -> str | None:
    rating = read_rating(judgment)
    return None if rating is None else str(rating)


def _winner(reply: JudgeReply, places: tuple[Winner, Winner]) -> Winner:
    winners: dict[str | None, Winner] = {"A": places[0], "B": places[1], "C": "tie"}
    return winners.get(reply.result, "error")


def read_rating(judgment: str) -> float | None:
    """The last [[n]] of a judge's text, or else its last [n]; None unless it is from 1 to 10."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.findall(rf"\[\[{number}\]\]", judgment) or re.findall(rf"\[{number}\]", judgment)
    rating = float(found[-1]) if found else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def read_choice(judgment: str) -> Literal["A", "B", "C"] | None:
    """The last [[A]], [[B]] or [[C]] (a tie) of a judge's text; None when there is none."""
    found = re.findall(r"\[\[([ABC])\]\]", judgment)
    return found[-1] if found else None
