"""The state of every stage of an experiment: finished, stale, running, failed, missing.

It uses the wiring that runs the experiment (`flows.em.steps`) and computes nothing: it compares
each stage's current attempt with what the stage would compute now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from constitutions.errors import UserError
from flows.em import steps
from flows.experiment import open_experiment, recorded_settings, writing
from flows.publish import Attempts, is_published
from flows.schema import ExperimentSettings
from flows.settings import without_gone
from tasks.record.provenance import Acceptance, Provenance
from tasks.record.record import Attempt, Record, finished
from tasks.record.runs import MlflowRun

Standing = Literal["finished", "stale", "running", "failed", "missing"]


@dataclass(frozen=True)
class State:
    """The state of a stage.

    `since` says which changes made it stale, or why it failed; `attempt` is the current one, and
    `wanted` is the provenance of what the stage would compute now.
    """

    standing: Standing
    attempt: Attempt | None = None
    since: tuple[str, ...] = ()
    wanted: Provenance | None = None

    @property
    def accepted(self) -> Acceptance | None:
        """The note of a person who accepted the attempt after the stage's code changed."""
        if self.attempt and self.wanted:
            return self.attempt.accepted.get(self.wanted.fingerprint)
        return None


def stage_states(
    settings: ExperimentSettings, last: int | None = None
) -> dict[tuple[str, int], State]:
    """(stage, iteration) → its state, in the loop's order, up to iteration `last`, or all: with
    `iterations: auto` up to the first that is not finished."""
    look = Look(open_experiment(settings).record)
    experiment = open_experiment(settings, look=look)
    for t in range((settings.last if last is None else last) + 1):
        for _ in steps(experiment, t):
            pass  # `look` notes each stage's state
        if last is None and settings.iterations == "auto":
            here = (state.standing for (_, at), state in look.states.items() if at == t)
            if experiment.stops(t) or any(standing != "finished" for standing in here):
                break  # nobody knows yet whether another one follows
    return look.states


def unchanged(settings: ExperimentSettings) -> list[Attempts] | None:
    """The attempts of every iteration; None if there is something to compute or to publish."""
    states = stage_states(settings)
    done: list[Attempts] = [{} for _ in range(1 + max(t for _, t in states))]
    for (stage, t), state in states.items():
        if state.standing != "finished" or state.attempt is None:
            return None
        done[t][stage] = state.attempt
    return done if is_published(open_experiment(settings).record, done) else None


class Look:
    """Takes the place of computing a stage, and notes its state."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.states: dict[tuple[str, int], State] = {}
        self._runs: dict[tuple[str, int], list[MlflowRun]] = defaultdict(list)
        for run in record.runs(kind="stage"):
            self._runs[run.tags["stage"], int(run.tags["iteration"])].append(run)

    def __call__(self, wanted: Provenance) -> Attempt:
        """The current attempt of the stage, or a placeholder."""
        found = self.attempt(*wanted.place)
        self.states[wanted.place] = replace(self._state(wanted, found), wanted=wanted)
        return found

    def attempt(self, stage: str, iteration: int) -> Attempt:
        """The current attempt, or a placeholder whose run id is empty."""
        runs = [run for run in self._runs[stage, iteration] if finished(run)]
        if runs:
            return self.record.attempt(runs[0])
        missing = f"missing {stage} {iteration}"
        return Attempt(stage, iteration, "", "", missing, {}, {}, 0.0, True, self.record)

    def _state(self, wanted: Provenance, current: Attempt) -> State:
        runs = self._runs[wanted.place]
        if runs and self.record.is_alive(runs[0]):
            return State("running", current if current.run_id else None)
        why = tuple(self._changes(wanted, current)) if current.run_id else ()
        if current.run_id and not why:
            return State("finished", current)
        if runs and not finished(runs[0]):
            failure = runs[0].tags.get("failure", "interrupted")
            return State("failed", current if current.run_id else None, (failure, *why))
        return State("stale", current, why) if current.run_id else State("missing")

    def _changes(self, wanted: Provenance, current: Attempt) -> Iterator[str]:
        """Why the stage would compute something else now; nothing if it would not."""
        if not current.stands_for(wanted.fingerprint):
            yield from differences(current.provenance(), wanted)
        read = dict.fromkeys((source.stage, source.iteration) for source in wanted.inputs.values())
        for place in read:
            state = self.states.get(place)
            if state and state.standing != "finished":
                yield f"{place[0]} {place[1]} is {state.standing}"


def differences(old: Provenance, new: Provenance) -> Iterator[str]:
    """What differs between two attempts' provenance, in words."""
    read = {(s.stage, s.iteration): s.digest for s in old.inputs.values()}
    for source in new.inputs.values():
        if source.digest.startswith("missing "):
            continue  # another difference names it
        before = read.get((source.stage, source.iteration))
        if before is None:
            yield f"{source.stage} {source.iteration} was not read before"
        elif before != source.digest:
            yield f"{source.stage} {source.iteration} has changed"
    known = without_gone(old.settings, new.stage, as_fixed=True)
    yield from settings_differences(known, new.settings, f"{new.stage}.")
    if old.seed != new.seed:
        yield f"seed {old.seed} → {new.seed}"
    for name in sorted({*old.notes, *new.notes}):
        if old.notes.get(name) != new.notes.get(name):
            yield f"{NOTES.get(name, name)} changed"
    if isinstance(old.code, str):
        yield "recorded by an earlier version of staple: code not comparable by module"
    elif changed := changed_modules(old, new):
        more = f" and of {len(changed) - 5} more modules" if len(changed) > 5 else ""
        yield f"code of {', '.join(changed[:5])}{more} changed"


