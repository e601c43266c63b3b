"""What a method is: the parts of the loop that it runs, its measure, and its settings' rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from constitutions.errors import UserError
from flows.schema import ExperimentSettings
from tasks.record.work import Metrics
from tasks.report.headline import Headline, headline
from tasks.stages import STAGES, Part


@dataclass(frozen=True)
class Method:
    """One way to improve a policy. Its stages follow from its parts; `flows.em` wires them."""

    name: str
    """As `method` in an experiment's settings."""
    label: str
    """What tables call it."""
    parts: frozenset[Part]
    """What it runs beside the stages of every method."""
    final: str
    """Its measure: the comparison of its final answer with the initial policy's."""
    compared: str = "refined answers against the initial policy's first ones"
    """`final` in words."""
    beside: tuple[str, ...] = (
        "constitution_size",
        "refinement_rate",
        "discovery_rate",
        "trajectories",
        "win_rate/initial_vs_0",
    )
    """The figures that MLflow shows beside its measure, where they were measured."""
    about: str = ""
    """What it does, in one sentence."""
    needs_gold: bool = True
    """Whether every prompt must have a gold response."""

    @property
    def mines(self) -> bool:
        """Whether it has an E-step: the policy refines its answers, the better ones are kept."""
        return "E-step" in self.parts

    @property
    def guided(self) -> bool:
        """Whether a principle stands between the policy's two answers; a constitution is found."""
        return "constitution" in self.parts

    @property
    def constitutional(self) -> bool:
        """Whether the policy is given a constitution in its prompt, and learns to follow it."""
        return "given constitution" in self.parts

    @property
    def answer(self) -> str:
        """Its final answer, as `Comparison.answer` has it."""
        return self.final.partition("_vs_")[0]

    @property
    def headline(self) -> str:
        """The metric of `final`."""
        return f"win_rate/{self.final}"

    def figures(self, settings: ExperimentSettings) -> tuple[str, ...]:
        """The figures that tell how an iteration went; all others are its stages'."""
        rate = self.headline
        measure = (rate, f"{rate}_low", f"{rate}_high", f"{rate}_length_controlled")
        world = settings.prompts.world
        truth = (f"{world.name}/recall", f"{world.name}/precision") if world else ()
        return (*measure, *self.beside, *truth, "champion/accepted")

    def found(
        self, settings: ExperimentSettings, history: Mapping[int, Metrics]
    ) -> Headline | None:
        """The experiment's headline; None before its first evaluation.

        Args:
            history: iteration → its figures.
        """
        judge = settings.evaluate.judge
        name = judge.on(settings.prompts.oracle).title(judge)
        return headline(self.headline, history, compared=self.compared, judge=name)

    def first_answers(self, settings: ExperimentSettings) -> str:
        """What training does to first answers, where it does not teach them; or ""."""
        if not self.guided or settings.train.first_answer != "none":
            return ""
        return (
            "Training teaches to refine: first answers change little, unless train.first_answer is "
            "set."
        )

    @property
    def all_stages(self) -> tuple[str, ...]:
        """Its stages, in the order in which they run."""
        return tuple(n for n, s in STAGES.items() if s.part in {"every method", *self.parts})

    def stages(self, iteration: int) -> tuple[str, ...]:
        """Those that an iteration can have."""
        return tuple(name for name in self.all_stages if STAGES[name].runs_in(iteration))

    def asked(self, settings: ExperimentSettings, iteration: int) -> tuple[str, ...]:
        """Those that the settings ask for, which are the settings of this iteration."""
        off = {"review": not settings.review.enabled, "teach": not settings.teach.on}
        return tuple(name for name in self.stages(iteration) if not off.get(name))

    def title(self, settings: ExperimentSettings) -> str:
        """What tables call it with these settings."""
        return self.label

    def mistakes(self, settings: ExperimentSettings, source: str) -> Iterator[UserError]:
        """The settings that the method cannot run with.

        Args:
            source: what the settings were read from, as messages name it.
        """
        if self.needs_gold and not settings.prompts.has_golds:
            yield UserError(
                f"method {self.name} needs gold responses",
                where=f"{source}, setting 'prompts.sources'",
                expected="a gold_column in each",
            )
        if settings.train.gate and not self.guided:
            yield UserError(
                f"method {self.name} has no turn that names a principle, or that keeps an answer",
                where=f"{source}, setting 'train.gate'",
                expected="false, or method: staple",
            )
        if settings.after:
            yield UserError(
                f"method {self.name} does not continue another experiment",
                where=f"{source}, setting 'after'",
                expected="method: sami",
            )
