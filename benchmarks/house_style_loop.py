"""Does the loop improve a real language model? The house-style world over seeds, and a control.

    staple fetch smollm2-135m-instruct; staple fetch all-minilm-l6-v2
    python -m benchmarks.house_style_loop --seeds 100 101 102 103 104 --set policy.dtype=bfloat16

All seeds share one taught model, on which no seed has an influence; the arms of a
seed share what they have in common, such as the first iteration's mining. Writes
`benchmarks/house_style_loop.json` and prints the tables of `benchmarks/house_style.md`. Win rates
are by the rules' checkers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.planted_runs import History, Runs, keep, mean_cell, run_all, table

HERE = Path(__file__).parent
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
}
"""Heading → metric of an iteration."""


def main() -> None:
    """Run all arms and seeds, and print the tables."""
    options = loop_options(__doc__)
    options.add_argument("--arms", nargs="+", default=["STaPLe", "control"], choices=list(ARMS))
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    chosen = options.parse_args()
    _share_taught(chosen.folder, chosen.seeds)
    named = {arm: (*chosen.set, *settings) for arm, settings in ARMS.items() if arm in chosen.arms}
    runs = run_all(named, chosen.seeds, chosen.folder, chosen.jobs, preset="house-style")
    keep(runs, HERE / "house_style_loop.json")
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
