"""What a planted run costs beside its stages: Prefect, checks, MLflow's pages, tables.

    python -m benchmarks.orchestration --set prompts.first=60 --set iterations=1

`staple run planted` takes turns with its stages alone: `flows.em.steps` in one process, which
computes and records the same attempts. Each starts in a folder of its own, where the model is
pretrained and Prefect's database made, as both are after the first run on a machine. Processor time
is that of all processes, Prefect's server among them.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "stages alone": ("benchmarks.orchestration", "--stages"),
    "staple run": ("flows.commands.program", "run", "planted"),
}


class Seconds(NamedTuple):
    """What a program took: processor seconds of all its processes, and seconds by the clock."""

    processor: float
    wall: float


def main() -> None:
    """Print the median of each program, the smallest and largest figure, and the difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--set", action="append", default=[], help="a setting of the experiment")
    parser.add_argument("--rounds", type=int, default=3, help="how often each program runs")
    parser.add_argument("--home", type=Path, help="a home with the pretrained model; default: new")
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stages:
        run_stages(asked.set)
        return
    with tempfile.TemporaryDirectory() as made:
        home = asked.home or Path(made) / "home"
        prepare(asked.set, home)
        took: dict[str, list[Seconds]] = {name: [] for name in PROGRAMS}
        for _ in range(asked.rounds):
            for name, program in PROGRAMS.items():
                took[name].append(seconds_of(program, asked.set, home))
    show(took)


def prepare(overrides: Sequence[str], home: Path) -> None:
    """Make the experiment's model and Prefect's database in `home`, where they are missing."""
    os.environ["PREFECT_HOME"] = str(home.absolute() / "prefect")  # before Prefect is imported
    from flows.server import prefect_database
    from flows.settings import load_settings
    from tasks.policies.base import make_world_model

    settings = load_settings("planted", overrides)
    make_world_model(settings.policy.model, settings.seed, home)
    prefect_database.make()


def run_stages(overrides: Sequence[str]) -> None:
    """Compute and record all stages of the experiment, and nothing else."""
    from flows.commands.cli import _environment
    from flows.em import steps
    from flows.experiment import note_settings, open_experiment
    from flows.settings import load_settings

    _environment()
    settings = load_settings("planted", overrides)
    note_settings(settings)
    experiment = open_experiment(settings)
    for t in range(settings.last + 1):
        for _ in steps(experiment, t):
            pass


def seconds_of(program: Sequence[str], overrides: Sequence[str], home: Path) -> Seconds:
    """What a program takes in a new folder, with a copy of `home`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home, Path(folder) / ".staple")
        environment = {name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "STAPLE_HOME": str(Path(folder) / ".staple"),
            "PREFECT_HOME": str(Path(folder) / ".staple" / "prefect"),
        }
        changes = [part for override in overrides for part in ("--set", override)]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", *program, *changes],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Seconds(processor, time.monotonic() - began)


def show(took: dict[str, list[Seconds]]) -> None:
    """Print a table."""
    table = Table("program", "processor seconds", "range", "seconds", "range")
    middle = {}
    for name, rounds in took.items():
        kinds = [sorted(kind) for kind in zip(*rounds, strict=True)]
        middle[name] = Seconds(*map(median, kinds))
        cells = [(f"{median(kind):.1f}", f"{kind[0]:.1f}–{kind[-1]:.1f}") for kind in kinds]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    bare, whole = (middle[name] for name in PROGRAMS)
    more = [f"{b - a:+.1f} ({b / a - 1:+.0%})" for a, b in zip(bare, whole, strict=True)]
    table.add_row("the rest of a run", more[0], "", more[1], "")
    Console().print(table)


if __name__ == "__main__":
    main()
