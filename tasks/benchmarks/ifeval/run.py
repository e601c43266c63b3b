"""IFEval on the policy of an iteration: instructions that a program checks, and its principles.

Writes `ifeval/input_response_data.jsonl`, which the reference implementation reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from pydantic import Field

from constitutions.errors import UserError
from models.judges.base import JudgeSettings
from tasks.benchmarks.base import RunSettings
from tasks.benchmarks.ifeval.data import (
    NEEDS,
    InstructedPrompt,
    ifeval_metrics,
    read_examples,
    verdicts,
)
from tasks.benchmarks.rows import single_turn, single_turns, spread, write_lines
from tasks.judging.comparisons import principle_pairs, rate_metrics
from tasks.judging.panel import Panel
from tasks.policies.answers import Respondent, Which, given
from tasks.record.work import Metrics
from tasks.rows import Answer, Prompt

NAME = "ifeval"


class IFEvalSettings(RunSettings):
    """IFEval, and with a judge: does a refinement follow the principle that it names?

    The judge compares it with the first response by the rubric "principle".
    """

    prompts: str = Field(min_length=1)
    """The benchmark's `input_data.jsonl`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The files that it reads."""
        return (self.prompts,)


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
        told = {row.prompt_id: given(row, self.which).text for row in answers}
        responses = {e.key: told[single_turn(e.prompt, NAME).prompt_id] for e in self.examples}
        lines = [{"prompt": e.prompt, "response": responses[e.key]} for e in self.examples]
        write_lines(
            panel.work.outputs / NAME / "input_response_data.jsonl",
            (json.dumps(line, ensure_ascii=False) for line in lines),
        )
        found = verdicts(self.examples, responses)
        figures = ifeval_metrics(found, seed=panel.seed, resamples=panel.resamples)
        return figures | (self._principle(answers, panel, self.judge) if self.judge else {})

    def _principle(self, answers: Sequence[Answer], panel: Panel, judge: JudgeSettings) -> Metrics:
        met = principle_pairs(answers, self.prompts)
        (rows,) = panel.compare(f"{NAME}-comparisons", met, [judge])
        return rate_metrics(f"{NAME}/principle_win_rate", panel.rate(rows, "IFEval's principles"))


def load_ifeval(settings: IFEvalSettings, judge: JudgeSettings | None) -> IFEval:
    """Read and check the file; raises UserError where it is missing or wrong, or asks for checks
    whose packages are not installed."""
    examples = spread(read_examples(settings.prompts), settings.limit)
    asked = {name for example in examples for name in example.instruction_id_list}
    lacking = sorted({NEEDS[n] for n in asked & NEEDS.keys() if find_spec(NEEDS[n]) is None})
    if lacking:
        raise UserError(
            f"its checks of languages and sentences need {' and '.join(lacking)}, not installed",
            where=str(settings.prompts),
            fix="from the checkout: pip install -e '.[benchmarks]'",
        )
    return IFEval(judge=judge, which=settings.answer, examples=examples)
