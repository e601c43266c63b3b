"""Does the loop learn? The planted world over seeds that were not used for tuning, and a control.

    python -m benchmarks.learning --seeds 11 12 13 14 15

Each run is the command that a user types, in a process and a folder of its own. Writes
`benchmarks/learning.json` (every figure of every iteration) and `benchmarks/learning.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from pathlib import Path
from queue import Queue
from statistics import fmean, stdev

from scipy.stats import t as student

ARMS: Mapping[str, tuple[str, ...]] = {
    "staple": (),
    "control": ("prompts.shuffle_gold=true",),
}
"""Name → settings that differ from the preset. The control's golds belong to other prompts."""
HERE = Path(__file__).parent
CAVEAT = """\
The temperature of evaluation matters, and was chosen on tuning seeds 0 and 1 with the control
in view. There, greedy answers win .86/.91/.97 and .96/.99/.99 (iterations 1/2/3, 400 prompts),
but the control's win too: .64/.52/.49 and .61/.56/.54 (200 prompts, learning rate 7e-4).
Training on any gold removes the seed model's platitudes and uncovers what it weakly knew; greedy
decoding turns that weak lead into a certainty. At .5 the control's were .31/.26/.24 and
.37/.29/.22. The control under greedy decoding was not measured on the reporting seeds."""
History = list[dict[str, float]]
Runs = dict[str, dict[str, History]]
"""Arm → seed → metrics by iteration."""


def main() -> None:
    """Run all arms and seeds, write the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    options.add_argument("--folder", type=Path, default=Path(".staple/learning"))
    chosen = options.parse_args()
    runs = run_all(chosen.arms, chosen.seeds, chosen.jobs, chosen.folder)
    (HERE / "learning.json").write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    (HERE / "learning.md").write_text(report(runs))
    print(report(runs))


def run_all(arms: Sequence[str], seeds: Sequence[int], jobs: int, folder: Path) -> Runs:
    """Every arm on every seed, `jobs` at a time; a job keeps its Prefect database."""
    homes: Queue[Path] = Queue()
    for job in range(jobs):
        homes.put((folder / f"prefect-{job}").absolute())

    def one(job: tuple[str, int]) -> History:
        home = homes.get()
        try:
            return run_one(*job, folder, home)
        finally:
            homes.put(home)

    todo = [(arm, seed) for seed in seeds for arm in arms]
    # a seed's first arm makes the model that its other arms find: never both at once
    first, rest = [j for j in todo if j[0] == arms[0]], [j for j in todo if j[0] != arms[0]]
    done: dict[tuple[str, int], History] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for part in (first, rest):
            done |= dict(zip(part, pool.map(one, part), strict=True))
    return {arm: {str(seed): done[arm, seed] for seed in seeds} for arm in arms}


def run_one(arm: str, seed: int, folder: Path, prefect_home: Path) -> History:
    """`staple run planted` with a seed, and its metrics by iteration."""
    from tasks.record.record import Record, finished

    place = folder / f"{arm}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    home = (folder / f"home-{seed}").absolute()
    settings = [f"seed={seed}", *ARMS[arm]]
    subprocess.run(
        [str(Path(sys.executable).parent / "staple"), "run", "planted"]
        + [word for setting in settings for word in ("--set", setting)],
        cwd=place,
        env={**os.environ, "STAPLE_HOME": str(home), "PREFECT_HOME": str(prefect_home)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    print(f"{arm}, seed {seed}: done", file=sys.stderr, flush=True)
    record = Record("planted", home, f"sqlite:///{place.absolute()}/mlflow.db")
    figures: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for run in reversed(record.runs(kind="stage")):  # the newest last
        if finished(run):
            figures[int(run.tags["iteration"])] |= run.metrics
    return [figures[t] for t in sorted(figures)]


def report(runs: Runs) -> str:
    """The tables, as Markdown."""
    seeds = ", ".join(next(iter(runs.values())))
    lines = [
        "# Learning on the planted world",
        "",
        f"Seeds {seeds}: none was used for tuning (tuning seeds: 0, 1, 2). Made by",
        f"`python -m benchmarks.learning --seeds {seeds.replace(',', '')}`.",
        "",
        "Win rates by the oracle on 200 held-out prompts, half of them with combinations that are",
        "never mined. Each seed has its own pretrained model, prompts and samples. A table's last",
        "line is the mean over seeds with its 95 % t-interval.",
        "",
        *CAVEAT.splitlines(),
        "",
    ]
    for arm, by_seed in runs.items():
        lines += [f"## {arm}", "", *_table(by_seed), ""]
    return "\n".join(lines)


_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("refined vs initial policy, it. 1", "win_rate/refined_vs_initial_0", 1),
    ("it. 2", "win_rate/refined_vs_initial_0", 2),
    ("it. 3", "win_rate/refined_vs_initial_0", 3),
    ("refined vs refined of it. 0, it. 1", "win_rate/refined_vs_0", 1),
    ("it. 3 ", "win_rate/refined_vs_0", 3),
    ("first answer vs it. 0, it. 3", "win_rate/initial_vs_0", 3),
    ("never-mined only, it. 3", "win_rate/planted-held/refined_vs_initial_0", 3),
    ("core of y1, it. 3", "planted/core_initial", 3),
    ("recall", "planted/recall", 3),
    ("precision", "planted/precision", 3),
    ("NMI", "planted/nmi", 3),
    ("ARI", "planted/ari", 3),
    ("faithful, original labels", "faithfulness/original", 3),
    ("faithful, replaced labels", "faithfulness/label", 3),
)
"""Heading, metric, iteration."""


def _table(by_seed: Mapping[str, History]) -> list[str]:
    names = [heading for heading, _, _ in _COLUMNS]
    rows = [_row(seed, history) for seed, history in by_seed.items()]
    mean = [_mean([h[t].get(m) for h in by_seed.values()]) for _, m, t in _COLUMNS]
    rule = "|".join("--:" for _ in range(len(names) + 1))
    return [
        "| seed | " + " | ".join(names) + " |",
        f"|{rule}|",
        *rows,
        "| **mean** | " + " | ".join(mean) + " |",
    ]


def _row(seed: str, history: History) -> str:
    cells = [_cell(history[t], metric) for _, metric, t in _COLUMNS]
    return f"| {seed} | " + " | ".join(cells) + " |"


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    if f"{name}_low" not in metrics:
        return f"{metrics[name]:.2f}"
    return f"{metrics[name]:.2f} [{metrics[f'{name}_low']:.2f}, {metrics[f'{name}_high']:.2f}]"


def _mean(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    if len(found) < 2:
        return "–"
    margin = student.ppf(0.975, len(found) - 1) * stdev(found) / sqrt(len(found))
    return f"**{fmean(found):.2f}** ± {margin:.2f}"


if __name__ == "__main__":
    main()
