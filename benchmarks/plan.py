"""What `staple plan` foretells beside what the stages of a recorded experiment took.

    python -m benchmarks.plan EXPERIMENT

Lengths and acceptance are those of the experiment itself (`--like`): what is compared is what a
token costs. Run it on the machine that ran the experiment, as quiet as it was then.
"""

from __future__ import annotations

import argparse

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from flows.experiment import record_of, recorded_settings
from flows.plan.plan import like, plan


def main() -> None:
    """Print a line for each stage of each iteration that the plan has hours for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("experiment", help="the name of a finished experiment")
    name = parser.parse_args().experiment
    found, record = plan(recorded_settings(name), assumed=like(name)), record_of(name)
    shown = Table("stage", "iteration", "planned s", "took s", "ratio", box=MARKDOWN)
    planned, taken = 0.0, 0.0
    for part in found.iterations:
        for t in range(part.first, part.last + 1):
            for work in part.work:
                attempt = record.current(work.stage, t)
                if attempt is None or work.hours is None:
                    continue
                seconds = 3600 * work.hours
                planned, taken = planned + seconds, taken + attempt.seconds
                shown.add_row(work.stage, str(t), *_figures(seconds, attempt.seconds))
    shown.add_row("all", "", *_figures(planned, taken))
    Console(width=100).print(f"{name} on {found.gpu.name}", shown)


def _figures(planned: float, taken: float) -> list[str]:
    return [f"{planned:.1f}", f"{taken:.1f}", f"{planned / taken:.2f}"]


if __name__ == "__main__":
    main()
