"""What each choice of the method is worth on the planted world: one table for each choice.

    python -m benchmarks.ablations --seeds 21 22 23 24

The first line of a table is the preset. Writes `benchmarks/ablations.json`, prints the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.planted_runs import History, Runs, keep, mean_cell, run_all, table

HERE = Path(__file__).parent
PRESET: tuple[str, ...] = ()
CRITIC = "policy.model={critic}"
"""A seed model of its own, which was taught to say where an answer lacks its principle."""

ABLATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "What principles are compared by": {
        "effect and wording": PRESET,
        "wording": ("cluster.features=[characters]",),
        "effect": ("cluster.features=[effect]",),
        "hidden states": ("cluster.features=[hidden]",),
    },
    "Similarity to the gold": {
        "ROUGE-L": PRESET,
        "embedding (the seed model's hidden states)": (
            "score.similarity=embedding",
            "score.embedding_model={model}",
        ),
    },
    "Label replacement": {
        "medoid": PRESET,
        "mode": ("cluster.representative=mode",),
        "medoid, 1-nat test": ("cluster.logprob_tolerance=1.0",),
        "none (unconstrained)": ("cluster.representative=none",),
    },
    "Clustering threshold": {
        "0.8": PRESET,
        "0.6": ("cluster.distance_threshold=0.6",),
        "0.7": ("cluster.distance_threshold=0.7",),
        "0.9": ("cluster.distance_threshold=0.9",),
    },
    "N, principles a prompt": {
        "5": PRESET,
        "2": ("mine.samples=2",),
        "10": ("mine.samples=10",),
    },
    "Critique (another seed model, taught to write them)": {
        "off": (CRITIC,),
        "on": (CRITIC, "mine.critique=true", "mine.max_critique_tokens=6"),
    },
    "Hard or soft EM": {
        "best of N (hard)": PRESET,
        "rejection": ("filter.selection=rejection",),
        "soft, τ = 1": ("filter.selection=soft",),
        "soft, τ = 1, as many tokens in training": ("filter.selection=soft", "train.tokens=81000"),
        "soft, τ = 0.25": ("filter.selection=soft", "filter.temperature=0.25"),
    },
    "Adapter of the iteration before": {
        "continued": PRESET,
        "base reset": ("train.start=base",),
    },
}
"""Table → variant → settings that differ from the preset "planted"."""

COLUMNS: Mapping[str, tuple[str, int]] = {
    "win rate, it. 1": ("win_rate/refined_vs_initial_0", 1),
    "it. 3": ("win_rate/refined_vs_initial_0", 3),
    "never mined, it. 3": ("win_rate/planted-held/refined_vs_initial_0", 3),
    "principles": ("constitution_size", 3),
    "recall": ("planted/recall", 3),
    "precision": ("planted/precision", 3),
    "NMI, it. 1": ("planted/nmi", 1),
    "ARI, it. 1": ("planted/ari", 1),
    "faithful labels, it. 1": ("faithfulness/label", 1),
}
"""Heading → metric, iteration."""


def main() -> None:
    """Run every variant once, print every table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", required=True)
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/baselines"))
    chosen = options.parse_args()
    runs = run_all(variants(), chosen.seeds, chosen.folder, chosen.jobs)
    keep(runs, HERE / "ablations.json")
    print(*tables(runs), sep="\n")


def variants() -> dict[str, tuple[str, ...]]:
    """Each distinct set of settings once, named by itself."""
    every = (settings for group in ABLATIONS.values() for settings in group.values())
    return {" ".join(settings) or "preset": settings for settings in every}


def tables(runs: Runs) -> list[str]:
    """Each choice's table: means over seeds with 95 % t-intervals."""
    lines = []
    for title, group in ABLATIONS.items():
        rows = [
            [name, *_cells(runs[" ".join(settings) or "preset"])]
            for name, settings in group.items()
        ]
        headings = ["", *COLUMNS, "generated tokens", "tokens in training"]
        lines += [f"### {title}", "", *table(headings, rows), ""]
    return lines


def _cells(by_seed: Mapping[str, History]) -> list[str]:
    figures = [
        mean_cell([history[t].get(metric) for history in by_seed.values()])
        for metric, t in COLUMNS.values()
    ]
    return [*figures, _cost(by_seed, "generated_tokens"), _cost(by_seed, "train/tokens")]


def _cost(by_seed: Mapping[str, History], metric: str) -> str:
    """Summed over the iterations, mean over seeds."""
    spent = [sum(m.get(metric, 0.0) for m in history) for history in by_seed.values()]
    return f"{fmean(spent):,.0f}"


if __name__ == "__main__":
    main()
