"""`python -m benchmarks.scale`: what the stages cost from 500 to 200,000 prompts, without a model.

The real stages run over the real record (MLflow on SQLite); only the model's answers are replaced,
by texts that the script makes or finds in `--texts`. Each stage of each size has a process of its
own. Its figures are appended to `--out` as they come: a killed run loses nothing, and the same
command measures what is missing. `--table` prints what is there.

    python -m benchmarks.scale --sizes 500 5000 --out before.jsonl
    python -m benchmarks.scale --out before.jsonl --table
    python -m benchmarks.scale --sizes 5000 --kills 10      # killed and resumed: the same bytes?
    python -m benchmarks.scale --sizes 5000 --constitution  # what a person gets to read

Processor seconds are those of the process and of its ended children (`wait4`). Exponents are of the
stage alone: less imports, and less the texts that stand for the model's. Peaks of memory are the
process's own (`getrusage`) and the largest of any one descendant's (psutil, looked at every
second). Bytes written are those that the kernel charges to the process (`ru_oublock`): on tmpfs
there are none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks import kills
from benchmarks.measure import Result
from benchmarks.planted_runs import table as markdown
from benchmarks.scale_process import EXPERIMENT, MEASURED, PROMPTS, Task, environment

Row = dict[str, Any]
OUT = Path(__file__).parent / "scale.jsonl"
SIZES = (500, 5_000, 50_000, 200_000)
REPORT = "report.html"
WIDTHS = ("processes", "workers")
"""What settings call the width of a pool."""


@dataclass(frozen=True)
class Step:
    """A stage as it is measured: its name in the loop, and settings of this measurement alone."""

    stage: str
    overrides: tuple[str, ...] = ()


STEPS = {
    "prompts": Step("prompts"),
    "mine": Step("mine"),
    "score": Step("score"),
    "filter": Step("filter"),
    "cluster": Step("cluster", ("cluster.picture=none",)),
    "map": Step("cluster", ("cluster.picture=umap",)),
    "train": Step("train"),
}
TITLES = {"map": "cluster, with map", "train": "train, until its first step"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and where it is kept."""

    samples: int = 16
    bytes: int = 3_000
    seed: int = 0
    texts: str = ""
    memory: float | None = None
    processes: int | None = None
    settings: tuple[str, ...] = ()
    out: Path = OUT
    folder: Path = Path()

    @property
    def key(self) -> Row:
        """What identifies a measurement, beside its size and step."""
        names = ("samples", "bytes", "seed", "texts", "memory", "processes", "settings")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))

    @property
    def world(self) -> Path:
        """The folder of the texts and of the model."""
        return self.folder / "world"


