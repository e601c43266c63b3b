"""The tables and lists that commands print: how they look, in one place."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from constitutions.terminal import console
from flows.publish import rate_text
from tasks.record.work import Metrics

Cell = Callable[[Metrics], str]
"""What a column shows of an iteration's figures."""


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    texts: Sequence[int] = (),
    narrow: bool = False,
) -> Table:
    """A table of figures, which stand to the right.

    Args:
        texts: the columns, by number from 0 or -1, that hold texts and stand to the left.
        narrow: one space between columns: for many of them on 80 characters.
    """
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    if narrow:
        made.padding = (0, 1, 0, 0)
    left = {number % len(columns) for number in texts}
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number in left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def by_iteration(
    title: str,
    columns: Sequence[tuple[str, Cell]],
    history: Mapping[int, Metrics],
    *,
    first: str = "iteration",
    narrow: bool = False,
) -> Table:
    """A line for each iteration."""
    rows = [[str(t), *(cell(metrics) for _, cell in columns)] for t, metrics in history.items()]
    return table(title, (first, *(name for name, _ in columns)), rows, narrow=narrow)


def figure(name: str, style: str) -> Cell:
    """A figure by its name and format; a dash where an iteration has none."""
    return lambda metrics: f"{metrics[name]:{style}}" if name in metrics else "–"


def rate(name: str) -> Cell:
    """A win rate with its interval."""
    return lambda metrics: rate_text(metrics, name)


def panels(parts: Mapping[str, str]) -> None:
    """Print texts, each in a frame under its title."""
    for title, text in parts.items():
        console.print(Panel(Text(text), title=title, title_align="left"))


def next_commands(*commands: tuple[str, str]) -> None:
    """Print commands to try, with what each is for."""
    for command, why in commands:
        program, _, rest = command.partition(" ")
        shown = (f"  {_callable(program)} {rest}", "bold"), (f"  {why}", "dim")
        console.print(Text.assemble(*shown), soft_wrap=True)


def _callable(program: str) -> str:
    """A program's name, or its path where the virtual environment is not activated."""
    if shutil.which(program):
        return program
    place = Path(sys.executable).parent / program
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)
