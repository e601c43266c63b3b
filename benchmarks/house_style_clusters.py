"""The house-style world's constitution, by what principles are compared by, and where they merge.

    python -m benchmarks.house_style_clusters --seeds 100 101 102 103 104

After `benchmarks.house_style_loop`, with the same folder and settings: clusters what an iteration's
filter kept, again and again. "sentences" is the paper's own choice (all-MiniLM-L6-v2), "effect and
characters" the default. Prints a table of means over the seeds; an oracle reads the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.house_style_loop import loop_options
from benchmarks.planted_runs import enter, iterated, table
from models.house_style import oracle
from tasks.cluster import ClusterSettings, cluster
from tasks.clustering.insertions import Proposals
from tasks.judging.truth import truth_metrics
from tasks.rows import Prompt, Trajectory

FEATURES: Mapping[str, tuple[str, ...]] = {
    "effect and characters": ("effect", "characters"),
    "sentences": ("sentences",),
    "effect and sentences": ("effect", "sentences"),
    "hidden": ("hidden",),
}
THRESHOLDS = (0.4, 0.6, 0.8, "predictive")
COLUMNS: Mapping[str, str] = {
    "principles": "principles",
    "rows": "rows",
    "labels called for": "right",
    "and obeyed": "obeyed",
    "precision": "house-style/precision",
    "recall": "house-style/recall",
    "NMI": "house-style/nmi",
    "ARI": "house-style/ari",
}
"""Heading → figure. "right": the share of rows whose label means a rule that the prompt calls for;
"obeyed": and whose refinement obeys it."""


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each clustering by its name, and its settings."""
    for name, features in FEATURES.items():
        for threshold in THRESHOLDS:
            yield f"{name}, {threshold}", {"features": features, "distance_threshold": threshold}
    yield "effect and characters, 0.6, mode", {"representative": "mode", "distance_threshold": 0.6}
    yield "labels as they were", {"representative": "none"}


def figures(
    settings: ClusterSettings,
    trajectories: Sequence[Trajectory],
    mined: Sequence[Proposals],
    prompts: Sequence[Prompt],
    policy: Any,
) -> dict[str, float]:
    """What one clustering makes of the kept trajectories."""
    done = cluster(trajectories, mined, settings, policy=policy)
    rows, principles = done.labelled, done.constitution.texts
    called = [
        oracle.needed(row.prompt[-1]["content"]) & {oracle.behaviour_of(row.label)} for row in rows
    ]
    obeyed = [
        bool(rules & oracle.shown(row.refined)) for rules, row in zip(called, rows, strict=True)
    ]
    truth = truth_metrics(
        "house-style",
        oracle,
        mined=(),
        labelled=rows,
        principles=principles,
        prompts=prompts,
        answers=(),
    )
    return truth | {
        "principles": float(len(principles)),
        "rows": float(len(rows)),
        "right": sum(map(bool, called)) / max(1, len(rows)),
        "obeyed": sum(obeyed) / max(1, len(rows)),
    }


def measured(
    folder: Path, seed: int, iteration: int, changes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The figures of every clustering on one seed's iteration."""
    enter(folder / f"seed-{seed}")
    e, attempts = iterated("house-style", [f"seed={seed}", *changes])
    made = attempts[iteration]
    trajectories = made["filter"].read("trajectories", Trajectory)
    mined = made["mine"].read("mined", Proposals)
    prompts = e.record.needs("prompts", iteration).read("prompts", Prompt)
    policy = e.policy(iteration - 1).load()
    found = {}
    for fewest in (1, e.settings.cluster.min_prompts):
        for name, choice in variants():
            own = {**choice, "min_prompts": fewest, "embedding_model": "all-minilm-l6-v2"}
            settings = e.settings.cluster.model_copy(update=own)
            kept = figures(settings, trajectories, mined, prompts, policy)
            found[f"{name}, of {fewest} prompts"] = kept
    return found


def main() -> None:
    """Cluster each seed's trajectories, and print the table."""
    options = loop_options(__doc__)
    options.add_argument("--iteration", type=int, default=1)
    chosen = options.parse_args()
    folder = chosen.folder.absolute()
    found = [measured(folder, seed, chosen.iteration, chosen.set) for seed in chosen.seeds]
    rows = [
        [
            name,
            *(f"{fmean(seed[name].get(it, 0.0) for seed in found):.2f}" for it in COLUMNS.values()),
        ]
        for name in found[0]
    ]
    print("\n".join(table(["clustering", *COLUMNS], rows)))


if __name__ == "__main__":
    main()