def main() -> None:
    """Measure what is missing, and print it; or print a table of what there is."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__.split("\n")[0]
    )
    options.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="prompts")
    options.add_argument("--samples", type=int, default=16, help="N, candidates of a prompt")
    options.add_argument("--bytes", type=int, default=3_000, help="of a refinement, in the mean")
    options.add_argument("--stages", nargs="+", default=list(STEPS), choices=list(STEPS))
    options.add_argument(
        "--texts", default="", help="folder of JSONL or CSV files; default: made words"
    )
    options.add_argument("--memory", type=float, help="GB of address space that a process may take")
    options.add_argument("--processes", type=int, help="width of the stages' pools")
    options.add_argument("--set", action="append", default=[], help="a setting, as staple has it")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=OUT, help="JSON lines")
    options.add_argument("--folder", type=Path, help="where it works; default: a temporary one")
    options.add_argument("--keep", action="store_true", help="keep the records that were made")
    options.add_argument("--kills", type=int, default=0, help="SIGKILLs of the smallest size's run")
    options.add_argument("--constitution", action="store_true", help="what a person gets to read")
    options.add_argument("--table", action="store_true", help="print --out as Markdown")
    asked = options.parse_args()
    if asked.table:
        print("\n".join(tables(rows_of(asked.out))))
        return
    plan = Plan(
        samples=asked.samples,
        bytes=asked.bytes,
        seed=asked.seed,
        texts=asked.texts and str(Path(asked.texts).absolute()),
        memory=asked.memory,
        processes=asked.processes,
        settings=(*asked.set, *widths(asked.processes)),
        out=asked.out,
    )
    plan = replace(plan, folder=(asked.folder or usual_folder(plan)).absolute())
    try:
        if asked.kills:
            measure_kills(plan, min(asked.sizes), asked.kills)
        else:
            for size in asked.sizes:
                measure_size(plan, size, asked.stages, asked.constitution, asked.keep)
    finally:
        if not asked.keep and not any(plan.folder.glob("size-*")):
            shutil.rmtree(plan.folder, ignore_errors=True)


def usual_folder(plan: Plan) -> Path:
    """A temporary folder that the same command finds again."""
    same = json.dumps([plan.key, str(plan.out.absolute())])
    return Path(tempfile.gettempdir(), f"scale-{hashlib.sha256(same.encode()).hexdigest()[:12]}")


def widths(processes: int | None) -> list[str]:
    """Settings that give each stage's own pool so many processes.

    Raises:
        SystemExit: no stage has a pool of processes.
    """
    if processes is None:
        return []
    from flows.schema import ExperimentSettings
    from tasks.stages import settings_of

    names = [name for name in WIDTHS if name in ExperimentSettings.model_fields]
    for stage in sorted({step.stage for step in STEPS.values()} - {"train"}):  # its: one a GPU
        there = settings_of(stage).model_fields
        names += [f"{stage}.{name}" for name in WIDTHS if name in there]
    if not names:
        raise SystemExit("--processes: no stage has a pool whose width is a setting")
    return [f"{name}={processes}" for name in names]


# A size -----------------------------------------------------------------------------------------


def measure_size(
    plan: Plan, size: int, stages: Sequence[str], constitution: bool, keep: bool
) -> None:
    """Every step that has no row yet, in the loop's order; earlier steps are run where needed."""
    wanted = [name for name in stages if not row_of(plan, size, name)]
    views = constitution and not row_of(plan, size, "constitution")
    reached = [*wanted, *(["map"] if views else [])]
    if not reached:
        return
    kept = (place_of(plan, size) / "mlflow.db").exists()
    place, order = begun(plan, size), list(STEPS)
    last = max(map(order.index, reached))
    for name in order[: last + 1]:
        if name not in reached and (name == "map" or (kept and row_of(plan, size, name))):
            continue  # no later step reads it, or the record has it
        if not measure_step(plan, size, name, name in wanted, place):
            return
    if views:
        note(plan, size, "constitution", read_by_people(plan, place))
    if not keep:
        shutil.rmtree(place)


def place_of(plan: Plan, size: int) -> Path:
    """The folder with the record of a size."""
    return plan.folder / f"size-{size}"


def begun(plan: Plan, size: int) -> Path:
    """The place of a size, with its prompts and settings."""
    from benchmarks.scale_world import World, given_sentences, made_sentences

    place, texts = place_of(plan, size), plan.world / "world.json"
    if not texts.exists():
        plan.world.mkdir(parents=True, exist_ok=True)
        said = given_sentences(Path(plan.texts)) if plan.texts else made_sentences(plan.seed)
        World(said, plan.seed, plan.bytes).save(texts)
    if not (place / "mlflow.db").exists():
        place.mkdir(parents=True, exist_ok=True)
        task = Task(
            does="place",
            place=str(place),
            world=str(plan.world),
            settings=experiment_settings(plan, size),
        )
        _check(in_process(task))
    return place


def experiment_settings(plan: Plan, size: int) -> Row:
    """As the preset llama-3.1-8b has them, on one iteration of so many prompts."""
    return {
        "experiment": EXPERIMENT,
        "seed": plan.seed,
        "iterations": 1,
        "policy": {
            "model": str(plan.world / "model"),
            "quantization": "none",
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        },
        "prompts": {
            "sources": [{"path": str(place_of(plan, size) / PROMPTS)}],
            "first": size,
            "held_out": max(2, min(1_000, size // 10)),
        },
        "mine": {"samples": plan.samples, "max_response_tokens": 1024},
        "cluster": {"distance_threshold": "predictive", "constitution_size": 120},
        "train": {"batch_size": 16, "micro_batch_tokens": 2048},
    }


def measure_step(plan: Plan, size: int, name: str, wanted: bool, place: Path) -> bool:
    """Run a step, and note its figures where they are wanted; False: it failed."""
    step = STEPS[name]
    task = Task(
        does=step.stage,
        place=str(place),
        world=str(plan.world),
        memory=plan.memory,
        overrides=(*step.overrides, *plan.settings),
        force=wanted,
    )
    shutil.rmtree(place / ".staple" / "work", ignore_errors=True)  # of a process that was killed
    done = in_process(task)
    if wanted or done.failure:
        note(plan, size, name, done.row(place / MEASURED))
    return not done.failure


def note(plan: Plan, size: int, step: str, figures: Row) -> None:
    """Append a row, and say it."""
    row = {"size": size, "step": step, **plan.key, **figures}
    with plan.out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k not in plan.key}), flush=True)


