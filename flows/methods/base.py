"""What a method is: the parts of the loop that it runs, its measure, and its settings' rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from constitutions.errors import UserError
from flows.schema import ExperimentSettings
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
    def headline(self) -> str:
        """The metric of `final`."""
        return f"win_rate/{self.final}"

    @property
    def all_stages(self) -> tuple[str, ...]:
        """Its stages, in the order in which they run."""
        return tuple(n for n, s in STAGES.items() if s.part in {"every method", *self.parts})

    def stages(self, iteration: int) -> tuple[str, ...]:
        """Those that an iteration can have."""
        return tuple(name for name in self.all_stages if STAGES[name].runs_in(iteration))

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
        if settings.after:
            yield UserError(
                f"method {self.name} does not continue another experiment",
                where=f"{source}, setting 'after'",
                expected="method: sami",
            )
