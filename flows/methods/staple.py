"""STaPLe (arXiv 2505.16927): the policy finds principles for its refinements, which are clustered
into a constitution, and learns to refine by them."""

from __future__ import annotations

from flows.methods.base import Method
from flows.schema import ExperimentSettings


class Staple(Method):
    """E-step, constitution, M-step."""

    def title(self, settings: ExperimentSettings) -> str:
        """Constrained where similar principles are replaced by the one that represents them."""
        if not settings.last:
            return "initial policy"
        free = settings.cluster.representative == "none"
        return f"{self.label}, {'unconstrained' if free else 'constrained'}"


STAPLE = Staple(
    "staple",
    "STaPLe",
    frozenset({"E-step", "constitution"}),
    final="refined_vs_initial_0",
    about="The model names a principle by which it refines its first answer, and is trained on the "
    "refinements that came nearer to the gold answers; similar principles form a constitution.",
)
