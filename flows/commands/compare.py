"""`staple compare`: what differs between two experiments, iterations or attempts of a stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from constitutions.constitution import Changes, Principle, diff
from constitutions.errors import UserError
from constitutions.terminal import console
from flows.commands.tables import table
from flows.experiment import Experiment, open_experiment, recorded_settings
from flows.methods import method_of
from flows.publish import constitution_of, iteration_metrics
from flows.settings import dotted
from tasks.clustering.wordings import with_wordings
from tasks.record.record import Attempt
from tasks.record.work import Metrics

SHOWN = 40
"""Principles that are listed of each kind of change: those with the most trajectories."""
REFERENCE = "EXPERIMENT, EXPERIMENT:ITERATION or EXPERIMENT:ITERATION:STAGE[@ATTEMPT]"


@dataclass(frozen=True)
class Side:
    """One of the two: its name, settings, figures, and the attempt that wrote its constitution."""

    name: str
    settings: Mapping[str, str]
    """Setting or input → its value as text."""
    metrics: Metrics
    constitution: Attempt | None


@dataclass(frozen=True)
class Compared:
    """What differs; `metrics` holds every figure that either side has, by name."""

    left: Side
    right: Side
    settings: list[tuple[str, str, str]]
    """(name, left, right) of those that differ."""
    metrics: list[tuple[str, str, str]]
    """(name, left, right) of those that differ, intervals included."""
    equal: int
    """Figures that are the same on both sides."""
    constitution: Changes | None
    """From left to right; None where one side has none."""


def compare(left: str, right: str) -> Compared:
    """Compare what two references name; each has the form of `REFERENCE`.

    Raises:
        UserError: a reference is malformed or not in the record, or the two are of different kinds.
    """
    a, b = _side(left), _side(right)
    if left.count(":") != right.count(":"):
        raise UserError(
            "the two references are of different kinds",
            where=f"{left}, {right}",
            expected=f"two of {REFERENCE}",
        )
    figures = list(_figures(a.metrics, b.metrics))
    return Compared(
        left=a,
        right=b,
        settings=[
            (name, a.settings.get(name, "–"), b.settings.get(name, "–"))
            for name in dict.fromkeys([*a.settings, *b.settings])
            if a.settings.get(name) != b.settings.get(name)
        ],
        metrics=[figure for figure in figures if figure[1] != figure[2]],
        equal=sum(figure[1] == figure[2] for figure in figures),
        constitution=_constitutions(a.constitution, b.constitution),
    )


def _side(reference: str) -> Side:
    match = re.fullmatch(r"([^:@]+)(?::([0-9]{1,4})(?::([a-z]+)(?:@([0-9]{1,6}))?)?)?", reference)
    if not match:
        raise UserError("not a reference", where=reference, expected=REFERENCE)
    name, iteration, stage, number = match.groups()
    experiment = open_experiment(recorded_settings(name))
    if iteration is None:
        return _whole(reference, experiment)
    if stage is None:
        return _iteration(reference, experiment, int(iteration))
    there = method_of(experiment.settings).stages(int(iteration))
    if stage not in there:
        raise UserError(
            f"iteration {iteration} has no stage '{stage}'",
            where=reference,
            expected=f"one of {', '.join(there)}",
        )
    attempt = _attempt(experiment, stage, int(iteration), int(number) if number else None)
    return _one(reference, attempt)


def _whole(reference: str, e: Experiment) -> Side:
    """An experiment: the figures of every iteration, the newest constitution."""
    settings = _flat(e.settings.model_dump(mode="json", exclude={"experiment"}))
    for t, changes in e.record.all_changes().items():
        settings |= {f"{name}, iteration {t}": str(value) for name, value in changes.items()}
    metrics: Metrics = {}
    constitution = None
    for t in range(e.settings.iterations + 1):
        attempts = _current(e, t)
        found = iteration_metrics(attempts)
        metrics |= {_at(t, name): value for name, value in found.items()}
        constitution = constitution_of(attempts) or constitution
    return Side(reference, settings, metrics, constitution)


def _iteration(reference: str, e: Experiment, t: int) -> Side:
    attempts = _current(e, t)
    if not attempts:
        raise UserError("no stage of this iteration is finished", where=reference)
    settings = e.settings_at(t).model_dump(mode="json", exclude={"experiment"})
    return Side(reference, _flat(settings), iteration_metrics(attempts), constitution_of(attempts))


def _one(reference: str, attempt: Attempt) -> Side:
    made_from = attempt.provenance()
    ingredients = {
        **_flat(made_from.settings),
        "seed": str(made_from.seed),
        "code": made_from.code_digest[:12],
        **{f"input {name}": source.digest[:12] for name, source in made_from.inputs.items()},
        **{name: value[:12] for name, value in made_from.notes.items()},
    }
    constitution = constitution_of({attempt.stage: attempt})
    return Side(reference, ingredients, attempt.metrics, constitution)


def _attempt(e: Experiment, stage: str, t: int, number: int | None) -> Attempt:
    """The current attempt, or the one with this number, the oldest being 1."""
    if number is None:
        return e.record.needs(stage, t)
    attempts = sorted(e.record.attempts(stage, t), key=started)
    if not 1 <= number <= len(attempts):
        raise UserError(
            f"there is no attempt {number}",
            where=f"experiment {e.settings.experiment}, stage {stage} of iteration {t}",
            expected=f"a number from 1 (the oldest) to {len(attempts)}",
        )
    return attempts[number - 1]


def started(attempt: Attempt) -> int:
    """When an attempt began, by which `@1`, `@2` … are numbered."""
    return attempt.record.reader.run(attempt.run_id).start_time


def _current(e: Experiment, t: int) -> dict[str, Attempt]:
    wanted = method_of(e.settings).stages(t)
    if not e.settings_at(t).review.enabled:
        wanted = tuple(stage for stage in wanted if stage != "review")
    found = {stage: e.record.current(stage, t) for stage in wanted}
    return {stage: attempt for stage, attempt in found.items() if attempt}


def _figures(left: Metrics, right: Metrics) -> Iterator[tuple[str, str, str]]:
    names = dict.fromkeys([*left, *right])
    for name in sorted(names, key=_rank):
        if not name.endswith(("_low", "_high")):
            yield name, _shown(left, name), _shown(right, name)


def _rank(name: str) -> tuple[bool, bool, str]:
    """Win rates first, seconds last."""
    return "seconds" in name, "win_rate/" not in name, name


def _shown(metrics: Metrics, name: str) -> str:
    if name not in metrics:
        return "–"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{metrics[name]:.4g}{interval}"


def _at(t: int, name: str) -> str:
    """The figure of an iteration; an interval's ends keep their endings."""
    for ending in ("_low", "_high"):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} · {t}{ending}"
    return f"{name} · {t}"


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in dotted(values).items()}


