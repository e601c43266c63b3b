"""Does naming principles pay? STaPLe beside Self-Refine, STaR and SFT on gold, at equal budgets.

    python -m benchmarks.baselines tune --seeds 0 1
    python -m benchmarks.baselines report --seeds 21 22 23 24 25

`tune` tries each trained method with each learning rate; `report` runs every method with the rate
that was chosen there. Both write what they found beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.planted_runs import History, Runs, keep, mean_cell, run_all, table

HERE = Path(__file__).parent
TUNED, REPORTED = HERE / "baselines-tuning.json", HERE / "baselines.json"
RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")
BUDGET = "train.tokens=80000"
"""Tokens of one training, context included, for every method: about the preset's four epochs."""

METHODS: Mapping[str, tuple[str, ...]] = {
    "constrained": (),
    "unconstrained": ("cluster.representative=none",),
    "STaR": ("method=star", "mine.samples=7"),
    "SFT on gold": ("method=sft",),
}
"""Trained method → its settings. Seven refinements without a principle cost a little more tokens
than five with theirs: the difference is STaR's advantage."""
SCARCE = ("prompts.first=150", "prompts.later=150", "train.tokens=30000")
SCARCE_METHODS: Mapping[str, tuple[str, ...]] = {
    "constrained": ("mine.samples=2",),
    "unconstrained": ("cluster.representative=none", "mine.samples=2"),
    "STaR": ("method=star", "mine.samples=3"),
}
"""Few prompts and few samples of each: where a policy seldom stumbles on a better answer, seeing
the gold while naming the principle should matter most."""
UNSURE = (BUDGET, "policy.model={unsure}")
"""A seed model that is as able to name what the gold does better, and to follow what it named, but
seldom finds the right principle, or the right edit, by itself: what is left to the hint?"""
UNTRAINED: Mapping[str, tuple[str, ...]] = {
    "initial, self-guided": ("iterations=0",),
    "Self-Refine": ("method=star", "iterations=0"),
    "self-guided, temperature 1": ("iterations=0", "evaluate.temperature=1.0"),
    "unguided, temperature 1": ("method=star", "iterations=0", "evaluate.temperature=1.0"),
}
ALL, HELD = "", "planted-held/"
REGIMES = ("", ", scarce", ", unsure")
Reading = Callable[[str, History], float | None]


def main() -> None:
    """Tune or report."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=["tune", "report"])
    options.add_argument("--seeds", type=int, nargs="+", required=True)
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/baselines"))
    chosen = options.parse_args()
    if chosen.what == "tune":
        runs = run_all(tuning(), chosen.seeds, chosen.folder, chosen.jobs)
        keep(runs, TUNED)
        print(*tuning_table(runs), sep="\n")
        return
    rates = chosen_rates(json.loads(TUNED.read_text()))
    runs = run_all(reporting(rates), chosen.seeds, chosen.folder, chosen.jobs)
    keep(runs, REPORTED)
    print(*tables(runs), sep="\n")


def tuning() -> dict[str, tuple[str, ...]]:
    """Each trained method with each learning rate."""
    return {
        f"{name} @ {rate}": (*settings, BUDGET, f"train.learning_rate={rate}")
        for rate in RATES
        for name, settings in METHODS.items()
    }


def reporting(rates: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Each trained method with its learning rate, and the untrained ones."""
    trained = {
        name: (*settings, BUDGET, f"train.learning_rate={rates[name]}")
        for name, settings in METHODS.items()
    }
    scarce = {
        f"{name}, scarce": (*settings, *SCARCE, f"train.learning_rate={rates[name]}")
        for name, settings in SCARCE_METHODS.items()
    }
    unsure = {
        f"{name}, unsure": (*METHODS[name], *UNSURE, f"train.learning_rate={rates[name]}")
        for name in SCARCE_METHODS
    }
    return {**trained, **UNTRAINED, **scarce, **unsure}


