"""What `staple plan` and `staple validate` print."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.text import Text

from constitutions.terminal import console
from flows.commands.tables import Grid, table
from flows.plan.cost import GIB
from flows.plan.plan import Plan
from tasks.record.progress import duration


def show_checked(source: str, found: Mapping[str, str]) -> None:
    """Print what `staple validate` found, where it found no mistake."""
    console.print(Text(f"{source} can be run.", "green"), soft_wrap=True)
    for name, what in found.items():
        console.print(f"  {name:<9} {what}")


def show_plan(found: Plan) -> None:
    """Print tokens and hours of every stage, memory, disk and the assumptions."""
    what = f"{found.settings.policy.model}, {_count(found.parameters)} parameters"
    where = "this machine's processor, without a GPU" if found.on_cpu else f"one {found.gpu.name}"
    console.print(Text(f"An estimate: {what}, on {where}. Nothing was loaded."))
    console.print(_tokens(found))
    if found.memory:
        console.print(_memory(found))
    for memory in found.memory:
        if memory.remedy:
            problem = f"{memory.title}: too much for {where}; {memory.remedy}"
            console.print(Text(problem, "yellow"))
    disk = ", ".join(f"{name} {_size(size)}" for name, size in found.disk.items() if size)
    console.print(Text(f"disk: {disk}"))
    for note in found.notes:
        console.print(Text(f"- {note}", "dim"))


def _tokens(found: Plan) -> Grid:
    titles = ("stage", "it.", "prompts", "samples", "generate", "at most", "prefill", "train")
    figures = ("prompts", "samples", "generated", "at_most", "prefilled", "trained")
    unit, shown = ("time", _time) if found.on_cpu else ("hours", _hours)
    rows = []
    for part in found.iterations:
        which = str(part.first) if part.first == part.last else f"{part.first}–{part.last}"
        for work in part.work:
            counts = [_count(getattr(work, figure)) for figure in figures]
            rows.append([work.stage, which, *counts, shown(work.hours)])
    title = f"tokens and {unit}, each iteration"
    totals = [_count(found.total(figure)) for figure in figures[1:]]
    rows.append(["all", "", "", *totals, shown(found.total("hours"))])
    return table(title, (*titles, unit), rows, texts=[0], total=True)


def _memory(found: Plan) -> Grid:
    parts = list(dict.fromkeys(part for memory in found.memory for part in memory.parts))
    rows = []
    for memory in found.memory:
        cells = [_size(memory.parts[part]) if part in memory.parts else "–" for part in parts]
        rows.append([memory.title, *cells, _size(memory.bytes)])
    kind = "memory" if found.on_cpu else "GPU memory"
    title = f"{kind} at most, of {found.gpu.memory:.4g} GiB"
    return table(title, ("rows × tokens", *parts, "all"), rows, texts=[0])


def _count(number: float) -> str:
    """Three digits and k, M, G; a dash for nothing."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = 2 - int(math.log10(number / size))
            return f"{number / size:.{digits}f}{letter}"
    return f"{number:.0f}" if number else "–"


def _size(number: float) -> str:
    return f"{number / GIB:.1f}G" if number >= GIB / 10 else f"{number / 2**20:.1f}M"


def _time(hours: float | None) -> str:
    return "–" if hours is None else duration(3600 * hours)


def _hours(hours: float | None) -> str:
    if hours is None:
        return "–"
    if hours < 0.01:
        return "<.01"
    return f"{hours:,.{0 if hours >= 10 else 1 if hours >= 1 else 2}f}"
