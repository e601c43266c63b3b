"""AlpacaEval 2 on the policy of an iteration: its answers against a reference's.

Writes AlpacaEval's own files, `alpaca_eval/model_outputs.json` and `alpaca_eval/annotations.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from constitutions.errors import UserError
from models.judges.base import Judge
from models.judges.registry import JudgeSettings
from tasks.benchmarks.alpaca_eval.data import (
    Annotation,
    GamedRow,
    Output,
    difficulties_by_instruction,
    length_controlled,
    read_difficulties,
    read_gamed,
    read_outputs,
    standard_error,
    write,
)
from tasks.benchmarks.base import Column, RunSettings
from tasks.benchmarks.rows import single_turn, spread
from tasks.judging.pairs import OUTSIDE, AnswerPair
from tasks.judging.panel import Panel
from tasks.judging.rates import order_metrics, rate_metrics
from tasks.policies.answers import Given, Respondent, Which, given
from tasks.record.progress import say
from tasks.record.work import Metrics
from tasks.rows import Answer, Comparison, Prompt

NAME = "alpaca_eval"


class AlpacaEvalSettings(RunSettings):
    """AlpacaEval 2: win rate and length-controlled win rate against a reference's answers."""

    size = 805
    columns = (
        Column("AlpacaEval win rate", f"{NAME}/win_rate"),
        Column("AlpacaEval, length-controlled", f"{NAME}/length_controlled"),
    )
    needs_judge = True

    prompts: str = Field(min_length=1)
    """The benchmark's file: instructions, and the outputs of the model they are compared with."""
    reference: str | None = None
    """Outputs of another model to compare with (its `model_outputs.json`)."""
    difficulties: str | None = None
    """`instruction_difficulty.csv`, for the length-controlled rate; without it that rate compares
    with no leaderboard's."""
    gamed: str | None = None
    """`df_gamed.csv`: what length alone is worth, for the length-controlled rate."""

    @classmethod
    def can_judge(cls, judge: type[Judge]) -> bool:
        """See `RunSettings.can_judge`."""
        return judge.needs_model

    def load(self, judge: JudgeSettings | None) -> AlpacaEval:
        """See `RunSettings.load`: an instruction without reference or difficulty is wrong, too."""
        assert judge is not None, "it needs a judge"
        listed = read_outputs(self.prompts)
        chosen = spread(listed, self.limit)
        hard = None
        if self.difficulties:
            known = read_difficulties(self.difficulties)
            hard = difficulties_by_instruction(known, [row.instruction for row in listed], chosen)
        return AlpacaEval(
            judge=judge,
            which=self.answer,
            references=_of(self.reference, chosen) if self.reference else chosen,
            difficulties=hard,
            gamed=read_gamed(self.gamed) if self.gamed else (),
        )


@dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """The benchmark as its files have it."""

    judge: JudgeSettings
    which: Which
    references: Sequence[Output]
    """The reference's answers to the instructions that are used."""
    difficulties: Sequence[float] | None
    """Of the same instructions."""
    gamed: Sequence[GamedRow]

    @property
    def prompts(self) -> list[Prompt]:
        """The instructions as prompts, in their order."""
        rows = enumerate(self.references, start=1)
        return [single_turn(row.instruction, f"{NAME}:{number}") for number, row in rows]

    def answer(self, respondent: Respondent) -> list[Answer]:
        """The policy's answers, in the order of the instructions."""
        return respondent.answers(f"{NAME}-answers", self.prompts)

    def measure(self, answers: Sequence[Answer], panel: Panel) -> Metrics:
        """Win rate, its standard error, and the length-controlled rate: all in [0, 1]."""
        (rows,) = panel.compare(f"{NAME}-comparisons", self._pairs(answers), [self.judge])
        annotations = self._annotations(rows, panel.model)
        folder = panel.work.outputs / NAME
        folder.mkdir(exist_ok=True)
        write(folder / "model_outputs.json", [_output(row) for row in annotations])
        write(folder / "annotations.json", annotations)
        rate = panel.rate(rows, "AlpacaEval")
        error = standard_error(annotations)
        return {
            **rate_metrics(f"{NAME}/win_rate", rate),
            **({f"{NAME}/standard_error": error / 100} if error is not None else {}),
            **self._length_controlled(annotations),
            **order_metrics(NAME, rows),
        }

    def _pairs(self, answers: Sequence[Answer]) -> list[AnswerPair]:
        return [
            AnswerPair(
                iteration=row.iteration,
                answer=self.which,
                against=OUTSIDE,
                reference=reference.generator,
                prompt=prompt,
                ours=given(row, self.which),
                theirs=Given(text=reference.output),
            )
            for prompt, row, reference in zip(self.prompts, answers, self.references, strict=True)
        ]

    def _annotations(self, rows: Sequence[Comparison], model: str) -> list[Annotation]:
        return [
            Annotation(
                instruction=reference.instruction,
                output_1=row.theirs,
                generator_1=reference.generator,
                output_2=row.ours,
                generator_2=model,
                annotator=row.judge,
                preference=None if row.outcome is None else 1 + row.outcome,
                dataset=reference.dataset,
            )
            for row, reference in zip(rows, self.references, strict=True)
        ]

    def _length_controlled(self, annotations: Sequence[Annotation]) -> Metrics:
        """Empty where no fit can separate length from quality; a printed line then says why."""
        try:
            found = length_controlled(annotations, self.difficulties, self.gamed)
        except UserError as error:
            say(f"AlpacaEval: no length-controlled win rate: {error}")
            return {}
        figures = {f"{NAME}/length_controlled": found.rate / 100}
        if found.standard_error is not None:
            figures[f"{NAME}/length_controlled_error"] = found.standard_error / 100
        return figures


def _of(source: str, chosen: Sequence[Output]) -> list[Output]:
    """Another model's answers to the same instructions."""
    found = {row.instruction: row for row in read_outputs(source)}
    for number, row in enumerate(chosen, start=1):
        if row.instruction not in found:
            raise UserError(
                f"there is no answer to instruction {number}: {row.instruction[:80]!r}",
                where=source,
                expected="an answer to every instruction that is used",
            )
    return [found[row.instruction] for row in chosen]


def _output(row: Annotation) -> Output:
    return Output(
        instruction=row.instruction,
        output=row.output_2,
        generator=row.generator_2,
        dataset=row.dataset,
    )