def changed_modules(old: Provenance, new: Provenance) -> list[str]:
    """The modules whose code differs, or which only one of the two depends on."""
    if isinstance(old.code, str) or isinstance(new.code, str):
        return ["all"]
    both = sorted({*old.code, *new.code})
    return [name for name in both if old.code.get(name) != new.code.get(name)]


def accept_code(experiment: str, stage: str, iteration: int, by: str) -> list[str]:
    """Record that a stage's current attempt stays valid although its code has changed.

    Returns:
        The modules that changed, or ["all"] for an attempt of an earlier version of staple.

    Raises:
        UserError: the stage was never finished; its code is unchanged; more than code differs.
    """
    with writing(experiment, f"staple accept {stage}:{iteration} --experiment {experiment}"):
        state = stage_states(recorded_settings(experiment), iteration).get((stage, iteration))
        where = f"stage {stage} of iteration {iteration}, experiment {experiment}"
        again = f"staple stage {stage} --experiment {experiment} --iteration {iteration}"
        if state is None or state.attempt is None or state.wanted is None:
            raise UserError("there is no finished attempt to accept", where=where, fix=again)
        if state.attempt.stands_for(state.wanted.fingerprint):
            raise UserError("nothing to accept: the stage's code is unchanged", where=where)
        old = _with_what_was_read_through_others(state.attempt)
        if other := list(differences(replace(old, code=state.wanted.code), state.wanted)):
            raise UserError(
                f"more than code differs: {'; '.join(other)}",
                where=where,
                expected="the same settings, inputs and texts",
                fix=f"compute it again: {again}",
            )
        modules = changed_modules(old, state.wanted)
        state.attempt.record.accept(state.attempt, state.wanted.fingerprint, by, modules)
        return modules


def _with_what_was_read_through_others(attempt: Attempt) -> Provenance:
    """The provenance of an attempt, whose inputs' own inputs count as read.

    Until version 0.2.0 the table `scored` repeated `mined`, so that the filter read both.
    """
    found = attempt.provenance()
    through = {
        f"{name}.{inner}": source
        for name, read in found.inputs.items()
        for made in attempt.record.attempts(read.stage, read.iteration)
        if made.digest == read.digest
        for inner, source in made.inputs.items()
    }
    return replace(found, inputs={**found.inputs, **through})


NOTES = {
    "base": "the base model",
    "served_model": "the model at the endpoint",
    "templates": "the prompt templates",
    "scoring": "a setting of score",
    "training": "a setting of train",
    "examples": "the file of examples",
    "decisions": "the review's decisions",
    "sampling": "a setting of sample",
    "wording": "the writer's prompts",
    "judge": "the judge's model",
    "threads": "policy.threads",
    "judge_wording": "the judge's prompts",
    "rubric": "the judge's rubric",
}
"""What the notes of a provenance are, in words."""


def settings_differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """ "cluster.distance_threshold 0.8 → 0.6", for every setting that differs."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                yield from settings_differences(before, after, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} {before} → {after}"
