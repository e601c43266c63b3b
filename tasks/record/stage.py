"""How a function becomes a stage: a Prefect task without Prefect's cache, with a table of figures.

The store decides what is computed; Prefect orchestrates and shows. A stage whose current outputs
are only taken, or looked at, is no task.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from tasks.record.store import Attempt, Slot

P = ParamSpec("P")
Stage = Callable[Concatenate[Slot, P], Attempt]


def stage(name: str) -> Callable[[Stage[P]], Stage[P]]:
    """Decorate a function of (slot, …) that returns the `Attempt` of the stage `name`."""

    def decorate(function: Stage[P]) -> Stage[P]:
        as_task = task(name=name, cache_policy=NO_CACHE, persist_result=False)(_published(function))

        @wraps(function)
        def run(at: Slot, /, *args: P.args, **kwargs: P.kwargs) -> Attempt:
            if at.look is not None:
                return function(at, *args, **kwargs)
            if at.mode(name) == "take":
                return at.needs(name, at.iteration)
            attempt = (as_task if FlowRunContext.get() else function)(at, *args, **kwargs)
            at.made[attempt.key] = attempt
            return attempt

        return run

    return decorate


def _published(function: Stage[P]) -> Stage[P]:
    @wraps(function)
    def run(at: Slot, /, *args: P.args, **kwargs: P.kwargs) -> Attempt:
        attempt = function(at, *args, **kwargs)
        _publish(attempt)
        return attempt

    return run


def _publish(attempt: Attempt) -> None:
    rows = [{"figure": key, "value": f"{value:g}"} for key, value in attempt.metrics.items()]
    how = "reused from the record" if attempt.reused else f"computed in {attempt.seconds:.1f} s"
    create_table_artifact(
        table=rows,
        key=f"{attempt.stage}-figures",
        description=f"**{attempt.stage}**, iteration {attempt.iteration}: {how}; "
        f"MLflow run `{attempt.run_id}`, fingerprint `{attempt.fingerprint[:12]}`",
    )
