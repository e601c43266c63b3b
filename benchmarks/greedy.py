"""The planted world under greedy decoding: does the loop win, and does its control?

    python -m benchmarks.greedy --seeds 101 102 103 104 105

The control's golds belong to other prompts, so that it can only learn what any golds teach. Both
are evaluated at the preset's temperature, which was chosen with the control in view, and greedily;
each pair shares its training. "misled" starts from the seed model "planted-misled", which without
gold believes the wrong behaviour of a cue's two: greedy decoding uncovers nothing right there.
Writes `benchmarks/greedy.json` and prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.planted_runs import Runs, keep, mean_cell, run_all, table

HERE = Path(__file__).parent
CONTROL, GREEDY = "prompts.shuffle_gold=true", "evaluate.temperature=0"
MISLED = ("experiment=misled", "policy.model=planted-misled")
ARMS: Mapping[str, tuple[str, ...]] = {
    "STaPLe, temperature .5": (),
    "STaPLe, greedy": (GREEDY,),
    "control, temperature .5": (CONTROL,),
    "control, greedy": (CONTROL, GREEDY),
    "misled: STaPLe, temperature .5": MISLED,
    "misled: STaPLe, greedy": (*MISLED, GREEDY),
    "misled: control, temperature .5": (*MISLED, CONTROL),
    "misled: control, greedy": (*MISLED, CONTROL, GREEDY),
}
"""Name → settings that differ from the preset "planted"."""
HEADLINE = "win_rate/refined_vs_initial_0"


def main() -> None:
    """Run all arms and seeds, and print the table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.greedy", description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/greedy"))
    chosen = options.parse_args()
    named = {
        arm: ("experiment=greedy", f"iterations={chosen.iterations}", *settings)
        for arm, settings in ARMS.items()
        if arm in chosen.arms
    }
    runs = run_all(named, chosen.seeds, chosen.folder, chosen.jobs)
    keep(runs, HERE / "greedy.json")
    print(report(runs))


def report(runs: Runs) -> str:
    """Refined answers against iteration 0's first ones, by iteration: each seed's, and the mean."""
    rows = []
    for arm, seeds in runs.items():
        histories = list(seeds.values())
        for t in range(1, len(histories[0])):
            rates = [history[t].get(HEADLINE) for history in histories]
            cells = [mean_cell([rate]) for rate in rates]
            rows.append([arm, str(t), *cells, mean_cell(rates)])
    return "\n".join(table(["arm", "iteration", *next(iter(runs.values())), "mean"], rows))


if __name__ == "__main__":
    main()
