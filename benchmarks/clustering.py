"""`python -m benchmarks.clustering`: two levels of clustering beside the exact one.

Principles of planted groups, whose sizes fall as in language (Zipf), among principles that belong
to none. Each is worded in words of its group and others, and its refinement inserts phrases of its
group among many words of its own topic. The features, the linkage and the rule for the threshold
are the project's own. Prints a JSON line for each size and seed, and the intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from time import process_time
from typing import Any

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.metrics import adjusted_rand_score

from tasks.clustering import agglomeration, features, threshold
from tasks.clustering.features import Features, block_features, combine, effect_features
from tasks.clustering.insertions import Insertions
from tasks.clustering.picture import map_principles

GROUPS = 150
OUTSIDE = 0.15
"""Share of the principles that belong to no group."""


def world(rows: int, seed: int) -> tuple[list[str], Insertions, np.ndarray]:
    """Texts, insertions and groups (-1: none) of so many distinct principles."""
    draw = random.Random(seed)
    weights = [1 / (rank + 3) for rank in range(GROUPS)]
    texts, inserted, truth = [], [], []
    for row in range(rows):
        group = -1 if draw.random() < OUTSIDE else draw.choices(range(GROUPS), weights)[0]
        own = f"own{row}" if group < 0 else f"group{group}"
        said = [word(f"{own} {draw.randrange(6)}") for _ in range(3)]
        texts.append(" ".join(draw.sample(said + topic(draw, 4), 7)))
        phrases = [word(f"{own} effect {draw.randrange(12)}") for _ in range(5)]
        inserted.append(Counter(phrases + topic(draw, draw.randint(40, 120))))
        truth.append(group)
    return texts, counted(inserted), np.array(truth)


def counted(inserted: Sequence[Counter[str]]) -> Insertions:
    """The counts as a matrix."""
    table = DictVectorizer(dtype=np.float32)
    counts = table.fit_transform(inserted)
    return Insertions(counts, tuple(table.get_feature_names_out()))


def topic(draw: random.Random, count: int) -> list[str]:
    """Words with frequencies that fall as in language."""
    return [word(str(int(draw.paretovariate(0.8)) % 20_000)) for _ in range(count)]


def word(meaning: str) -> str:
    letters = random.Random(meaning)
    return "".join(letters.choices("etaoinshrdlucmy", k=letters.randint(3, 8)))


def measured(rows: int, seed: int, micro: Sequence[int]) -> dict[str, float]:
    """Processor seconds of each step, and what the clusterings have in common."""
    texts, inserted, truth = world(rows, seed)
    start = process_time()
    wording = block_features(features.character_features(texts), seed)

    def describe(some: np.ndarray, counts: Any) -> Features:
        return combine([wording.only(some), block_features(effect_features(counts), seed)])

    found = threshold.predictive_threshold(describe, inserted, seed) or 0.8
    figures = {"rows": rows, "seed": seed, "threshold": found, "rule_s": process_time() - start}
    start = process_time()
    described = describe(np.arange(rows), inserted.counts)
    figures["features_s"] = process_time() - start
    exact, figures["exact_s"] = grouped(described, found, rows)
    inside = truth >= 0
    sizes = np.sort(np.bincount(exact))[::-1]
    figures |= {
        "clusters": len(sizes),
        "coverage_120": float(sizes[:120].sum() / rows),
        "ari_exact_truth": float(adjusted_rand_score(truth[inside], exact[inside])),
    }
    for most in micro:
        two, figures[f"two_levels_{most}_s"] = grouped(described, found, most)
        figures[f"ari_{most}"] = float(adjusted_rand_score(exact, two))
        figures[f"ari_{most}_truth"] = float(adjusted_rand_score(truth[inside], two[inside]))
    start = process_time()
    map_principles(described, "umap", seed)
    return figures | {"map_s": process_time() - start}


def grouped(described: Features, distance: float, most: int) -> tuple[np.ndarray, float]:
    """Cluster numbers with at most so many micro-clusters, and the processor seconds."""
    usual, start = agglomeration.EXACT_ROWS, process_time()
    agglomeration.EXACT_ROWS = most
    try:
        return agglomeration.group(described, distance), process_time() - start
    finally:
        agglomeration.EXACT_ROWS = usual


def main() -> None:
    """Measure the sizes and seeds that the command names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clustering", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_000, 20_000, 35_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--micro", type=int, nargs="*", help="micro-clusters; default: half, a fifth"
    )
    given = parser.parse_args()
    for rows in given.rows:
        micro = given.micro or [rows // 2, rows // 5]
        runs = []
        for seed in range(given.seeds):
            runs.append(measured(rows, seed, micro))
            print(json.dumps({k: round(v, 4) for k, v in runs[-1].items()}), flush=True)
        if len(runs) > 1:
            for name in list(runs[0])[2:]:  # after the rows and the seed
                values = [run[name] for run in runs]
                error = 1.96 * stdev(values) / len(values) ** 0.5
                print(f"{rows:>7,} {name:<24} {fmean(values):.4g} ± {error:.2g}", flush=True)


if __name__ == "__main__":
    main()
