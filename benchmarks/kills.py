"""Kill an experiment at random moments, resume it until it is done: is anything lost or changed?

    python -m benchmarks.kills --kills 20 --seed 1

Runs the planted world once without interruption, then again in another folder, where the whole
process tree gets SIGKILL at moments spread at random over all stages. Compares the digests of
every stage's outputs, counts the shards that were computed twice and the work that was lost.
Writes `benchmarks/kills.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

HERE = Path(__file__).parent
SETTINGS = (
    "iterations=2",
    "prompts.first=200",
    "prompts.later=200",
    "prompts.held_out=100",
    "shard_size=25",
    "cluster.picture=svd",
)
Place = tuple[str, int]
Line = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: which stage was at work, and the seconds of work that had to be done again."""

    stage: str
    iteration: int
    lost: float
    step: float
    """The longest work between two savings of this stage, in the uninterrupted run."""


@dataclass(frozen=True)
class Outcome:
    """What the interrupted run did, against the uninterrupted one."""

    kills: tuple[Kill, ...]
    attempts: int
    differ: tuple[Place, ...]
    """Stages whose outputs have another digest."""
    twice: int
    """Shards or stages that were computed again though they had been finished."""
    seconds: float
    """Of the uninterrupted run, from its first stage's beginning to the end."""


