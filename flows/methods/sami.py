"""SAMI (arXiv 2404.14313): the policy learns to follow a constitution that is given or written.

Both policies that are compared are given the same constitution.
"""

from __future__ import annotations

from collections.abc import Iterator

from constitutions.errors import UserError
from flows.methods.base import Method
from flows.schema import ExperimentSettings


class Sami(Method):
    """Write, sample, M-step; its stages are wired in `flows.sami`."""

    def mistakes(self, settings: ExperimentSettings, source: str) -> Iterator[UserError]:
        """What only the other methods have, judges that read golds, and dropout."""
        evaluate = settings.evaluate
        if settings.review.enabled:
            yield UserError(
                "a constitution that was given or written has no review",
                where=f"{source}, setting 'review.enabled'",
                expected="false, with method: sami",
                fix="staple constitution write, edit the file, --set write.constitution=FILE",
            )
        by_gold = any(judge.judge_type.needs_gold or judge.show_gold for judge in evaluate.judges)
        if by_gold and not settings.prompts.has_golds:
            yield UserError(
                "a judge reads the golds, and there are none",
                where=f"{source}, settings 'evaluate.judge', 'prompts.sources'",
                expected="another judge, or a gold_column",
            )
        if settings.train.lora_dropout:
            yield UserError(
                "with dropout, every pass would compare the responses by a different policy",
                where=f"{source}, setting 'train.lora_dropout'",
                expected="0, with method: sami",
            )
        if evaluate.benchmarks.chosen or evaluate.principle_judge:
            yield UserError(
                "benchmarks and the principle judge are about STaPLe's two answers",
                where=f"{source}, settings 'evaluate.benchmarks', 'evaluate.principle_judge'",
                expected="none, with method: sami",
            )
        if settings.then:
            yield UserError(
                "after SAMI no further experiment is run",
                where=f"{source}, setting 'then'",
                expected="another method",
            )


SAMI = Sami(
    "sami",
    "SAMI",
    frozenset({"given constitution"}),
    final="constitution_vs_0",
    compared="answers with a constitution against the initial policy's with the same one",
    beside=("win_rate/principles_vs_0", "win_rate/held_out_vs_0", "mi/per_token"),
    about="The model is given a constitution, of principles or of their antitheses, and is trained "
    "so that its answer depends on which one it was given; it sees no gold answers.",
    needs_gold=False,
)
