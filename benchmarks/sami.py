"""SAMI on the planted world over seeds that were not used for tuning: a given constitution, and one
that a smaller model wrote.

    python -m benchmarks.sami --seeds 21 22 23 24 25

Writes `benchmarks/sami.json` (figures of every iteration) and `benchmarks/sami.md`. An arm that is
not run keeps the figures that it has there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.planted_runs import History, Overrides, Runs, keep, mean_cell, run_all, table

HERE = Path(__file__).parent
WRITER = {
    "model": "planted-sami-small",
    "templates": "terse",
    "quantization": "none",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}
TOPICS = ["time", "cost", "safety", "quality", "privacy", "health", "noise", "waste"]
ARMS: Mapping[str, Overrides] = {
    "given": ("experiment=given",),
    "weak-to-strong": (
        "experiment=weak-to-strong",
        "write.constitution=null",
        f"write.writer={json.dumps(WRITER)}",
        f"write.topics={json.dumps(TOPICS)}",
        "write.principles=20",
    ),
}
"""Name → settings that differ from the preset planted-sami."""
RATES = {
    "principles": "win_rate/principles_vs_0",
    "antitheses": "win_rate/antitheses_vs_0",
    "both": "win_rate/constitution_vs_0",
    "… equal lengths": "win_rate/constitution_vs_0_length_controlled",
    "held out": "win_rate/held_out_vs_0",
}
FIGURES = {
    "I(Y; C \\| X), nats": ("mi/per_token", 3),
    "obeyed": ("planted/obeyed_principles", 2),
    "… antitheses": ("planted/obeyed_antitheses", 2),
    "… held-out principles": ("planted/obeyed_held_out_principles", 2),
    "… held-out antitheses": ("planted/obeyed_held_out_antitheses", 2),
    "core, with principles": ("planted/core_principles", 2),
    "core, without constitution": ("planted/core_plain", 3),
    "characters with principles": ("answers/principles_characters", 0),
    "characters with antitheses": ("answers/antitheses_characters", 0),
    "characters without constitution": ("answers/plain_characters", 0),
}


def main() -> None:
    """Run all arms and seeds, write the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25])
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/sami"))
    chosen = options.parse_args()
    arms = {name: ARMS[name] for name in chosen.arms}
    file = HERE / "sami.json"
    runs: Runs = json.loads(file.read_text()) if file.exists() else {}
    runs |= run_all(arms, chosen.seeds, chosen.folder, chosen.jobs, "planted-sami")
    keep(runs, file)
    (HERE / "sami.md").write_text(report(runs))
    print(report(runs))


def report(runs: Runs) -> str:
    """The tables as Markdown."""
    lines = [
        "# SAMI on the planted world",
        "",
        "Seeds that were not used for tuning, each with a model of its own. Win rates by the "
        "oracle against the initial policy under the same constitution, on 100 held-out prompts; "
        "mean over seeds ± half a 95 % t-interval. How it is measured: `tasks/sami/evaluate.py`.",
    ]
    for name, arm in sorted(runs.items()):
        command = f"python -m benchmarks.sami --arms {name} --seeds {' '.join(sorted(arm))}"
        lines += ["", f"## {TITLES[name]}", "", f"`{command}`", "", NOTES[name], ""]
        lines += [*_over_iterations(arm), "", *_last(arm)]
    return "\n".join(lines) + "\n"


TITLES = {
    "given": "A given constitution: 24 principles, six of them held out",
    "weak-to-strong": "Weak to strong: written by planted-sami-small, a fifth of the size",
}
NOTES = {
    "given": "The antithesis of each is right; no two are about the same behaviour.",
    "weak-to-strong": "Twenty are asked for. Some antitheses are of another behaviour, and several "
    "principles word the same one: those that are held out may be about one that is trained.",
}


def _over_iterations(arm: Mapping[str, History]) -> list[str]:
    histories = list(arm.values())
    iterations = range(len(histories[0]))
    rows = []
    for title, name in RATES.items():
        rows.append([f"win rate, {title}", *(_mean(histories, t, name) for t in iterations)])
    for title, (name, digits) in FIGURES.items():
        rows.append([title, *(_mean(histories, t, name, digits) for t in iterations)])
    return table(["iteration", *map(str, iterations)], rows)


def _mean(histories: Sequence[History], t: int, name: str, digits: int = 2) -> str:
    return mean_cell([history[t].get(name) for history in histories], digits)


def _last(arm: Mapping[str, History]) -> list[str]:
    """Every seed's last iteration, with the intervals of its own prompts."""
    rows = [
        [seed, *(_interval(history[-1], name) for name in RATES.values())]
        for seed, history in sorted(arm.items())
    ]
    return table(["seed, last iteration", *RATES], rows)


def _interval(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    return f"{metrics[name]:.2f} [{metrics[f'{name}_low']:.2f}, {metrics[f'{name}_high']:.2f}]"


if __name__ == "__main__":
    main()