def rows_of(file: Path) -> list[Row]:
    """The rows that were noted; the last line of a killed run may be half a one."""
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def row_of(plan: Plan, size: int, step: str) -> Row | None:
    """The finished row of a measurement; one that failed is measured again."""
    same = {"size": size, "step": step, **plan.key}
    found = [r for r in rows_of(plan.out) if same.items() <= r.items() and not r.get("failure")]
    return found[-1] if found else None


# A process --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that ended: seconds, bytes, what it printed, and why it failed."""

    cpu: float
    wall: float
    child_rss: int
    written: int
    output: str
    failure: str

    def row(self, measured: Path) -> Row:
        """The figures of a stage, with those that its process told."""
        row: Row = {"cpu": self.cpu, "wall": self.wall, "child_rss": self.child_rss}
        row |= {"written": self.written, "failure": self.failure}
        return row | ({} if self.failure else json.loads(measured.read_text("utf-8")))


def in_process(task: Task) -> Ended:
    """A task in a process of its own."""
    return ended(["benchmarks.scale_process", json.dumps(asdict(task))], {})


def ended(words: Sequence[str], variables: dict[str, str], folder: str | None = None) -> Ended:
    """`python -m words`, watched until it ends."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=output,
            stderr=errors,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
        )
        try:
            peak, status, usage = _watched(process)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(
            cpu=usage.ru_utime + usage.ru_stime,
            wall=time.monotonic() - start,
            child_rss=peak,
            written=usage.ru_oublock * 512,
            output=_text(output),
            failure=_reason(process.returncode, _text(errors)),
        )


def _watched(process: subprocess.Popen[bytes]) -> tuple[int, int, Any]:
    """The largest memory of any descendant, the exit status and the resources used."""
    peak, start = 0, time.monotonic()
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return peak, status, usage
        try:
            for child in psutil.Process(process.pid).children(recursive=True):
                peak = max(peak, child.memory_info().rss)
        except psutil.Error:
            pass
        time.sleep(min(1.0, 0.05 + (time.monotonic() - start) / 50))


def _text(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _reason(code: int, errors: str) -> str:
    if code == 0:
        return ""
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    return f"killed by signal {-code}" if code < 0 else last[:300]


def _check(done: Ended) -> None:
    if done.failure:
        raise SystemExit(f"the measurement could not be prepared: {done.failure}")


# What a person gets to read -----------------------------------------------------------------------


def read_by_people(plan: Plan, place: Path) -> Row:
    """The constitution's size and coverage, and what its views cost: seconds and bytes."""
    variant = ("cluster.distance_threshold=0.7", "cluster.picture=none", *plan.settings)
    where: Any = {"place": str(place), "world": str(plan.world)}
    _check(in_process(Task(does="cluster", overrides=variant, **where)))
    noted = json.loads((place / MEASURED).read_text("utf-8"))
    last = f"{EXPERIMENT}:1:cluster@{noted['attempts']}"
    usual = (*STEPS["map"].overrides, *plan.settings)
    _check(in_process(Task(does="cluster", overrides=usual, **where)))  # the current one again
    figures = json.loads((place / MEASURED).read_text("utf-8"))["figures"]
    pages = range(1, 1 + max(1, math.ceil(figures["constitution_size"] / 60)))
    show = ["constitution", "show", EXPERIMENT, "--page"]
    views = {f"show, page {page}": [*show, str(page)] for page in pages}
    views["compare"] = ["compare", f"{EXPERIMENT}:1:cluster@1", last]
    views["report"] = ["report", EXPERIMENT, "--out", REPORT]
    found: Row = {}
    for name, words in views.items():
        done = ended(["flows.commands.cli", *words], environment(place), str(place))
        _check(done)
        printed = len(done.output.encode())
        size = (place / REPORT).stat().st_size if name == "report" else printed
        found[name] = {"cpu": done.cpu, "bytes": size}
    form = in_process(Task(does="form", **where))
    _check(form)
    found["review form"] = {"cpu": form.cpu, **json.loads(form.output.splitlines()[-1])}
    return {"figures": figures, "views": found}


# Kills -------------------------------------------------------------------------------------------


def measure_kills(plan: Plan, size: int, times: int) -> None:
    """All stages of a size without interruption, and again with SIGKILLs."""
    place = begun(plan, size)
    overrides = ("train.tokens=50000", *plan.settings)
    task = Task(does="run", place=str(place), world=str(plan.world), overrides=overrides)
    command = ["benchmarks.scale_process", json.dumps(asdict(task))]
    with tempfile.TemporaryDirectory(dir=plan.folder) as folder:
        outcome = kills.measure(Path(folder), command, EXPERIMENT, times, plan.seed)
    shutil.rmtree(place)
    note(plan, size, "kills", asdict(outcome))
    print(kills.summary(outcome))


