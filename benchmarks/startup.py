"""Processor seconds of commands that find everything in the record.

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
from statistics import median

from rich.console import Console
from rich.table import Table


def main() -> None:
    """Print the median of each command, and the smallest and largest figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("settings", help="a preset's name or a YAML file")
    parser.add_argument("experiment", help="the experiment's name")
    parser.add_argument("--rounds", type=int, default=5, help="how often each command runs")
    asked = parser.parse_args()
    table = Table("command", "processor seconds", "smallest", "largest", "rounds")
    for words in (["--help"], ["status", asked.experiment], ["run", asked.settings]):
        seconds = [processor_seconds(words) for _ in range(asked.rounds)]
        figures = (median(seconds), min(seconds), max(seconds))
        table.add_row(
            " ".join(["staple", *words]), *map("{:.2f}".format, figures), str(len(seconds))
        )
    Console().print(table)


def processor_seconds(words: list[str]) -> float:
    """User and system time of one command and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "flows.commands.program", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if words[0] == "run" and "0 stages computed" not in done.stdout:
        raise SystemExit("the experiment had changed: run this again")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
