"""The kinds of judges, their settings, and the places where their models are opened.

A new kind is a file beside this one, its import and its place in `KINDS`; settings of its own are
one more base class of `JudgeSettings`. One class has the settings of all kinds, because a preset or
`--set` may change the kind alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from models.judges.absolute import AbsoluteJudge
from models.judges.auto import AutoJudge
from models.judges.base import Judge
from models.judges.llm import LLMSettings
from models.judges.oracle import OracleJudge
from models.judges.pairwise import PairwiseJudge
from models.judges.reward import RewardModel, RewardSettings
from models.judges.similarity import GoldSimilarity
from models.policy import Policy, PolicySettings
from models.pools.base import E, Opener, Pool, Where
from models.pools.opening import open_pool
from models.worlds.base import Oracle
from models.worlds.registry import WORLD_MODELS

KINDS: dict[str, type[Judge]] = {
    judge.kind: judge
    for judge in (
        AutoJudge,
        GoldSimilarity,
        OracleJudge,
        PairwiseJudge,
        AbsoluteJudge,
        RewardModel,
    )
}
"""Every kind of judge, by its name in the settings."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(KINDS)]


class JudgeSettings(RewardSettings, LLMSettings):
    """Who compares answers, and how."""

    kind: Kind = "auto"
    """"similarity" to the gold response; an embedded world's "oracle"; an LLM that compares two
    answers in both orders ("pairwise") or grades each from 1 to 5 ("absolute"); a scalar "reward"
    model. "auto" is the oracle where the world has one, else similarity."""

    @model_validator(mode="after")
    def _has_a_model(self) -> JudgeSettings:
        if self.judge_type.needs_model and (
            self.policy is None or self.policy.model in WORLD_MODELS
        ):
            raise ValueError(f"a {self.kind} judge needs a model of its own: set policy.model")
        if self.policy and self.policy.endpoint and not self.judge_type.generates:
            raise ValueError(f"a {self.kind} judge runs in process: leave endpoint unset")
        return self

    @property
    def judge_type(self) -> type[Judge]:
        """The class of this kind, which says what it needs and can do."""
        return KINDS[self.kind]

    def on(self, oracle: Oracle | None) -> type[Judge]:
        """The kind that judges the prompts of this oracle (or of none): "auto" chooses another."""
        return self.judge_type.on(oracle)

    def about_principles(self) -> JudgeSettings:
        """The same judge; an LLM judge gets a rubric that shows the principle."""
        if self.chosen_rubric.principle or not self.judge_type.generates:
            return self
        return self.model_copy(update={"rubric": "principle"})


def kinds_that(can: Callable[[type[Judge]], bool]) -> str:
    """The names of the kinds for which `can` holds, in words: "pairwise or absolute"."""
    return " or ".join(name for name, judge in KINDS.items() if can(judge))


# Where a judge's model is -------------------------------------------------------------------


def open_policy(settings: JudgeSettings) -> Policy:
    """An LLM judge's model: at its endpoint where it has one, else in this process.

    Raises:
        UserError: it cannot be loaded, or the endpoint cannot be used.
    """
    assert settings.policy is not None, "JudgeSettings refuses it otherwise"
    if settings.policy.endpoint:
        from models.endpoint.server import open_server

        return open_server(settings.policy)
    from models.engine.local import load_policy

    return load_policy(settings.policy, settings.policy.model, None)


def judge_pool(settings: JudgeSettings, opener: Opener[E]) -> Pool[E]:
    """The pool that the judge's policy names; this process, where the judge has no policy or an
    endpoint.

    Args:
        opener: opens the judge in a worker, which finds the model there by `located`.

    Raises:
        UserError: Ray is asked for and not installed.
    """
    policy = settings.policy or PolicySettings()
    return open_pool(policy, opener, models=[policy.model])


def located(settings: JudgeSettings, where: Where) -> JudgeSettings:
    """The judge's settings with its model's path on this node. The model's folder has the same name
    on every node, and so has the judge."""
    if settings.policy is None:
        return settings
    policy = settings.policy.model_copy(update={"model": where(settings.policy.model)})
    return settings.model_copy(update={"policy": policy})