# Tables -------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: a table for each combination of options, and those of constitutions and kills."""
    latest = {json.dumps([_options(r), r["size"], r["step"]]): r for r in rows}
    for options in dict.fromkeys(_options(r) for r in latest.values()):
        mine = [r for r in latest.values() if _options(r) == options]
        yield from (options, "")
        stages = sorted(
            (r for r in mine if r["step"] in STEPS),
            key=lambda r: (list(STEPS).index(r["step"]), r["size"]),
        )
        if stages:
            yield from (*stage_table(stages), "")
        for row in mine:
            if row["step"] == "constitution":
                yield from (*constitution_table(row), "")
            if row["step"] == "kills":
                yield from (_killed(row), "")


def _killed(row: Row) -> str:
    stages = f"{row['attempts']} stages, {len(row['differ'])} with other digests"
    return (
        f"{row['size']:,} prompts, {len(row['kills'])} kills: {stages}, {row['twice']} parts twice."
    )


def _options(row: Row) -> str:
    parts = [
        f"{row['samples']} samples",
        f"{row['bytes']:,} bytes each",
        "given texts" if row["texts"] else "made texts",
        f"seed {row['seed']}",
        f"{row['memory']:g} GB of address space" if row["memory"] else "",
        *row["settings"],
    ]
    return ", ".join(filter(None, parts)) + ":"


def stage_table(rows: Sequence[Row]) -> list[str]:
    """A line for each stage and size; the exponent is from the size before."""
    columns = (
        "stage",
        "prompts",
        "CPU s",
        "of it the stage",
        "exponent",
        "wall s",
        "peak MB",
        "largest child MB",
        "written MB",
    )
    lines: list[tuple[str, ...]] = []
    before: Row | None = None
    for row in rows:
        title = str(TITLES.get(row["step"], row["step"]))
        if row["failure"]:
            lines.append((title, f"{row['size']:,}", f"failed: {row['failure']}", *["–"] * 6))
            continue
        lines.append(
            (
                title,
                f"{row['size']:,}",
                f"{row['cpu']:.1f}",
                f"{alone(row):.1f}",
                exponent(before, row),
                f"{row['wall']:.1f}",
                *(f"{row[name] / 1e6:,.0f}" for name in ("own_rss", "child_rss", "written")),
            )
        )
        before = row
    return markdown(columns, lines)


def alone(row: Row) -> float:
    """Processor seconds of the stage, without start and model."""
    return max(row["cpu"] - row["start"] - row["model"], 0.01)


def exponent(before: Row | None, row: Row) -> str:
    """k in seconds ∝ prompts^k, between two sizes of one step."""
    if before is None or before["step"] != row["step"]:
        return "–"
    return f"{math.log(alone(row) / alone(before)) / math.log(row['size'] / before['size']):.2f}"


def constitution_table(row: Row) -> list[str]:
    """What a person reads of a constitution."""
    figures = row["figures"]
    parts = (
        f"{figures['cluster/distinct']:,.0f} distinct principles",
        f"{figures['constitution_size']:.0f} in the constitution, which label "
        f"{figures['coverage']:.0%} of the trajectories",
    )
    head = f"{row['size']:,} prompts: {', '.join(parts)}."
    lines = [
        (name, f"{v['cpu']:.1f}", f"{v['bytes'] / 1e3:,.0f}") for name, v in row["views"].items()
    ]
    return [head, "", *markdown(("view", "CPU s", "kB"), lines)]


# make bench ---------------------------------------------------------------------------------------


def scale_small() -> Result:
    """Processor milliseconds a prompt at 1,000 prompts beside those at 100, all stages together."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(out=Path(folder, "rows.jsonl"), folder=Path(folder))
        for size in (100, 1_000):
            measure_size(plan, size, list(STEPS), constitution=False, keep=False)
        rows = rows_of(plan.out)
    spent = {n: 1e3 * sum(alone(r) for r in rows if r["size"] == n) / n for n in (100, 1_000)}
    exponents = {
        r["step"]: exponent(row_at(rows, 100, r["step"]), r) for r in rows if r["size"] == 1_000
    }
    return Result(
        ratio=spent[100] / spent[1_000],
        ours=spent[1_000],
        peer=spent[100],
        unit="processor ms a prompt, at 1,000 and at 100 prompts",
        details={f"exponent of {step}": k for step, k in exponents.items()},
    )


def row_at(rows: Sequence[Row], size: int, step: str) -> Row:
    """The row of a step at a size."""
    return next(r for r in rows if (r["size"], r["step"]) == (size, step))


if __name__ == "__main__":
    main()
