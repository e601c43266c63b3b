"""What is shown while a stage works: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.notices import say as say


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of units that were just finished."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(what, total, unit) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich

    from constitutions.terminal import errors

    texts = ("{task.completed:.0f}/{task.total:.0f} " + unit, "{task.fields[rate]}")
    columns = (
        rich.TextColumn("{task.description:<22}"),
        rich.BarColumn(),
        *map(rich.TextColumn, texts),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    started = time.monotonic()
    with rich.Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int) -> None:
            done = bar.tasks[task].completed + count
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=count, rate=f"{rate:,.1f}/s")

        yield advance


@contextmanager
def _lines(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    started = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= 10 and done < total:
            shown, rate = now, done / (now - started)
            left = (total - done) / rate if rate else 0.0
            line = f"{what}: {done:,}/{total:,} {unit}, {rate:,.1f}/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield advance
