"""A training job: the model, the examples, and where the adapter is written.

`tasks/train.py` makes one and calls `run`. It runs in this process, or in several processes that
`accelerate launch` starts (`models/training/worker.py`); they read the job from a folder of JSON
and Parquet files.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from constitutions.errors import UserError
from models.engine.threads import cores, pinned
from models.policy import PolicySettings, Progress
from models.training.adapter import AdapterSettings, TrainingStep
from models.training.encoding import EncodedExample, Group
from models.training.examples import StoredExamples
from models.training.resumable import drop_damaged

CONVERSATIONS, GROUPS = "examples.arrow", "groups.parquet"
GROUP_ROWS = 1 << 10
"""SAMI's groups in a Parquet row group: Arrow counts its tokens, a million each, in 32 bits."""
ROOT = Path(__file__).parents[2]
STEP = "step"
"""The word that the first process prints after optimiser steps, before their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training, without its examples."""

    model: str
    """Directory or hub name of the base (`policy.model` may be "planted")."""
    policy: PolicySettings
    previous: Path | None
    """The adapter whose training continues; None: training starts at the base."""
    settings: AdapterSettings
    seed: int
    data_digest: str
    """Identifies the training data."""
    out: Path
    """The directory that the adapter is written to."""
    checkpoints: Path
    """The folder of this job's unfinished work."""
    kl: float = 0.0
    """β of SAMI's objective: the weight of the divergence from the policy at the start."""
    distils: bool = False
    """Whether some examples have a teacher."""


Examples = Sequence[EncodedExample] | Sequence[Group]
"""Conversations are trained on by their likelihood, groups by SAMI's objective."""


def run(job: Job, examples: Examples, progress: Progress | None = None) -> list[TrainingStep]:
    """Train, write the adapter to `job.out`, and return the training curve.

    Args:
        progress: as `models.training.loop.train` calls it.

    Raises:
        UserError: the base cannot be loaded, the previous adapter belongs to another base, the
            training diverges, or one of several processes fails.
    """
    drop_damaged(job.checkpoints)
    several = job.settings.processes > 1
    curve = (_run_in_processes if several else fit)(job, examples, progress)
    shutil.rmtree(_folder(job), ignore_errors=True)  # a killed process may have left it
    _return_memory()
    return curve


