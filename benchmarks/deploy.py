"""The policy that ships, on the planted world: first answers that learned, and the gate.

    python -m benchmarks.deploy --seeds 101 102 103

Writes `benchmarks/deploy.json`, prints the tables of `benchmarks/deploy.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.planted_runs import History, Runs, keep, mean_cell, run_all, table
from flows.experiment import Experiment
from models.planted.oracle import core_share
from models.planted.world import sample_examples
from models.policy import Request, user

HERE = Path(__file__).parent
OUTSIDE = 200
"""Prompts outside of the world for each policy."""
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "none, the preset": (),
    "refined": ("train.first_answer=refined",),
    "distilled": ("train.first_answer=distilled",),
    "refined, with a gate": ("train.first_answer=refined", "train.gate=true"),
    "SFT on gold": ("method=sft",),
}
"""What first answers learn from → settings that differ from the preset "planted"."""
TRAINED = "train/tokens"
COLUMNS: Mapping[str, str] = {
    "first answers": "win_rate/initial_vs_0",
    "of them, never mined": "win_rate/planted-held/initial_vs_0",
    "refined answers": "win_rate/refined_vs_initial_0",
    "core of first answers": "planted/core_initial",
    "the same outside the world's prompts": "planted/core_outside",
    "tokens an answer": "answers/tokens",
    "tokens trained on": TRAINED,
}
"""Heading → metric of the last iteration, but that what is trained on is summed over all."""


def main() -> None:
    """Run all variants and seeds, and print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/deploy"))
    chosen = options.parse_args()
    named = {
        name: (f"experiment=deploy-{number}", f"iterations={chosen.iterations}", *VARIANTS[name])
        for number, name in enumerate(VARIANTS)
        if name in chosen.variants
    }
    runs = run_all(named, chosen.seeds, chosen.folder, chosen.jobs, after=retained)
    keep(runs, HERE / "deploy.json")
    print(report(runs))


def retained(experiment: Experiment) -> dict[str, float]:
    """How much of the core the last policy's first answers hold where the prompt is of no kind that
    was mined or pretrained: a chore, and nothing about the user."""
    last, settings = experiment.settings.last, experiment.settings
    policy = experiment.policy(last).load()
    chores = [e.chore for e in sample_examples(OUTSIDE, settings.seed, "eval", "held")]
    asked = [f"please {c.verb} the {c.adjective} {c.part} of my {c.topic}." for c in chores]
    requests = [
        Request(
            messages=(user(text),),
            key=text,
            temperature=settings.evaluate.temperature,
            max_tokens=settings.evaluate.max_response_tokens,
        )
        for text in asked
    ]
    answers = [completions[0].text for completions in policy.generate(requests)]
    shares = [core_share(*pair) for pair in zip(asked, answers, strict=True)]
    return {"planted/core_outside": round(fmean(shares), 4)}


def report(runs: Runs) -> str:
    """The tables: what first answers learned and cost, and the curve of the gate, as Markdown."""
    rows = [row for name, seeds in runs.items() for row in _rows(name, seeds)]
    lines = table(["first answers learn from", "seed", *COLUMNS], rows)
    gated = ((s, h[-1]) for seeds in runs.values() for s, h in seeds.items())
    for seed, metrics in gated:
        if "gate/0/threshold" in metrics:
            lines += ["", f"The gate's curve, seed {seed}:", "", *curve(metrics)]
    return "\n".join(lines)


def curve(metrics: Mapping[str, float]) -> list[str]:
    """The gate's curve of an iteration, a line a threshold; the share of tokens is of the first."""
    points: list[dict[str, float]] = []
    while f"gate/{len(points)}/threshold" in metrics:
        prefix = f"gate/{len(points)}/"
        points.append({k.removeprefix(prefix): v for k, v in metrics.items() if prefix in k})
    rows: Sequence[Sequence[str]] = [
        (
            f"{p['threshold']:.3f}",
            f"{p['kept']:.0%}",
            f"{p['tokens']:.1f}",
            f"{p['tokens'] / points[0]['tokens']:.0%}",
            f"{p['win_rate']:.3f} [{p['low']:.3f}, {p['high']:.3f}]",
        )
        for p in points
    ]
    return table(["threshold", "kept", "tokens a prompt", "share of tokens", "win rate"], rows)


def _rows(name: str, seeds: Mapping[str, History]) -> list[list[str]]:
    """A line for each seed; of three or more also the mean with half its 95 % t-interval."""
    found = [[name, seed, *_cells([history])] for seed, history in seeds.items()]
    if len(seeds) > 2:
        found.append([name, "mean", *_cells(list(seeds.values()))])
    return found


def _cells(histories: Sequence[History]) -> list[str]:
    return [
        mean_cell([_last(history, metric) for history in histories], 0 if metric == TRAINED else 3)
        for metric in COLUMNS.values()
    ]


def _last(history: History, metric: str) -> float | None:
    if metric == TRAINED:
        return sum(metrics.get(metric, 0.0) for metrics in history)
    return history[-1].get(metric)


if __name__ == "__main__":
    main()
