"""The tables and lists that commands print: how they look, in one place."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from constitutions.terminal import console, say
from flows.publish import rate_text
from tasks.record.work import Metrics

Cell = Callable[[Metrics], str]
"""What a column shows of an iteration's figures."""


@dataclass
class Grid:
    """A table whose words are never broken: where they do not fit, each row is a list of its cells.

    Columns get at least their longest word. The rest of the width goes to the columns with the
    longest texts.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str | Text]]
    left: set[int]
    """The columns, by number, that stand to the left."""
    total: bool = False
    """Whether a line stands above the last row."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or the list."""
        fitted = self._fitted(options.max_width)
        yield self._table(*fitted) if fitted else self._list()

    def _table(self, space: int, widths: Sequence[int]) -> Table:
        made = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)
        made.show_edge = made.pad_edge = False
        made.padding = (0, space - 1, 0, 0)  # the box puts a space between columns, too
        for number, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
            how: JustifyMethod = "left" if number in self.left else "right"
            made.add_column(column, justify=how, width=width)
        for number, row in enumerate(self.rows):
            if self.total and number == len(self.rows) - 1:
                made.add_section()
            made.add_row(*row)
        return made

    def _list(self) -> Group:
        """A paragraph for each row: its first cell, then "column cell" a line; a line for each row
        of two columns."""
        lines: list[Text | Padding] = [Text(self.title, "italic")]
        for first, *others in self.rows:
            if len(others) == 1:
                lines.append(Text.assemble(first, "  ", *others))
                continue
            lines.append(Text.assemble((f"{self.columns[0]} ", "bold"), first))
            for column, cell in zip(self.columns[1:], others, strict=True):
                if str(cell):
                    lines.append(Padding(Text.assemble((f"{column} ", "dim"), cell), (0, 0, 0, 2)))
        return Group(*lines, Text())

    def _fitted(self, room: int) -> tuple[int, list[int]] | None:
        """Characters between columns, and the columns' widths; None where not even each column's
        longest word fits."""
        cells = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(_longest(cell, "\n") for cell in column) for column in cells]
        for space in (2, 1):
            if sum(widths) + space * (len(widths) - 1) <= room:
                return space, widths
        return self._wrapped(room - len(widths) + 1, cells, widths)

    def _wrapped(
        self, room: int, cells: Sequence[Sequence[str | Text]], most: Sequence[int]
    ) -> tuple[int, list[int]] | None:
        """The same where lines have to be wrapped: the narrowest columns grow first."""
        widths = [max(_longest(cell, None) for cell in column) for column in cells]
        if sum(widths) > room:
            return None
        for _ in range(room - sum(widths)):
            wrapped = [n for n, width in enumerate(widths) if width < most[n]]
            widths[min(wrapped, key=lambda n: widths[n])] += 1
        return 1, widths


def _longest(cell: str | Text, between: str | None) -> int:
    """Characters of the longest line (between line breaks) or word (None)."""
    return max(map(cell_len, str(cell).split(between)), default=0)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    texts: Sequence[int] = (),
    total: bool = False,
) -> Grid:
    """A table of figures, which stand to the right.

    Args:
        texts: the columns, by number from 0 or -1, that hold texts and stand to the left.
        total: the last row is the sum of the others.
    """
    left = {number % len(columns) for number in texts}
    return Grid(title, columns, list(rows), left, total)


def show_json(value: Any) -> None:
    """Print a value as JSON, for `--json`: nothing else stands on standard output."""
    say(json.dumps(value, indent=2))


def by_iteration(
    title: str,
    columns: Sequence[tuple[str, Cell]],
    history: Mapping[int, Metrics],
    *,
    first: str = "iteration",
) -> Grid:
    """A line for each iteration."""
    rows = [[str(t), *(cell(metrics) for _, cell in columns)] for t, metrics in history.items()]
    return table(title, (first, *(name for name, _ in columns)), rows)


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
