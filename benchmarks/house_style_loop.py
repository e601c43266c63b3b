"""Does the loop improve a real language model? The house-style world over seeds, and a control.

    staple fetch smollm2-135m-instruct; staple fetch all-minilm-l6-v2
    python -m benchmarks.house_style_loop --seeds 100 101 102 103 104 --set policy.dtype=bfloat16

All seeds share one taught model, on which no seed has an influence; the arms of a seed share what
they have in common, such as the first iteration's mining. Puts each arm, named with the settings of
`--set`, into `benchmarks/house_style_loop.json`, and prints a table of it with means over the
seeds; `benchmarks.house_style_methods` has intervals over prompts. Win rates are by the rules'
checkers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.planted_runs import History, Runs, add, mean_cell, run_all, table

FILE = Path(__file__).with_suffix(".json")
ARMS: Mapping[str, tuple[str, ...]] = {
    "STaPLe": (),
    "unconstrained": ("cluster.representative=none",),
    "STaR": ("method=star", "train.learning_rate=1e-4"),
    "SFT on gold": ("method=sft", "train.learning_rate=1e-4"),
    "control": ("prompts.shuffle_gold=true",),
}
"""Name → settings that differ from the preset. The control's golds belong to other prompts. The
learning rates of STaR and SFT are the best of those that `benchmarks/house_style.md` names, on
tuning seed 0; STaPLe has the preset's."""
COLUMNS: Mapping[str, str] = {
    "refined answers": "win_rate/refined_vs_initial_0",
    "of them, never mined": "win_rate/house-style-held/refined_vs_initial_0",
    "first answers": "win_rate/initial_vs_0",
    "refinement rate": "refinement_rate",
    "kept principles that are called for": "house-style/kept_right",
    "answers' principles that are": "house-style/invented_right",
    "faithful": "faithfulness/answers",
    "recall": "house-style/recall",
    "precision": "house-style/precision",
    "recall by effect": "house-style/recall_by_effect",
    "precision by effect": "house-style/precision_by_effect",
}
"""Heading → metric of an iteration."""


def main() -> None:
    """Run all arms and seeds, and print the tables."""
    options = loop_options(__doc__)
    options.add_argument("--arms", nargs="+", default=["STaPLe", "control"], choices=list(ARMS))
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    chosen = options.parse_args()
    where: dict[str, Any] = {"folder": chosen.folder.absolute(), "preset": "house-style"}
    _share_taught(chosen.folder, chosen.seeds)
    arms = {", ".join([arm, *chosen.set]): (*chosen.set, *ARMS[arm]) for arm in chosen.arms}
    if chosen.jobs > 1:  # the skills are taught once, before several processes look for them
        run_all({"taught": (*chosen.set, "iterations=0")}, chosen.seeds[:1], jobs=1, **where)
    runs = run_all(arms, chosen.seeds, jobs=chosen.jobs, **where)
    add(runs, FILE)
    print(report(runs))


def loop_options(description: str | None) -> argparse.ArgumentParser:
    """What says which runs are meant, also for what measures them afterwards."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    options.add_argument("--set", action="append", default=[], help="a setting of all runs")
    options.add_argument("--folder", type=Path, default=Path(".staple/house-style"))
    return options


def _share_taught(folder: Path, seeds: list[int]) -> None:
    """Where each seed's run finds, or makes, the model that is taught the skills."""
    taught = folder.absolute() / "taught"
    taught.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        own = folder / f"seed-{seed}" / ".staple" / "taught"
        own.parent.mkdir(parents=True, exist_ok=True)
        if not own.is_symlink():
            own.symlink_to(taught)


def report(runs: Runs) -> str:
    """A table for each arm: a line for each iteration of each seed, and the last one's mean."""
    lines = []
    for arm, seeds in runs.items():
        rows = [
            [f"{seed}, {t}", *_cells([history], t)]
            for seed, history in seeds.items()
            for t in range(len(history))
        ]
        rows.append(["mean, last", *_cells(list(seeds.values()), -1)])
        lines += [f"{arm}:", "", *table(["seed, iteration", *COLUMNS], rows), ""]
    return "\n".join(lines)


def _cells(histories: list[History], iteration: int) -> list[str]:
    return [mean_cell([h[iteration].get(metric) for h in histories]) for metric in COLUMNS.values()]


if __name__ == "__main__":
    main()
