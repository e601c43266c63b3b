"""How a function becomes a stage: a Prefect task without Prefect's cache, with a table of figures.

The store decides what is computed; Prefect orchestrates and shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from prefect import Task, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from tasks.store import Attempt

P = ParamSpec("P")


def stage(name: str) -> Callable[[Callable[P, Attempt]], Task[P, Attempt]]:
    """Decorate a function that returns an `Attempt`; `.fn` is the function without Prefect."""

    def decorate(function: Callable[P, Attempt]) -> Task[P, Attempt]:
        @wraps(function)
        def shown(*args: P.args, **kwargs: P.kwargs) -> Attempt:
            attempt = function(*args, **kwargs)
            if TaskRunContext.get() is not None:
                _publish(attempt)
            return attempt

        made: Callable[P, Attempt] = shown
        return task(name=name, cache_policy=NO_CACHE, persist_result=False)(made)

    return decorate


def _publish(attempt: Attempt) -> None:
    rows = [{"figure": key, "value": f"{value:g}"} for key, value in attempt.metrics.items()]
    how = "reused from the record" if attempt.reused else f"computed in {attempt.seconds:.1f} s"
    create_table_artifact(
        table=rows,
        key=f"{attempt.stage}-figures",
        description=f"**{attempt.stage}**, iteration {attempt.iteration}: {how}; "
        f"MLflow run `{attempt.run_id}`, fingerprint `{attempt.fingerprint[:12]}`",
    )
