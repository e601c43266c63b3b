"""`staple compare`: what differs between two experiments, iterations or attempts of a stage."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
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


Value = tuple[float, ...]
"""A figure: alone, or with the ends of its 95 % interval."""


@dataclass(frozen=True)
class Figure:
    """A figure on both sides; None where a side does not have it."""

    name: str
    """As in MLflow; of a whole experiment with its iteration, as in "constitution_size · 2"."""
    left: Value | None
    right: Value | None

    @property
    def difference(self) -> Value | None:
        """Right minus left; None where a side is missing.

        Its interval is Newcombe's (1998, method 10), which takes the two as independent: on the
        same prompts, where they are not, it is mostly too wide.
        """
        if self.left is None or self.right is None:
            return None
        (a, *inside), (b, *others) = self.left, self.right
        if not (inside and others):
            return (b - a,)
        low = math.hypot(b - others[0], inside[1] - a)
        high = math.hypot(others[1] - b, a - inside[0])
        return b - a, b - a - low, b - a + high

    @property
    def group(self) -> tuple[str, str]:
        """(iteration or "", kind): the table in which it stands."""
        name, _, t = self.name.partition(" · ")
        kind, _, rest = name.partition("/")
        return t, {"win_rate": "win rates"}.get(kind, kind) if rest else "figures"

    @property
    def label(self) -> str:
        """Its name within its table."""
        name = self.name.partition(" · ")[0]
        name = name.partition("/")[2] or name
        return name.replace("_length_controlled", " (equal lengths)").replace("_", " ")

    def shown(self, value: Value | None, *, signed: bool = False) -> str:
        """A count as a count, a p-value as one, a rate with its interval; a dash for nothing."""
        if value is None:
            return "–"
        number, *ends = value
        sign = "+" * signed
        name = self.name.partition(" · ")[0]
        if name.endswith("_p") and not signed:
            return "<0.001" if number < 0.001 else f"{number:.3f}"
        if name.startswith("seconds"):
            return f"{number:{sign},.1f}"
        both = [side[0] for side in (self.left, self.right) if side]
        if not ends and all(map(float.is_integer, both)):
            return f"{number:{sign},.0f}"
        style = f"{sign}.3f"
        return f"{number:{style}}" + (f" [{ends[0]:{style}}, {ends[1]:{style}}]" if ends else "")


@dataclass(frozen=True)
class Compared:
    """What differs, and every figure."""

    left: Side
    right: Side
    settings: list[tuple[str, str, str]]
    """(name, left, right) of those that differ."""
    figures: list[Figure]
    """Every figure of either side: by iteration, the win rates first."""
    constitution: Changes | None
    """From left to right; None where one side has none."""

    def facts(self) -> dict[str, object]:
        """The same for a program: figures that are equal, too."""
        names = ("name", "left", "right")
        changes = self.constitution and [
            {"what": what, "trajectories": counts, "principle": text.plain}
            for what, counts, text in _changes(self.constitution, shown=None)
        ]
        return {
            "left": self.left.name,
            "right": self.right.name,
            "settings": [dict(zip(names, row, strict=True)) for row in self.settings],
            "figures": [{**asdict(f), "difference": f.difference} for f in self.figures],
            "constitution": changes,
        }


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
    return Compared(
        left=a,
        right=b,
        settings=[
            (name, a.settings.get(name, "–"), b.settings.get(name, "–"))
            for name in dict.fromkeys([*a.settings, *b.settings])
            if a.settings.get(name) != b.settings.get(name)
        ],
        figures=_figures(a.metrics, b.metrics),
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
    for t in range(e.settings.last + 1):
        attempts = e.current(t)
        found = iteration_metrics(attempts)
        metrics |= {_at(t, name): value for name, value in found.items()}
        constitution = constitution_of(attempts) or constitution
    return Side(reference, settings, metrics, constitution)


def _iteration(reference: str, e: Experiment, t: int) -> Side:
    attempts = e.current(t)
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


def _figures(left: Metrics, right: Metrics) -> list[Figure]:
    names = [n for n in dict.fromkeys([*left, *right]) if not n.endswith(("_low", "_high"))]
    found = [Figure(name, _value(left, name), _value(right, name)) for name in names]
    return sorted(found, key=_rank)


def _rank(figure: Figure) -> tuple[str, bool, bool, str]:
    """By iteration; win rates first, seconds last."""
    t, kind = figure.group
    return t.zfill(4), kind == "seconds", kind != "win rates", kind


def _value(metrics: Metrics, name: str) -> Value | None:
    if name not in metrics:
        return None
    plain, dot, t = name.partition(" · ")
    ends = [metrics.get(f"{plain}{dot}{t}{end}") for end in ("_low", "_high")]
    return (metrics[name], *(end for end in ends if end is not None))


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


def show_compared(found: Compared, *, everything: bool = False) -> None:
    """Print the settings, figures and principles that differ.

    Args:
        everything: also print figures that are the same.
    """
    left, right = found.left.name, found.right.name
    if found.settings:
        rows = [list(map(Text, row)) for row in found.settings]
        columns = ("setting", left, right)
        console.print(table("settings that differ", columns, rows, texts=range(3)))
    else:
        console.print("Their settings are the same.")
    shown = [f for f in found.figures if everything or f.left != f.right]
    for (t, kind), group in groupby(shown, key=lambda f: f.group):
        title = f"{kind}{f', iteration {t}' * bool(t)}"
        cells = [
            (f.label, f.shown(f.left), f.shown(f.right), f.shown(f.difference, signed=True))
            for f in group
        ]
        heads = ("figure", left, right, "difference")
        console.print(table(title, heads, cells, texts=[0]))
    if equal := len(found.figures) - len(shown):
        console.print(f"{equal} figures are the same: --all shows them.")
    if any(f.difference and len(f.difference) > 1 for f in shown):
        console.print("Brackets: 95 % intervals; of a difference, as if the two were independent.")
    if found.constitution:
        changes = list(_changes(found.constitution, SHOWN))
        title, columns = f"principles, {left} → {right}", ("what", "trajectories", "principle")
        same = "Their constitutions are the same."
        console.print(table(title, columns, changes, texts=(0, -1)) if changes else same)


def _changes(changes: Changes, shown: int | None) -> Iterator[tuple[str, str, Text]]:
    """(what, trajectories, principle) of every change between two constitutions.

    The changes of one kind are ordered by trajectories; those beyond `shown`, if any, share a row.
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
        for _, trajectories, text in ordered[:shown]:
            yield what, trajectories, Text(text)
        if rest := ordered[len(ordered) if shown is None else shown :]:
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