def chosen_rates(runs: Runs) -> dict[str, str]:
    """Method → the rate with the best mean win rate of the last iteration, on tuning seeds."""
    return {name: max(RATES, key=lambda rate: _tuned(runs, name, rate)) for name in METHODS}


def tuning_table(runs: Runs) -> list[str]:
    """Mean win rate of the last iteration, by method and learning rate."""
    rows = [[name, *(_shown(_tuned(runs, name, rate)) for rate in RATES)] for name in METHODS]
    return table(["learning rate", *RATES], rows)


def _shown(rate: float) -> str:
    return f"{rate:.3f}" if rate else "–"


def tables(runs: Runs) -> list[str]:
    """Win rates against the initial policy, what they cost, and paired differences."""
    columns = ["method", "it. 1", "last", "best", "never mined, last", "never mined, best",
               "improved in mining, it. 1", "generated", "in training", "with loss"]  # fmt: skip
    readings = [first(ALL), last(ALL), best(ALL), last(HELD), best(HELD)]
    costs = [total("generated_tokens"), total("train/tokens"), total("train/trained_tokens")]
    rows = [
        [name, *(mean_cell(_each(runs, name, r)) for r in (*readings, improved))]
        + [f"{fmean(_each(runs, name, c)):,.0f}" for c in costs]
        for name in runs
    ]
    pairs = [
        *((f"constrained{where}", f"unconstrained{where}") for where in REGIMES),
        *((f"constrained{where}", f"STaR{where}") for where in REGIMES),
        *((f"unconstrained{where}", f"STaR{where}") for where in REGIMES),
        ("STaR", "Self-Refine"),
        ("SFT on gold", "constrained"),
    ]
    differences = [
        [f"{a} − {b}", *(mean_cell(_paired(runs, a, b, r), 3) for r in readings)] for a, b in pairs
    ]
    return [
        *table(columns, rows),
        "",
        *table(["difference, paired by seed", *columns[1:6]], differences),
    ]


def first(part: str) -> Reading:
    """The win rate after one iteration."""
    return lambda name, history: _rate(name, history[1], part) if len(history) > 1 else None


def improved(_: str, history: History) -> float | None:
    """The share of the first iteration's prompts on which at least one candidate beat y1."""
    return history[1].get("refinement_rate") if len(history) > 1 else None


def last(part: str) -> Reading:
    """The win rate of the last iteration, on all held-out prompts or a part of them."""
    return lambda name, history: _rate(name, history[-1], part)


def best(part: str) -> Reading:
    """The highest win rate of any iteration: chosen on the prompts it is reported on."""
    return lambda name, history: max(
        (r for metrics in history if (r := _rate(name, metrics, part)) is not None), default=None
    )


def total(metric: str) -> Reading:
    """A cost, summed over the iterations."""
    return lambda _, history: sum(metrics.get(metric, 0.0) for metrics in history)


def _rate(name: str, metrics: Mapping[str, float], part: str) -> float | None:
    """Final answers against the initial policy's: after SFT on gold, the first answer is final."""
    which = "initial_vs_0" if name.startswith("SFT") else "refined_vs_initial_0"
    return metrics.get(f"win_rate/{part}{which}")


def _tuned(runs: Runs, name: str, rate: str) -> float:
    """Mean win rate of the last iteration; 0 where this rate was not tried."""
    tried = f"{name} @ {rate}"
    return fmean(_each(runs, tried, last(ALL))) if tried in runs else 0.0


def _each(runs: Runs, name: str, reading: Reading) -> list[float]:
    found = (reading(name, history) for history in runs[name].values())
    return [value for value in found if value is not None]


def _paired(runs: Runs, a: str, b: str, reading: Reading) -> list[float | None]:
    pairs = ((reading(a, runs[a][s]), reading(b, runs[b][s])) for s in runs[a])
    return [x - y if x is not None and y is not None else None for x, y in pairs]


if __name__ == "__main__":
    main()
