"""Where every stage of an experiment stands: finished, stale, running, failed, missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flows.experiment import STAGES, record_of
from flows.settings import ExperimentSettings
from tasks.store import Attempt

Standing = Literal["finished", "stale", "running", "failed", "missing"]


@dataclass(frozen=True)
class State:
    """How a stage stands; `since` says which change made it stale."""

    standing: Standing
    seconds: float = 0.0
    since: str = ""

    def __str__(self) -> str:
        if self.standing == "finished":
            return f"[green]✓[/green] {self.seconds:.{1 if self.seconds < 10 else 0}f} s"
        return f"[{'yellow' if self.standing == 'stale' else 'red'}]{self.standing}[/]"


def stage_states(settings: ExperimentSettings) -> dict[tuple[str, int], State]:
    """(stage, iteration) → its state, for every stage that the settings ask for."""
    record = record_of(settings.experiment)
    wanted = [("prompts", 0), ("evaluate", 0)] + [
        (stage, t) for t in range(1, settings.iterations + 1) for stage in ("prompts", *STAGES)
    ]
    current = {(stage, t): record.current(stage, t) for stage, t in wanted}
    states: dict[tuple[str, int], State] = {}
    for stage, t in wanted:
        attempt = current[stage, t]
        if attempt is None:
            states[stage, t] = State(_unfinished(record.states(stage, t)))
            continue
        since = _stale_since(attempt, current, states)
        states[stage, t] = State("stale" if since else "finished", attempt.seconds, since)
    return states


def _unfinished(attempts: list[str]) -> Standing:
    if not attempts:
        return "missing"
    return "running" if attempts[0] == "RUNNING" else "failed"


def _stale_since(
    attempt: Attempt,
    current: dict[tuple[str, int], Attempt | None],
    states: dict[tuple[str, int], State],
) -> str:
    for source in attempt.inputs.values():
        place = (source.stage, source.iteration)
        upstream = current.get(place)
        if upstream is None:
            continue
        if upstream.digest != source.digest:
            return f"{source.stage} {source.iteration} has changed"
        if place in states and states[place].standing == "stale":
            return f"{source.stage} {source.iteration} is stale"
    return ""
