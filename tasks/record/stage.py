"""How a function becomes a stage: a Prefect task without Prefect's cache, with a table of figures.

The record decides what is computed; Prefect orchestrates and shows. Outside a Prefect run a stage
is a plain function; so is one whose current outputs are taken, or only looked at. Prefect is
imported when a stage runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from tasks.record.record import Attempt
from tasks.record.slot import Slot

P = ParamSpec("P")
Stage = Callable[Concatenate[Slot, P], Attempt]


def stage(name: str) -> Callable[[Stage[P]], Stage[P]]:
    """Decorate a function of (slot, …) that returns the `Attempt` of the stage `name`."""

    def decorate(function: Stage[P]) -> Stage[P]:
        @wraps(function)
        def published(at: Slot, /, *args: P.args, **kwargs: P.kwargs) -> Attempt:
            attempt = function(at, *args, **kwargs)
            _publish(at.record.experiment, attempt)
            return attempt

        @wraps(function)
        def run(at: Slot, /, *args: P.args, **kwargs: P.kwargs) -> Attempt:
            if at.look is not None:
                return function(at, *args, **kwargs)
            if at.mode(name) == "take":
                return at.needs(name, at.iteration)
            from prefect import task
            from prefect.cache_policies import NO_CACHE
            from prefect.context import FlowRunContext

            compute = function
            if FlowRunContext.get() is not None:
                compute = task(
                    name=name,
                    task_run_name=f"{name} {at.iteration}",
                    tags=[at.record.experiment, f"iteration {at.iteration}", name],
                    cache_policy=NO_CACHE,
                    persist_result=False,
                )(published)
            attempt = compute(at, *args, **kwargs)
            at.made[attempt.key] = attempt
            return attempt

        return run

    return decorate


def artifact_key(experiment: str, what: str) -> str:
    """The key of an artifact of Prefect's, which has versions; it takes "a" to "z", digits, "-"."""
    return re.sub("[^a-z0-9]+", "-", f"{experiment} {what}".lower()).strip("-")


def _publish(experiment: str, attempt: Attempt) -> None:
    from prefect.artifacts import create_table_artifact

    rows = [{"figure": key, "value": f"{value:g}"} for key, value in attempt.metrics.items()]
    how = "reused from the record" if attempt.reused else f"computed in {attempt.seconds:.1f} s"
    create_table_artifact(
        table=rows,
        key=artifact_key(experiment, attempt.stage),
        description=f"**{attempt.stage}**, iteration {attempt.iteration}: {how}; "
        f"MLflow run `{attempt.run_id}`, fingerprint `{attempt.fingerprint[:12]}`",
    )
