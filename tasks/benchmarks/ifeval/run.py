"""IFEval on the policy of an iteration: instructions that a program checks, and its principles.

Writes `ifeval/input_response_data.jsonl`, which the reference implementation reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from models.judges.base import Judge
from models.judges.registry import JudgeSettings
from tasks.benchmarks.base import Column, RunSettings, require
from tasks.benchmarks.ifeval.data import (
    NEEDS,
    InstructedPrompt,
    ifeval_metrics,
    read_examples,
    verdicts,
)
from tasks.benchmarks.rows import single_turn, single_turns, spread, write_lines
from tasks.judging.pairs import principle_pairs
from tasks.judging.panel import Panel
from tasks.judging.rates import rate_metrics
from tasks.policies.answers import Respondent, Which, given
from tasks.record.work import Metrics
from tasks.rows import Answer, Prompt

NAME = "ifeval"


class IFEvalSettings(RunSettings):
    """IFEval, and with a judge: does a refinement follow the principle that it names?

    The judge compares it with the first response by the rubric "principle".
    """

    size = 541
    columns = (
        Column("IFEval principle-following", f"{NAME}/principle_win_rate"),
        Column("IFEval, strict prompt", f"{NAME}/prompt_strict"),
    )
    about_principles = True

    prompts: str = Field(min_length=1)
    """The benchmark's `input_data.jsonl`."""

    @classmethod
    def can_judge(cls, judge: type[Judge]) -> bool:
        """See `RunSettings.can_judge`."""
        return judge.generates

    def load(self, judge: JudgeSettings | None) -> IFEval:
        """See `RunSettings.load`; some checks need packages, which must be installed."""
        examples = spread(read_examples(self.prompts), self.limit)
        checks = {name for example in examples for name in example.instruction_id_list}
        packages = [package for name, package in NEEDS.items() if name in checks]
        require(packages, "IFEval's checks of languages and sentences", self.prompts)
        return IFEval(judge=judge, which=self.answer, examples=examples)


@dataclass(frozen=True, kw_only=True)
class IFEval:
    """The benchmark as its file has it."""

    judge: JudgeSettings | None
    """None: the principles are not judged."""
    which: Which
    examples: Sequence[InstructedPrompt]

    @property
    def prompts(self) -> list[Prompt]:
        """The distinct prompts."""
        return single_turns((e.prompt for e in self.examples), NAME)

    def answer(self, respondent: Respondent) -> list[Answer]:
        """The policy's answers to the distinct prompts."""
        return respondent.answers(f"{NAME}-answers", self.prompts)

    def measure(self, answers: Sequence[Answer], panel: Panel) -> Metrics:
        """Shares in [0, 1] of prompts and instructions, strict and loose; the principle's rate."""
        texts = {row.prompt_id: given(row, self.which).text for row in answers}
        responses = {e.key: texts[single_turn(e.prompt, NAME).prompt_id] for e in self.examples}
        lines = [{"prompt": e.prompt, "response": responses[e.key]} for e in self.examples]
        write_lines(
            panel.work.outputs / NAME / "input_response_data.jsonl",
            (json.dumps(line, ensure_ascii=False) for line in lines),
        )
        found = verdicts(self.examples, responses)
        figures = ifeval_metrics(found, seed=panel.seed, resamples=panel.resamples)
        return figures | (self._principle(answers, panel, self.judge) if self.judge else {})

    def _principle(self, answers: Sequence[Answer], panel: Panel, judge: JudgeSettings) -> Metrics:
        pairs = principle_pairs(answers, self.prompts)
        if not pairs:
            return {}
        (rows,) = panel.compare(f"{NAME}-comparisons", pairs, [judge])
        return rate_metrics(f"{NAME}/principle_win_rate", panel.rate(rows, "IFEval's principles"))
