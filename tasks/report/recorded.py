"""What the record has of one experiment, and how its figures are written: for the report's page.

`flows.commands.report` gathers it; `document` and `sami` make a chapter of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tasks.benchmarks.base import Column
from tasks.record.record import Attempt
from tasks.report.figures import History
from tasks.report.headline import Headline


@dataclass(frozen=True)
class RecordedStage:
    """A stage of an iteration as the record has it."""

    name: str
    iteration: int
    standing: str
    """ "finished", "stale", "running", "failed" or "missing"."""
    since: str
    """Which changes made it stale, or why it failed."""
    attempt: Attempt | None


@dataclass(frozen=True)
class Recorded:
    """One experiment as its record has it."""

    name: str
    method: str
    about: str
    """What the method does, in one sentence."""
    model: str
    data: str
    """Where the prompts come from."""
    found: Headline | None
    """What it found, as the command line says it; None before the first evaluation."""
    caveat: str
    """What the headline does not say."""
    first_answers: str
    """What training does to first answers, where a method does not train them; or ""."""
    headline: str
    """The win rate that its iterations are compared by: the method's final answer against the
    initial policy's first one; for SAMI, the response with a constitution against the initial
    policy's response with the same one."""
    settings: str
    """YAML, as `staple run` reads it."""
    seed: int
    iterations: int
    outdated: str
    """A sentence where not every stage is as the settings ask for; else ""."""
    stages: Sequence[RecordedStage]
    """All that the experiment asks for, in the loop's order."""
    attempts: Mapping[int, Mapping[str, Attempt]]
    """Iteration → stage → what it wrote."""
    history: History
    changes: Mapping[int, Mapping[str, Any]]
    """Settings that were changed for single iterations."""

    @property
    def guided(self) -> bool:
        """Whether any iteration has a constitution of principles that the policy named."""
        return any("constitution_size" in metrics for metrics in self.history.values())

    @property
    def tuned(self) -> bool:
        """Whether the final answer is the policy's first one: it was tuned on golds."""
        return self._final.startswith("initial")

    @property
    def constitutional(self) -> bool:
        """Whether the policy answers with a constitution in the prompt, as SAMI's does."""
        return self._final.startswith("constitution")

    @property
    def prompts(self) -> str:
        """ "2,000 prompts to learn from, 200 held out", as far as they were drawn."""
        counts = {t: m["prompts"] for t, m in self.history.items() if "prompts" in m}
        held_out = counts.pop(0, None)
        learned = f"{number(sum(counts.values()))} prompts to learn from" if counts else ""
        kept = f"{number(held_out)} held out" if held_out is not None else ""
        return ", ".join(filter(None, (learned, kept)))

    @property
    def lessons(self) -> str:
        """What the initial policy was taught first, as a sentence; "" for nothing."""
        metrics = self.history.get(0, {})
        if "teach/trained" not in metrics:
            return ""
        naming, all_ = metrics["teach/naming"], metrics["teach/lessons"]
        return (
            f"The initial policy was taught first, on other rules: {number(naming)} examples of "
            f"naming what a better response does and {number(all_ - naming)} of following a named "
            "rule."
        )

    @property
    def held_out_rate(self) -> str:
        """The metric that all methods share: the win rate of the final answer to the prompt alone.

        For SAMI that is the response without a constitution.
        """
        return "win_rate/plain_vs_0" if self.constitutional else self.headline

    @property
    def _final(self) -> str:
        return self.headline.rpartition("/")[2]

    @property
    def last_evaluated(self) -> int | None:
        """The last iteration whose policy was evaluated."""
        evaluated = (t for t, stages in self.attempts.items() if "evaluate" in stages)
        return max(evaluated, default=None)

    def why_missing(self, name: str) -> str:
        """Why no iteration has finished a stage."""
        asked = [stage for stage in self.stages if stage.name == name and stage.iteration]
        if not self.iterations:
            return "The experiment has no iteration (iterations = 0): nothing is mined or trained."
        if not asked:
            return f"The method, {self.method}, has no stage “{name}”."
        first = asked[0]
        said = f": {first.since}" if first.since else ""
        return f"Stage “{name}” of iteration {first.iteration} is {first.standing}{said}."

    def unfinished(self) -> list[str]:
        """Every stage that is not as the settings ask for, in words."""
        return [
            f"{s.name} of iteration {s.iteration} is {s.standing}"
            + (f": {s.since}" * bool(s.since))
            for s in self.stages
            if s.standing != "finished"
        ]


# How figures are written -------------------------------------------------------------------------


number = "{:,.0f}".format
"""A count in words."""
nats = "{:.3f}".format
"""An amount of information in words."""
FORMS: dict[str, Callable[[float], str]] = {
    "percent": lambda share: f"{100 * share:.1f}\u00a0%",
    "score": "{:.2f}".format,
    "count": number,
    "nats": nats,
}
"""How each `Column.form` is written."""


class Cell(NamedTuple):
    """A figure and its 95 % interval (of nats: its standard error), in words."""

    value: str
    interval: str = ""


def cell(metrics: Mapping[str, float], metric: str, form: str = "percent") -> Cell:
    """A figure as tables show it; a dash where it was not measured."""
    if metric not in metrics:
        return Cell("–")
    show = FORMS[form]
    ends = [metrics.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = (None if end is None else show(end).removesuffix("\u00a0%") for end in ends)
    interval = "" if low is None or high is None else f"[{low}, {high}]"
    if (error := metrics.get(f"{metric}_error")) is not None:
        interval = f"± {show(error)}"
    return Cell(show(metrics[metric]), interval)


def cells(e: Recorded, columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    """A line a figure that any iteration has, a cell an iteration."""
    return [
        (c.title, [cell(e.history[t], c.metric, c.form) for t in sorted(e.history)])
        for c in columns
        if any(c.metric in metrics for metrics in e.history.values())
    ]
