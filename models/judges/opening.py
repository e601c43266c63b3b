"""Opens the judge that the settings ask for, with its model in memory, here or in a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from constitutions.errors import UserError
from models.judges.base import GoldSimilarity, Judge, JudgeSettings, OracleJudge
from models.policy import Policy, PolicySettings
from models.pools.base import E, Opener, Pool, Where
from models.pools.opening import open_pool
from models.worlds.base import Oracle


def open_policy(settings: JudgeSettings) -> Policy:
    """An LLM judge's model: at its endpoint where it has one, else in this process.

    Raises:
        UserError: it cannot be loaded, or the endpoint cannot be used.
    """
    assert settings.policy is not None, "JudgeSettings sees to it"
    if settings.policy.endpoint:
        from models.endpoint.server import open_server

        return open_server(settings.policy)
    from models.engine.local import load_policy

    return load_policy(settings.policy, settings.policy.model, None)


def judge_pool(settings: JudgeSettings, opener: Opener[E]) -> Pool[E]:
    """The pool that the judge's policy asks for; a judge without one, or at an endpoint, is served
    from this process.

    Args:
        opener: opens what judges; `located` tells where the model is there.

    Raises:
        UserError: Ray is asked for and not installed.
    """
    policy = settings.policy or PolicySettings()
    return open_pool(policy, opener, models=[policy.model], local=bool(policy.endpoint))


def located(settings: JudgeSettings, where: Where) -> JudgeSettings:
    """The judge with its model where this node has it. The folder's own name stays the same, and so
    does the judge's."""
    if settings.policy is None:
        return settings
    policy = settings.policy.model_copy(update={"model": where(settings.policy.model)})
    return settings.model_copy(update={"policy": policy})


def load_judge(
    settings: JudgeSettings,
    *,
    oracle: Oracle | None,
    similarity: GoldSimilarity,
    seed: int = 0,
    open_policy: Callable[[JudgeSettings], Policy] = open_policy,
) -> Judge:
    """The judge that the settings ask for, with its model in memory.

    Args:
        oracle: who knows the truth of the prompts; None where nobody does.
        similarity: the judge "similarity".
        seed: of a sampled LLM judge.
        open_policy: opens an LLM judge's model.

    Raises:
        UserError: the oracle where there is none, or a model that cannot be loaded.
    """
    if settings.kind in ("auto", "similarity", "oracle"):
        return choose_judge(settings.kind, oracle=oracle, similarity=similarity)
    if settings.kind == "reward":
        from models.judges.reward import load_reward_model

        assert settings.policy is not None
        return load_reward_model(settings.policy, tie=settings.reward_tie)
    from models.judges.llm import AbsoluteJudge, PairwiseJudge

    policy = open_policy(settings)
    kind = PairwiseJudge if settings.kind == "pairwise" else AbsoluteJudge
    return kind(policy, settings, seed=seed)


def choose_judge(
    choice: Literal["auto", "similarity", "oracle"],
    *,
    oracle: Oracle | None,
    similarity: GoldSimilarity,
) -> Judge:
    """The judge that the settings ask for; "auto" is the oracle where there is one.

    Raises:
        UserError: the oracle is asked for, and there is none.
    """
    if choice == "oracle" and oracle is None:
        raise UserError(
            "the oracle knows only the prompts of an embedded world",
            where="evaluate.judge",
            expected='"similarity" or "auto"',
        )
    return OracleJudge(oracle) if oracle and choice != "similarity" else similarity