def main() -> None:
    """Run both and print what differed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    chosen = options.parse_args()
    command = [
        "flows.commands.cli",
        "run",
        "planted",
        *(word for s in SETTINGS for word in ("--set", s)),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        outcome = measure(folder.absolute(), command, "planted", chosen.kills, chosen.seed)
    (HERE / "kills.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    print(summary(outcome))


def measure(
    folder: Path, command: Sequence[str], experiment: str, kills: int, seed: int
) -> Outcome:
    """Run `python -m <command>` to its end, and again with `kills` interruptions."""
    plain, broken = folder / "plain", folder / "broken"
    for place in (plain, broken):
        place.mkdir(parents=True)
    run(plain, command)
    whole = journal(plain)
    if (made := plain / ".staple" / "planted").is_dir():  # pretraining is no part of the loop
        shutil.copytree(made, broken / ".staple" / "planted")
    steps = longest_steps(whole)
    done = [kill_at(broken, command, *moment) for moment in choose(whole, kills, seed)]
    run(broken, command)
    before, after = digests(plain, experiment), digests(broken, experiment)
    return Outcome(
        kills=tuple(
            replace(kill, step=steps.get((kill.stage, kill.iteration), 0.0)) for kill in done
        ),
        attempts=len(before),
        differ=tuple(place for place in before if before[place] != after.get(place)),
        twice=sum(count - 1 for count in finished_units(journal(broken)).values()),
        seconds=whole[-1]["time"] - whole[0]["time"],
    )


def run(folder: Path, command: Sequence[str]) -> None:
    """`python -m <command>` in a folder of its own, to its end."""
    process = start(folder, command)
    if process.wait() != 0:
        raise RuntimeError((folder / "output.txt").read_text()[-3000:])


def start(folder: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `python -m <command>` with homes inside the folder."""
    environment = {
        **os.environ,
        "STAPLE_HOME": str(folder / ".staple"),
        "PREFECT_HOME": str(folder / "prefect"),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(HERE.parent)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def choose(whole: Sequence[Line], kills: int, seed: int) -> list[tuple[Place, float]]:
    """Random moments, in order: every stage as often as any other, anywhere within it."""
    rng = random.Random(seed)
    seconds = durations(whole)
    places = list(seconds)
    rounds = [rng.sample(places, len(places)) for _ in range(-(-kills // len(places)))]
    chosen = [place for drawn in rounds for place in drawn][:kills]
    return [(place, rng.uniform(0, seconds[place])) for place in sorted(chosen, key=places.index)]


def kill_at(folder: Path, command: Sequence[str], place: Place, delay: float) -> Kill:
    """Start, wait until the stage has begun and `delay` seconds more, kill the process tree.

    Where an earlier run has got beyond that stage, the first that begins takes its place.
    """
    before = journal(folder)
    is_over = place in recorded(before)
    process = start(folder, command)
    while process.poll() is None:
        now = begun(journal(folder)[len(before) :])
        if place in now or (is_over and now):
            break
        time.sleep(0.005)
    time.sleep(delay)
    moment = time.time()
    ended = process.poll() is not None
    kill_tree(process)
    lines = journal(folder)[len(before) :]
    if ended or not lines:
        return Kill("none", 0, 0.0, 0.0)
    working = [x for x in lines if x["event"] == "begun"][-1]
    return Kill(working["stage"], working["iteration"], moment - lines[-1]["time"], 0.0)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in [process.pid, *(child.pid for child in family)]:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def journal(folder: Path) -> list[Line]:
    """The whole lines of a folder's journal."""
    path = folder / ".staple" / "work" / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def begun(lines: Sequence[Line]) -> set[Place]:
    """The stages that were begun."""
    return {(x["stage"], x["iteration"]) for x in lines if x["event"] == "begun"}


def recorded(lines: Sequence[Line]) -> set[Place]:
    """The stages that were finished and recorded."""
    return {(x["stage"], x["iteration"]) for x in lines if x["event"] == "recorded"}


def durations(lines: Sequence[Line]) -> dict[Place, float]:
    """Seconds from the beginning of each stage until it was recorded, in their order."""
    starts = {(x["stage"], x["iteration"]): x["time"] for x in lines if x["event"] == "begun"}
    ends = {(x["stage"], x["iteration"]): x["time"] for x in lines if x["event"] == "recorded"}
    return {place: ends[place] - starts[place] for place in starts}


def longest_steps(lines: Sequence[Line]) -> dict[Place, float]:
    """Seconds of the longest work between two lines of each stage: a shard, or a short stage."""
    steps: dict[Place, float] = {}
    place = ("", 0)
    for before, line in itertools.pairwise(lines):
        if before["event"] == "begun":
            place = before["stage"], before["iteration"]
        if line["event"] != "begun":
            steps[place] = max(steps.get(place, 0.0), line["time"] - before["time"])
    return steps


def finished_units(lines: Sequence[Line]) -> Counter[tuple[str, str]]:
    """How often each shard, and each stage as a whole, was computed to its end."""
    return Counter(
        (x["fingerprint"], x.get("name", "")) for x in lines if x["event"] in ("shard", "computed")
    )


def digests(folder: Path, experiment: str) -> Mapping[Place, str]:
    """The digest of every stage's current outputs."""
    from tasks.record.record import Record

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    record = Record(experiment, folder / ".staple", uri)
    tags = [run.tags for run in record.runs(kind="stage")]
    places = {(tag["stage"], int(tag["iteration"])) for tag in tags}
    return {place: record.needs(*place).digest for place in sorted(places)}


def summary(outcome: Outcome) -> str:
    """The figures as text."""
    where = Counter(kill.stage for kill in outcome.kills)
    lost = sum(kill.lost for kill in outcome.kills)
    more = [kill.lost - kill.step for kill in outcome.kills]
    return "\n".join(
        [
            f"{len(outcome.kills)} kills: {', '.join(f'{s} {n}' for s, n in where.items())}",
            f"{outcome.attempts} stages, of which {len(outcome.differ)} have other digests"
            + "".join(f" ({stage} {t})" for stage, t in outcome.differ),
            f"computed twice: {outcome.twice}",
            f"done again: {lost:.1f} s over all kills; the whole run takes {outcome.seconds:.1f} s",
            f"lost per kill, less the longest work between two savings of the same stage: "
            f"at most {max(more):+.2f} s, in the mean {fmean(more):+.2f} s",
        ]
    )


if __name__ == "__main__":
    main()
