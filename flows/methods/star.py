"""The baseline STaR: STaPLe's loop without principles; without iterations it is Self-Refine."""

from __future__ import annotations

from flows.methods.base import Method
from flows.schema import ExperimentSettings


class Star(Method):
    """E-step and M-step."""

    def title(self, settings: ExperimentSettings) -> str:
        """By whether anything is trained."""
        return self.label if settings.last else "Self-Refine"


STAR = Star(
    "star",
    "STaR",
    frozenset({"E-step"}),
    final="refined_vs_initial_0",
    about="The model refines its first answer without naming a principle, and is trained on the "
    "refinements that came nearer to the gold answers.",
)
