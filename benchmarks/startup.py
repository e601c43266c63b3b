"""Processor seconds of commands that read the record, and of mistakes, beside importing MLflow.

    python -m benchmarks.startup SETTINGS EXPERIMENT

Run it where EXPERIMENT is recorded and unchanged; SETTINGS is the preset or file that it was run
from. Processor time (user and system, children included) hardly depends on what else the machine
does.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

COMMANDS = (
    ("--help", 0),
    ("list", 0),
    ("status {experiment}", 0),
    ("constitution show {experiment}", 0),
    ("compare {experiment}:1 {experiment}:2", 0),
    ("run {settings}", 0),
    ("status {experiment}x", 2),
    ("run nowhere.yaml", 2),
    ("run {settings} --set mine.sample=3", 2),
    ("report {experiment}x", 2),
    ("statsu", 2),
)
"""The commands, and the exit code of each."""


def main() -> None:
    """Print the median of each command, and the smallest and largest figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("settings", help="a preset's name or a YAML file")
    parser.add_argument("experiment", help="the experiment's name")
    parser.add_argument("--rounds", type=int, default=5, help="how often each command runs")
    asked = parser.parse_args()
    staple = (sys.executable, "-m", "flows.commands.program")
    commands: dict[str, tuple[str, ...]] = {
        'python -c "import mlflow"': (sys.executable, "-c", "import mlflow")
    }
    for words, _ in COMMANDS:
        filled = words.format(settings=asked.settings, experiment=asked.experiment)
        commands[f"staple {filled}"] = (*staple, *filled.split())
    codes = [0, *(code for _, code in COMMANDS)]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(asked.rounds):  # in turn, so that a busy minute falls on all of them
        for (name, command), code in zip(commands.items(), codes, strict=True):
            seconds[name].append(processor_seconds(command, code))
    table = Table("command", "processor seconds", "smallest", "largest", box=MARKDOWN)
    for name, found in seconds.items():
        figures = (median(found), min(found), max(found))
        table.add_row(f"`{name}`", *map("{:.2f}".format, figures))
    Console(width=120).print(table)


def processor_seconds(command: Sequence[str], code: int) -> float:
    """User and system time of one command, which must end with this code, and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    if "run" in command and not code and "0 stages computed" not in done.stdout:
        raise SystemExit("the experiment had changed: run this again")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
