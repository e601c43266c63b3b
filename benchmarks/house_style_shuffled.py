"""Do principles matter to what is trained? The labels of one iteration, dealt out at random.

    python -m benchmarks.house_style_shuffled --seeds 103 --set policy.threads=1

After `benchmarks.house_style_loop`, with the same folder and settings. The trajectories of
iteration 1 keep y1 and y2, and each gets the label of another one: as many rows of each label, on
prompts that do not call for it. Trained and evaluated as the preset says, beside the labels as they
are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.house_style_loop import loop_options
from benchmarks.planted_runs import enter, iterated, mean_cell, table
from models.settings import Settings
from tasks.evaluate import evaluate_stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Labelled
from tasks.train import train_stage

FIGURES = {
    "refined answers": "win_rate/refined_vs_initial_0",
    "first answers": "win_rate/initial_vs_0",
}
"""Heading → metric of an iteration."""


class ShuffleSettings(Settings):
    """How the labels were dealt out."""

    seed: int


def shuffled(rows: Sequence[Labelled], seed: int) -> list[Labelled]:
    """The rows with each other's labels; y1 and y2 stay."""
    labels = [row.label for row in rows]
    random.Random(f"{seed}/labels").shuffle(labels)
    return [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]


def measured(folder: Path, seed: int, changes: Sequence[str]) -> list[dict[str, float]]:
    """The metrics of iteration 1, with the labels as they are and shuffled."""
    enter(folder / f"seed-{seed}")
    e, iterations = iterated("house-style", [f"seed={seed}", *changes])
    at, settings, policy = e.slot(1), e.settings_at(1), e.policy(0, 1)
    clustered = iterations[1]["cluster"]

    def compute(work: Workspace) -> Metrics:
        rows = shuffled(clustered.read("labelled", Labelled), seed)
        work.write("labelled", rows, Labelled)
        return {"moved": float(len(rows))}

    dealt = at.attempt("cluster", ShuffleSettings(seed=seed), {"labelled": clustered}, compute)
    trained = train_stage(at, settings.train, policy, dealt)
    tuned = policy.trained(trained, gated=False)
    answered = evaluate_stage(at, settings.evaluate, settings.score, tuned, **e.references(1))
    return [dict(iterations[1]["evaluate"].metrics), dict(answered.metrics)]


def main() -> None:
    """Measure each seed, and print the table."""
    chosen = loop_options(__doc__).parse_args()
    folder = chosen.folder.absolute()
    found = [measured(folder, seed, chosen.set) for seed in chosen.seeds]
    rows = [
        [labels, *(mean_cell([figures[name] for figures in arm]) for name in FIGURES.values())]
        for labels, arm in zip(("as they are", "shuffled"), zip(*found, strict=True), strict=True)
    ]
    print("\n".join(table(["labels", *FIGURES], rows)))


if __name__ == "__main__":
    main()
