"""`python -m benchmarks [NAME…]`: each figure beside what a user would pick instead of us.

Prints a table and merges the results into benchmarks/results.json. A new benchmark is a function
without arguments that returns a `Result`, named in `BENCHMARKS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contrast import sami_vs_whole_rows
from benchmarks.generation import generation_vs_batched, generation_vs_sequential
from benchmarks.measure import Result
from benchmarks.pool import ray_two_workers
from benchmarks.rouge import rouge_l_plain, rouge_l_stem
from benchmarks.scale import scale_small
from benchmarks.training import training_vs_sft_trainer

RESULTS = Path(__file__).parent / "results.json"

BENCHMARKS: dict[str, Callable[[], Result]] = {
    "generation_vs_sequential": generation_vs_sequential,
    "generation_vs_batched": generation_vs_batched,
    "rouge_l": rouge_l_plain,
    "rouge_l_stem": rouge_l_stem,
    "training_vs_sft_trainer": training_vs_sft_trainer,
    "ray_two_workers": ray_two_workers,
    "sami_vs_whole_rows": sami_vs_whole_rows,
    "scale": scale_small,
}


def main() -> None:
    """Run the named benchmarks, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    console = Console()
    results = {}
    for name in names:
        with console.status(name):
            results[name] = BENCHMARKS[name]()
    console.print(_table(results))
    _save(results)
    console.print(f"written to {RESULTS.parent.name}/{RESULTS.name}")


def _table(results: dict[str, Result]) -> Table:
    table = Table("benchmark", "ratio", "ours", "peer", "unit", "also")
    for name, result in results.items():
        also = "\n".join(f"{key} {_figure(value)}" for key, value in result.details.items())
        figures = (f"{result.ratio:,.1f}x", _figure(result.ours), _figure(result.peer))
        table.add_row(name, *figures, result.unit, also)
    return table


def _figure(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _save(results: dict[str, Result]) -> None:
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for name, result in results.items():
        flat = dataclasses.asdict(result)
        known[name] = flat | flat.pop("details")
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
