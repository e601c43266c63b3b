"""Is the time that is left, as stages show it, right? Over runs of a preset, one a seed.

    python -m benchmarks.progress planted --seeds 1 2 3

Fifty evenly spaced looks at the time left, after the first tenth of a part's units; the table says
how often it was within a factor of 1.5 of what the rest then took. Processor time, because other
programs on the machine change how fast the clock runs for a stage. Parts of less than two seconds
show no progress.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from copy import copy
from pathlib import Path
from statistics import fmean

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.planted_runs import run_seed
from tasks.record import progress

FACTOR, LOOKS, SHORTEST = 1.5, 50, 2.0
_parts: list[_Recorded] = []


class _Recorded(progress.Pace):
    """Notes what it would have shown whenever units were finished."""

    def __post_init__(self) -> None:
        self.clock = time.process_time
        super().__post_init__()
        self.seen: list[tuple[float, int]] = []
        """(seconds since the beginning, units that were finished by then)."""
        _parts.append(self)

    def advance(self, count: int) -> None:
        """Note it."""
        super().advance(count)
        self.seen.append((self.elapsed, self.done))

    def looks(self) -> list[bool]:
        """Whether the time left was right, at evenly spaced moments."""
        end = self.seen[-1][0]
        first = next(at for at, done in self.seen if done >= 0.1 * self.total)
        return [self._right(first + (end - first) * i / LOOKS, end) for i in range(LOOKS)]

    def _right(self, moment: float, end: float) -> bool:
        then = copy(self)
        then.done = [done for at, done in self.seen if at <= moment][-1]
        then.clock = lambda: self.begun + moment
        rest = end - moment
        return then.left is not None and rest / FACTOR <= then.left <= rest * FACTOR


def main() -> None:
    """Run the preset on each seed, and print the share of right looks of each kind of part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progress", description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="a setting of the run")
    parser.add_argument("--folder", type=Path, default=Path(".staple/progress"))
    chosen = parser.parse_args()
    progress.Pace = _Recorded  # type: ignore[misc]
    for seed in chosen.seeds:
        overrides = {"progress": ("experiment=progress", *chosen.set)}
        run_seed(seed, overrides, chosen.folder.absolute(), chosen.preset)
    found: dict[str, list[bool]] = defaultdict(list)
    for part in _parts:
        if part.seen and part.done >= part.total and part.seen[-1][0] >= SHORTEST:
            found[part.what] += part.looks()
    shown = Table("part", "runs of it", "looks within a factor of 1.5", box=MARKDOWN)
    for what, looks in found.items():
        shown.add_row(what, f"{len(looks) / LOOKS:.0f}", f"{fmean(looks):.0%}")
    every = [look for looks in found.values() for look in looks]
    shown.add_row("all", f"{len(every) / LOOKS:.0f}", f"{fmean(every):.0%}")
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