def _return_memory() -> None:
    """Give the system back what a training freed: glibc keeps it, 2 GB after one of a model of 135M
    parameters on a CPU, beside what the next stages take."""
    gc.collect()  # the Trainer is in a cycle
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def fit(
    job: Job, examples: Examples, progress: Progress | None = None, *, write: bool = True
) -> list[TrainingStep]:
    """`run` in this process alone, or as one of several processes.

    Args:
        write: write the adapter; only the first of several processes does.

    Returns:
        The training curve.

    Raises:
        UserError: as `run`.
    """
    from models.training import bases, updates

    base, tokenizer = bases.load_base(job.model, **job.policy.loading)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with pinned(max(1, (job.policy.threads or cores()) // processes)):
        model = updates.trainable(base, job.settings, job.seed, job.previous)
        curve = _train(model, job, examples, progress)
    if write:
        digest = job.data_digest
        updates.save_adapter(model, job.out, data_digest=digest, tokenizer=tokenizer)
    return curve


def _train(
    model: Any, job: Job, examples: Examples, progress: Progress | None
) -> list[TrainingStep]:
    from models.training import sami
    from models.training.distillation import Start
    from models.training.loop import Likelihood, train

    budget = job.settings.micro_batch_tokens
    how: dict[str, Any] = {"seed": job.seed, "checkpoints": job.checkpoints, "progress": progress}
    if not isinstance(examples[0], Group):
        rows = cast("Sequence[EncodedExample]", examples)
        start = Start(model) if job.distils else None  # before a checkpoint is read
        return train(model, rows, job.settings, objective=Likelihood(budget, start), **how)
    groups = cast("Sequence[Group]", examples)
    if job.kl:  # before the first step, and before a resumed training's checkpoint is read
        groups = sami.referred(model.eval(), groups, budget)
    objective = sami.Information(budget, job.kl)
    return train(model, groups, job.settings, objective=objective, **how)


# Several processes -------------------------------------------------------------------------


def _run_in_processes(
    job: Job, examples: Examples, progress: Progress | None
) -> list[TrainingStep]:
    folder = _folder(job)
    write_job(folder, job, examples)
    with (folder / "log").open("w") as log, _launched(job.settings, folder, log) as process:
        for line in process.stdout or ():
            word, _, steps = line.strip().partition(" ")
            if word == STEP and steps.isdigit() and progress:
                progress(int(steps))
        code = process.wait()
    _raise_what_failed(folder, code)
    return [TrainingStep(*row) for row in json.loads((folder / "curve.json").read_text("utf-8"))]


@contextmanager
def _launched(settings: AdapterSettings, folder: Path, log: Any) -> Iterator[subprocess.Popen[str]]:
    """Start `accelerate launch` on a job's folder; it ends with the block, whatever happens."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_machines", "1", "--num_processes", str(settings.processes)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "models.training.worker"]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*command, str(folder), str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its processes
        process.wait()


def _raise_what_failed(folder: Path, code: int) -> None:
    """Raise the first error that a process wrote; a killed process writes none."""
    log = folder / "log"
    for file in sorted(folder.glob("error-*.json"), key=lambda f: f.stat().st_mtime_ns):
        error = json.loads(file.read_text("utf-8"))
        raise UserError(error.pop("what"), **({"where": str(log)} | error))
    if code or not (folder / "curve.json").exists():
        raise UserError(
            f"a training process ended without a result (exit code {code}): killed, or no memory",
            where=str(log),
            fix="lower train.micro_batch_tokens or train.processes; the same command goes on at "
            "the last checkpoint",
        )


# The job's folder --------------------------------------------------------------------------


def _folder(job: Job) -> Path:
    return job.checkpoints.with_name(f"{job.checkpoints.name}.job")


def write_job(folder: Path, job: Job, examples: Examples) -> None:
    """Write a job and its examples for other processes, in place of an earlier folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(examples, StoredExamples):
        os.link(examples.path, folder / CONVERSATIONS)
    elif isinstance(examples[0], Group):
        _write_groups(folder / GROUPS, cast("Sequence[Group]", examples))
    else:
        StoredExamples.write(folder / CONVERSATIONS, cast("Sequence[EncodedExample]", examples))
    values = {**asdict(job), "policy": job.policy.model_dump(mode="json")}
    values["settings"] = job.settings.model_dump(include=set(AdapterSettings.model_fields))
    (folder / "job.json").write_text(json.dumps(values, default=str, indent=1), "utf-8")


def read_job(folder: Path) -> tuple[Job, Examples]:
    """The job and its examples in a folder that `write_job` wrote."""
    values = json.loads((folder / "job.json").read_text("utf-8"))
    values |= {name: Path(values[name]) for name in ("out", "checkpoints")}
    values["previous"] = Path(values["previous"]) if values["previous"] else None
    values["policy"] = PolicySettings.model_validate(values["policy"])
    values["settings"] = AdapterSettings.model_validate(values["settings"])
    if (folder / CONVERSATIONS).exists():
        return Job(**values), StoredExamples(folder / CONVERSATIONS)
    return Job(**values), _read_groups(folder / GROUPS)


def _write_groups(path: Path, groups: Sequence[Group]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(map(asdict, groups)))
    pq.write_table(table, path, row_group_size=GROUP_ROWS)


def _read_groups(path: Path) -> list[Group]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        tables = [file.read_row_group(n) for n in range(file.num_row_groups)]
    rows = [row for table in tables for row in table.to_pylist()]
    return [Group(**{name: _tuples(value) for name, value in row.items()}) for row in rows]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
