"""The turns that each stage asks of its models, in tokens, before anything runs.

`flows.plan.plan` turns them into hours and bytes. The wording is that of `models.prompts`; a turn
is expected to fill a share, `Assumed.filled`, of its token limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from flows.methods import method_of
from flows.schema import ExperimentSettings
from models.judges.registry import JudgeSettings
from models.policy import Messages
from models.prompts import Templates
from models.templates import templates_of
from tasks.corpus.prompts import CorpusSettings, load_corpus
from tasks.evaluate import EvaluateSettings
from tasks.judging.pairs import arms
from tasks.mine import MineSettings
from tasks.prompts import PromptSettings, prompt_sets
from tasks.rows import Prompt
from tasks.teach import lessons, skill_examples

CHARACTERS = 4
"""Characters of an English token, about."""
MARKS = 5
"""Tokens that a chat template puts around a turn."""
USUAL = {
    "hh-rlhf": (430, 170),
    "ultrafeedback": (660, 1160),
    "tldr": (1410, 140),
    "hotpotqa": (5790, 12),
}
"""Mean characters of prompt and gold, by format, for data sets that are not on this disk; from
samples of 100 to 2,300 rows."""
UNKNOWN = (1000, 500)
"""Mean characters of prompt and gold for other formats: a guess."""
LONG = 1.5
"""Length of the longest prompts of such a data set as a multiple of the mean, at least."""
ACCEPTED = 0.7
"""Share of the mined prompts of which something is kept."""
JUDGE_WORDS = 450
"""Tokens of a judge's instructions and rubric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What the settings do not say."""

    filled: float = 0.3
    """Share of its token limit that a sampled turn takes."""
    accepted: float | None = None
    """Trajectories that are kept for each mined prompt; None: `Workload.accepted`."""
    prompt: float | None = None
    """Tokens of a prompt; None: by its characters."""
    given: float | None = None
    """SAMI: tokens of a constitution in a prompt; None: by its characters."""
    clusters: tuple[int, ...] = ()
    """Trajectories of each cluster of an iteration, the tail's included; empty: unknown."""
    like: str = ""
    """The experiment that these figures were measured on; empty: they are assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and golds, and those of the longest prompts."""

    prompt: float
    gold: float
    longest: float
    golds: float = 1.0
    """Mean number of golds of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTurn:
    """What a model samples for one prompt in one role."""

    samples: int
    limit: int
    shared: float = 0.0
    """Tokens before it that its samples have in common: prefilled once."""
    own: float = 0.0
    """Tokens before it that each sample has for itself."""

    @property
    def context(self) -> float:
        """Tokens before it."""
        return self.shared + self.own

    @property
    def alike(self) -> bool:
        """Whether its samples share a prefix: the engine does so from half of the prompt on."""
        return self.shared >= self.own

    @property
    def prefilled(self) -> float:
        """Tokens of prompts that are computed for all samples together."""
        if self.alike:
            return self.shared + self.samples * self.own
        return self.samples * self.context

    def cached(self, new: float) -> float:
        """Tokens in the cache for each sample when it has `new` ones."""
        return new + (self.shared / self.samples + self.own if self.alike else self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTurns:
    """Turns that a judge is asked for on each of so many prompts."""

    stage: str
    judge: JudgeSettings
    prompts: int
    turn: SampledTurn


def lengths(settings: PromptSettings, seed: int) -> Lengths:
    """Of local files and embedded worlds as they are, of data sets as their formats usually are.

    Raises:
        UserError: a file is not there, or wrong.
    """
    if settings.world:
        few = settings.model_copy(update={"first": min(settings.first, 200)})
        rows = prompt_sets(few, seed, 1).rows
        return _measured(rows)
    found = [_source(source, seed) for source in settings.corpora]
    known = all(rows for rows, _ in found)
    weights = [rows if known else 1 for rows, _ in found]
    return Lengths(
        prompt=fmean((each.prompt for _, each in found), weights),
        gold=fmean((each.gold for _, each in found), weights),
        longest=max(each.longest for _, each in found),
        golds=fmean((each.golds for _, each in found), weights),
    )


def _source(source: CorpusSettings, seed: int) -> tuple[int, Lengths]:
    """Rows that are used, 0 where that is unknown, and how long they are."""
    if source.path is None:
        prompt, gold = USUAL.get(source.format) or USUAL.get(_last(source.name), UNKNOWN)
        gold *= bool(source.gold_column)
        return source.rows or 0, _tokens(prompt, gold, LONG * prompt)
    rows = load_corpus([source], seed).rows
    return len(rows), _measured(rows)


def _last(name: str | None) -> str:
    """ "owner/tldr" as "tldr"."""
    return (name or "").rpartition("/")[2].lower()


def _measured(rows: Sequence[Prompt]) -> Lengths:
    prompts = [sum(len(m["content"]) for m in row.prompt) for row in rows]
    of_text = _tokens(fmean(prompts), fmean(len(row.gold) for row in rows), max(prompts))
    return replace(of_text, golds=fmean(len(row.golds) for row in rows))


def _tokens(prompt: float, gold: float, longest: float) -> Lengths:
    """From characters."""
    marked = (2 * MARKS + size / CHARACTERS for size in (prompt, longest))
    return Lengths(prompt=next(marked), gold=gold / CHARACTERS, longest=next(marked))


@dataclass(frozen=True)
class Workload:
    """The turns of an experiment's stages; `flows.plan.sami` has those of SAMI."""

    settings: ExperimentSettings
    lengths: Lengths
    assumed: Assumed

    rest = "scores by words, filter, cluster"
    """The stages that no estimate counts."""

    @property
    def guided(self) -> bool:
        """Whether a principle stands between the policy's two answers."""
        return method_of(self.settings).guided

    @property
    def given(self) -> float:
        """Tokens of the constitution that every prompt holds."""
        return 0.0

    @property
    def rows(self) -> int:
        """Rows of `learned` for each example that is trained on."""
        return 1

    @property
    def step_rows(self) -> int:
        """Rows of a training step, which need not be in memory together."""
        return self.settings.train.batch_size

    @property
    def prompt(self) -> float:
        """Tokens of a prompt."""
        return self.lengths.prompt if self.assumed.prompt is None else self.assumed.prompt

    @property
    def accepted(self) -> float:
        """Rows to train on for each prompt: its golds, or the trajectories that are kept of what is
        mined; soft selection keeps several."""
        if not method_of(self.settings).mines:
            return self.lengths.golds
        if self.assumed.accepted is not None:
            return self.assumed.accepted
        soft = self.settings.filter.selection == "soft"
        return ACCEPTED * (max(1.0, self.settings.mine.samples / 2) if soft else 1.0)

    def explored(self) -> tuple[str, list[SampledTurn]] | None:
        """The stage that samples what is trained on, and its turns for a prompt; None where the
        golds are trained on."""
        if not method_of(self.settings).mines:
            return None
        return "mine", self.mined()

    def informed(self) -> list[SampledTurn]:
        """What an estimate of the information samples and reads."""
        return []

    def mined(self) -> list[SampledTurn]:
        """What `mine` samples for a prompt: see `tasks.mine`."""
        s = self.settings.mine
        return self._turns(s, s.samples, s.max_critique_tokens * s.critique, self.lengths.gold)

    def answered(self) -> list[SampledTurn]:
        """What `evaluate` samples for a prompt: see `tasks.policies.answers`."""
        return self._turns(self.settings.evaluate, 1, votes=self.settings.evaluate.votes)

    def _turns(
        self,
        s: MineSettings | EvaluateSettings,
        samples: int,
        critique: int = 0,
        gold: float | None = None,
        votes: int = 1,
    ) -> list[SampledTurn]:
        """y1, and `samples` times `votes` z, a critique of at most so many tokens, y2.

        Args:
            gold: tokens of the gold that hints at z; None: no hint.
        """
        words, turn = self._words, partial(SampledTurn, samples=samples)
        y1, z, c = self._expected(s.max_response_tokens, s.max_principle_tokens, critique)
        turns = [SampledTurn(samples=1, limit=s.max_response_tokens, shared=self.prompt)]
        hinted = self.prompt + y1 + words["hint"] + _length(self._templates.examples.hint)
        answered = self.prompt + y1 + _length(self._templates.leading)
        if not self.guided:
            return [*turns, turn(limit=s.max_response_tokens, shared=answered + words["refine"])]
        asked, own = answered + words["propose"], z + words["refine"]
        hinted = asked if gold is None else hinted + gold
        turns.append(turn(samples=samples * votes, limit=s.max_principle_tokens, shared=hinted))
        if critique:
            turns.append(turn(limit=critique, shared=asked, own=z + words["critique"]))
            own += words["critique"] + c
        return [*turns, turn(limit=s.max_response_tokens, shared=asked, own=own)]

    def taught(self) -> tuple[int, float, float]:
        """Lessons of `teach`, tokens of one, and how many of them have loss.

        Raises:
            UserError: as `tasks.teach.skill_examples`.
        """
        s, turns = self.settings, templates_of(self.settings.policy.templates)
        found = skill_examples(s.teach, s.prompts.world)
        rows = [
            ([MARKS + len(m["content"]) / CHARACTERS for m in lesson.messages], lesson.turns)
            for lesson in lessons(found, s.teach, turns)
        ]
        loss = fmean(sum(tokens[turn] for turn in taught) for tokens, taught in rows)
        return len(rows), *self._cut(fmean(sum(tokens) for tokens, _ in rows), loss)

    def learned(self) -> tuple[float, float]:
        """Tokens of a row that is trained on, and how many of them have loss."""
        if not method_of(self.settings).mines:
            return self._cut(self.prompt + self.lengths.gold, self.lengths.gold)
        s, words = self.settings.mine, self._words
        y, z = self._expected(s.max_response_tokens, s.max_principle_tokens)
        turns, asking = {"initial": y, "refined": y}, words["refine"]
        asking += _length(self._templates.leading)
        if self.guided:
            turns["principle"], asking = z, asking + words["propose"]
        loss = sum(turns.get(turn, 0.0) for turn in self.settings.train.loss_on)
        return self._cut(self.prompt + sum(turns.values()) + asking, loss)

    def first_answers(self) -> tuple[float, float]:
        """The same of what first answers learn from it, or 0 and 0: the prompt with y2; distilled,
        the prompt with y2 and with y1, each also after the prompt that names the principle."""
        way = self.settings.train.first_answer
        if way == "none" or not method_of(self.settings).mines:
            return 0.0, 0.0
        y, _ = self._expected(self.settings.mine.max_response_tokens, 1)
        length, loss = self._cut(self.prompt + y, y)
        return (length, loss) if way == "refined" else (2 * (length + self.learned()[0]), 2 * loss)

    def at_limits(self) -> Workload:
        """The same with the longest prompts and every turn at its limit."""
        longest = replace(self.assumed, filled=1.0, prompt=self.lengths.longest)
        return replace(self, assumed=longest)

    def graded(self, prompts: int) -> Iterator[JudgeTurns]:
        """What the judge of the E-step, where there is one, is asked: to grade y1 and every y2."""
        judge = self.settings.score.judge
        if judge is not None and method_of(self.settings).mines:
            turn = self._questions(judge, 1 + self.settings.mine.samples, 1)
            yield JudgeTurns(stage="score", judge=judge, prompts=prompts, turn=turn)

    def judged(self, iteration: int) -> Iterator[JudgeTurns]:
        """What the judges of an iteration's answers are asked, where they are models."""
        s, held_out = self.settings.evaluate, self.settings.prompts.held_out
        pairs = sum(len(arms(iteration, t)) for t in {iteration, 0, max(iteration - 1, 0)})
        asked = [("judge", j, held_out, self._pairs(j, pairs)) for j in s.judges if j.policy]
        if s.principle_judge and self.guided:
            turn = self._pairs(s.principle_judge, 1)
            asked.append(("principle", s.principle_judge, held_out, turn))
        for name, judge in s.benchmarks.judges(s.judge, guided=self.guided):
            turn = self._questions(judge, *s.benchmarks.chosen[name].judge_questions(judge))
            asked.append((name, judge, self.benchmarks[name], turn))
        for stage, judge, prompts, turn in asked:
            yield JudgeTurns(stage=stage, judge=judge, prompts=prompts, turn=turn)

    @property
    def benchmarks(self) -> dict[str, int]:
        """Turns that the chosen benchmarks ask the policy for."""
        chosen = self.settings.evaluate.benchmarks.chosen
        return {name: run.turns_asked for name, run in chosen.items()}

    def _pairs(self, judge: JudgeSettings, pairs: int) -> SampledTurn:
        """A pair is read in both orders, or one answer after the other."""
        return self._questions(judge, 2 * pairs, 2 if judge.judge_type.both_orders else 1)

    def _questions(self, judge: JudgeSettings, count: int, answers: int) -> SampledTurn:
        (y,) = self._expected(self.settings.evaluate.max_response_tokens)
        own = JUDGE_WORDS + self.prompt + answers * y + judge.show_gold * self.lengths.gold
        own += self.given
        limit = judge.max_tokens if judge.judge_type.generates else 0
        return SampledTurn(samples=count, limit=limit, own=own)

    def _expected(self, *limits: int) -> list[float]:
        return [self.assumed.filled * limit + MARKS for limit in limits]

    def _cut(self, tokens: float, loss: float) -> tuple[float, float]:
        most = float(self.settings.train.max_tokens)
        return min(tokens, most), min(loss, tokens, most)

    @property
    def _templates(self) -> Templates:
        """The wording of the turns."""
        t = templates_of(self.settings.policy.templates)
        return t if self.guided else t.unguided()

    @property
    def _words(self) -> dict[str, float]:
        """Tokens of the user's turns in between, without the gold."""
        t = self._templates
        texts = {"hint": t.hint, "propose": t.propose, "critique": t.critique, "refine": t.refine}
        return {name: MARKS + len(text) / CHARACTERS for name, text in texts.items()}


def _length(examples: Messages) -> float:
    """Tokens of the examples before a prompt."""
    return sum(MARKS + len(message["content"]) / CHARACTERS for message in examples)