def _constitutions(left: Attempt | None, right: Attempt | None) -> Changes | None:
    if left is None or right is None:
        return None
    return diff(with_wordings(left), with_wordings(right))


def show_compared(found: Compared) -> None:
    """Print the settings, figures and principles that differ."""
    left, right = found.left.name, found.right.name
    if found.settings:
        rows = [list(map(Text, row)) for row in found.settings]
        columns = ("setting", left, right)
        console.print(table("settings that differ", columns, rows, texts=range(3)))
    else:
        console.print("Their settings are the same.")
    if found.metrics:
        title = "figures that differ, with 95 % intervals"
        made = table(title, ("figure", left, right), found.metrics)
        made.columns[0].overflow = "fold"
        console.print(made)
    console.print(f"{found.equal} figures are the same.")
    if found.constitution:
        changes = list(_changes(found.constitution))
        title, columns = f"principles, {left} → {right}", ("what", "trajectories", "principle")
        same = "Their constitutions are the same."
        console.print(table(title, columns, changes, texts=(0, -1)) if changes else same)


def _changes(changes: Changes) -> Iterator[tuple[str, str, Text]]:
    """(what, trajectories, principle) of every change between two constitutions.

    The changes of one kind are ordered by trajectories; those beyond `SHOWN` share a row.
    """
    moved = {was.id for was, _ in changes.reworded}
    grown = [(was, now) for was, now in changes.support_changed if was.id not in moved]
    kinds: dict[str, list[tuple[int, str, str]]] = {
        "reworded": [_moved(was, now) for was, now in changes.reworded],
        "merged": [_moved(was, now) for was, now in changes.merged],
        "antithesis": [
            (
                now.support,
                str(now.support),
                f"{now.text}: {was.antithesis or 'none'} → {now.antithesis or 'none'}",
            )
            for was, now in changes.opposed
        ],
        "support": [(max(w.support, n.support), _counts(w, n), n.text) for w, n in grown],
        "added": [(p.support, str(p.support), p.text) for p in changes.added],
        "dropped": [(p.support, str(p.support), p.text) for p in changes.dropped],
    }
    for what, rows in kinds.items():
        ordered = sorted(rows, key=lambda row: -row[0])
        for _, trajectories, text in ordered[:SHOWN]:
            yield what, trajectories, Text(text)
        if rest := ordered[SHOWN:]:
            yield what, str(sum(row[0] for row in rest)), Text(f"… {len(rest):,} more principles")
    was, now = changes.tail
    if was != now:
        sizes = " → ".join(f"{tail.principles:,}" if tail else "none" for tail in changes.tail)
        counts = " → ".join(str(tail.support if tail else 0) for tail in changes.tail)
        yield "tail", counts, Text(f"principles outside of the constitution: {sizes}")


def _moved(was: Principle, now: Principle) -> tuple[int, str, str]:
    return max(was.support, now.support), _counts(was, now), f"{was.text} → {now.text}"


def _counts(was: Principle, now: Principle) -> str:
    return f"{was.support} → {now.support}"
