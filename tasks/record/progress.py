"""What is shown while a stage works: its place in the run, and how far it is.

On a terminal that is a bar, elsewhere a line now and then. The lines are logged in both cases: in
the file of the run, and in Prefect's log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.notices import log
from models.notices import say as say

if TYPE_CHECKING:
    from rich.progress import Progress

FIRST_LINE, LINES = 10.0, 30
"""Seconds until the first line; after a longer time the next one comes when a 30th more has gone
by: a stage of a whole day has some two hundred lines."""
FOUND = 0.5
"""Seconds in which work that an earlier attempt finished is counted: the rate leaves it out."""
SHARE = 0.05
"""The share of the work that has to be done before the time left is estimated."""


@dataclass
class _Shown:
    """What is on the screen of this process."""

    quiet: bool = False
    place: str = ""
    """Where in the run the stage stands: "iteration 2 of 3, stage 4 of 7: cluster"."""
    bars: Progress | None = None
    """The display of the stage, which shows the bars of all its parts."""


_shown = _Shown()


def be_quiet() -> None:
    """Show no progress any more; it is still logged."""
    _shown.quiet = True


def tell(line: str) -> None:
    """Say what was finished, unless the user asked for quiet."""
    (log if _shown.quiet else say)(line)


@contextmanager
def working(place: str) -> Iterator[None]:
    """Show a place of the run ("iteration 2 of 3, stage 4 of 7: cluster") while a stage works."""
    _shown.place = place
    try:
        with _bars() if _on_terminal() else nullcontext():
            yield
    finally:
        _shown.place = ""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of units that were just finished."""
    show = _bar if _on_terminal() else _lines
    with show(Pace(what, total, unit)) as advance:
        yield advance


def duration(seconds: float) -> str:
    """ "7.5 s"; from a minute on "0:01:40"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@dataclass
class Pace:
    """How much is done, how fast, and how long the rest takes: rate and rest from one window.

    The window begins with the first units that were computed. What came before, such as loading a
    model and filling the first batch, happens once.
    """

    what: str
    total: int
    unit: str
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    begun: float = field(init=False)
    _first: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def advance(self, count: int) -> None:
        """Note that units were finished."""
        self.done += count
        now = self.clock()
        if self._first is None and now - self.begun > FOUND:
            self._first = now, self.done

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.begun

    @property
    def rate(self) -> float | None:
        """Units a second; None before it can be told."""
        if self._first is None or self.done < SHARE * self.total:
            return None
        since, before = self._first
        seconds = self.clock() - since
        return (self.done - before) / seconds if seconds > 0 and self.done > before else None

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes; None before it can be told."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        """ "640/2,000 requests · 12.3/s · 0:01:51 left"."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.rate is not None and self.left is not None:
            rate = f"{self.rate:,.1f}" if self.rate >= 0.1 else f"{self.rate:.2g}"
            parts += [f"{rate}/s", f"{duration(max(self.left, 60))} left"]
            if self.left < 60:
                parts[-1] = f"{self.left:.0f} s left"
        return " · ".join(parts)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and not _shown.quiet


@contextmanager
def _bars() -> Iterator[Progress]:
    """The display of a stage, or of a part that has no stage; a part within it shares it."""
    if _shown.bars:
        yield _shown.bars
        return
    from rich import progress as rich
    from rich.text import Text

    from constitutions.terminal import errors

    class Bars(rich.Progress):
        def get_renderables(self):  # type: ignore[no-untyped-def]
            if _shown.place:
                yield Text(f"{_shown.place} · {duration(time.monotonic() - started)}", "dim")
            yield from super().get_renderables()

    texts = map(rich.TextColumn, ("{task.description}", "{task.fields[pace]}"))
    bar = [rich.BarColumn(20)] if errors.width >= 80 else []
    started = time.monotonic()
    with Bars(*bar, *texts, console=errors, transient=True) as bars:
        _shown.bars = bars
        try:
            yield bars
        finally:
            _shown.bars = None


@contextmanager
def _bar(pace: Pace) -> Iterator[Callable[[int], None]]:
    with _bars() as bars, _noted(pace, log) as note:
        task = bars.add_task(pace.what, total=pace.total, pace=pace)

        def advance(count: int) -> None:
            note(count)
            bars.update(task, completed=pace.done)

        yield advance
        bars.remove_task(task)


@contextmanager
def _lines(pace: Pace) -> Iterator[Callable[[int], None]]:
    with _noted(pace, tell) as note:
        yield note


@contextmanager
def _noted(pace: Pace, write: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Count, and write a line when some time has gone by."""
    shown = pace.elapsed

    def advance(count: int) -> None:
        nonlocal shown
        pace.advance(count)
        elapsed = pace.elapsed
        if elapsed - shown >= max(FIRST_LINE, elapsed / LINES) and pace.done < pace.total:
            shown = elapsed
            where = f" ({_shown.place.partition(':')[0]})" * bool(_shown.place)
            write(f"{pace.what}{where}: {pace}")

    yield advance
