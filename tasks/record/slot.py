"""Where a stage runs: `Slot.attempt` finds its outputs by their fingerprint, or computes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from constitutions.untrusted import clean
from models.engine.threads import pinned
from models.policy import FINGERPRINT
from models.settings import Settings
from tasks.record import interruption, locks
from tasks.record.artifacts import MANIFEST
from tasks.record.code import code_versions
from tasks.record.preview import SHOWN, preview, shown
from tasks.record.progress import say
from tasks.record.provenance import Provenance, Source
from tasks.record.record import (
    HEARTBEAT,
    INPUT,
    LAST_USED,
    PROVENANCE,
    Attempt,
    Attempts,
    Record,
)
from tasks.record.work import Done, Metrics, Workspace, manifest_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

Device = Callable[[], AbstractContextManager[None]]
"""Holds the accelerators, or nothing."""
Mode = Literal["reuse", "take", "force"]
"""How a stage gets its outputs: found by fingerprint or computed; the current ones, whatever they
were made from; computed even when the record has them."""

UNSET: tuple[object, ...] = (None, "", [], {})
"""Values of settings that MLflow's table of parameters leaves out."""


class Looker(Protocol):
    """Answers instead of a computation, for `staple status`: see `flows.states`."""

    def __call__(self, wanted: Provenance) -> Attempt: ...

    def attempt(self, stage: str, iteration: int) -> Attempt: ...


@dataclass(frozen=True)
class Slot:
    """Where a stage runs: an experiment's record, an iteration, a seed."""

    record: Record
    iteration: int
    seed: int
    mode: Callable[[str], Mode] = lambda _stage: "reuse"
    look: Looker | None = None
    """Answers, where nothing is to be computed."""
    device: str = "cpu"
    """What the stage computes on: an accelerator is held while it does."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else the outputs depend on, by name: the base model's digest."""
    made: Attempts = field(default_factory=dict)
    """What the run has made or reused so far, and reads even if another attempt is current now."""
    uses: tuple[str, ...] = ()
    """Modules that the settings chose from a registry: their code counts like the stage's own."""
    shard_size: int = 64
    """Prompts that are computed and saved together; it is in no fingerprint."""
    warm: Callable[[str], None] = lambda _stage: None
    """Prepares libraries for a stage that is computed, before its seconds are counted."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the attempt, such as who started it; they are in no fingerprint."""

    def using(self, *modules: str, **notes: str) -> Slot:
        """The slot with what else the outputs depend on: modules, and notes by name."""
        return replace(self, uses=(*self.uses, *modules), notes={**self.notes, **notes})

    def needs(self, stage: str, iteration: int) -> Attempt:
        """What this run made, reused or read before; else the current attempt, from now on.

        Raises:
            UserError: it was never finished.
        """
        key = self.record.experiment, stage, iteration
        if key not in self.made:
            self.made[key] = self.record.needs(stage, iteration)
        return self.made[key]

    def attempt(
        self,
        stage: str,
        settings: Settings,
        inputs: Mapping[str, Attempt],
        compute: Callable[[Workspace], Metrics],
        *,
        takes_device: bool = False,
    ) -> Attempt:
        """The stage's outputs: found by fingerprint, or computed and recorded.

        Args:
            inputs: the attempts that it reads, by name.
            compute: writes into the workspace and returns the attempt's metrics.
            takes_device: it holds the accelerators itself, by `Workspace.device`, while it needs
                them; otherwise they are held for it all the time.

        Raises:
            UserError: the record or a file of it cannot be used; what `compute` raises.
        """
        wanted = Provenance(
            stage=stage,
            iteration=self.iteration,
            seed=self.seed,
            code=code_versions(compute.__module__, *self.uses),
            settings=settings.model_dump(mode="json", context=FINGERPRINT),
            inputs={n: Source(a.stage, a.iteration, a.digest) for n, a in inputs.items()},
            notes=dict(self.notes),
        )
        if self.look:
            return self.look(wanted)
        lock = self.record.lock(wanted.fingerprint)
        what = f"{stage} of iteration {self.iteration} of {self.record.experiment}"
        with locks.held(lock, what):
            work = Workspace(lock.with_suffix(""), self.shard_size)
            device = partial(locks.device, self.device, what)
            work.device, whole = (device, nullcontext) if takes_device else (nullcontext, device)
            self._end_interrupted(wanted)
            found = None if self.mode(stage) == "force" else self._find(wanted)
            if found is not None:
                work.remove()
                return found
            return self._compute(wanted, compute, work, whole)

    def _find(self, wanted: Provenance) -> Attempt | None:
        for place, attempt in enumerate(self.record.attempts(*wanted.place)):
            if attempt.stands_for(wanted.fingerprint):
                if place > 0:
                    self.record.make_current(attempt)
                return attempt
        return None

    def _end_interrupted(self, wanted: Provenance) -> None:
        """Mark what dead processes left running: only one process writes an experiment, and here
        it holds the fingerprint's lock."""
        for run in self.record.runs(kind="stage", fingerprint=wanted.fingerprint):
            if run.status == "RUNNING":
                self.record.client.set_tag(run.run_id, "failure", "interrupted")
                self.record.client.set_terminated(run.run_id, "KILLED")

    def _compute(
        self,
        wanted: Provenance,
        compute: Callable[[Workspace], Metrics],
        work: Workspace,
        device: Device,
    ) -> Attempt:
        client, run_id = self.record.client, self._begin(wanted)
        work.note("begun", stage=wanted.stage, iteration=wanted.iteration, run_id=run_id)
        interruption.note(stage=f"{wanted.stage} {wanted.iteration}", parts="")
        try:
            with locks.heartbeat(lambda: client.set_tag(run_id, HEARTBEAT, f"{time.time():.1f}")):
                done = work.finished()
                if done is None:
                    self.warm(wanted.stage)
                    done = _work(compute, work, device)
                self._log(run_id, work.outputs, done)
        except BaseException as error:
            _give_up(client, run_id, error)
            raise
        client.set_terminated(run_id, "FINISHED")
        interruption.note(stage="")
        work.note("recorded", stage=wanted.stage, iteration=wanted.iteration, run_id=run_id)
        work.remove()
        return self.record.attempt(self.record.reader.run(run_id), reused=False)

    def _begin(self, wanted: Provenance) -> str:
        """A RUNNING run under the iteration's, with what it is made from."""
        from mlflow.entities import Param

        run = self.record.client.create_run(
            self.record.experiment_id,
            run_name=f"{wanted.stage} {self.iteration}",
            tags={
                "kind": "stage",
                "stage": wanted.stage,
                "iteration": str(self.iteration),
                "fingerprint": wanted.fingerprint,
                "mlflow.parentRunId": self.record.iteration_run(self.iteration),
                "place": locks.place(self.record.home),
                HEARTBEAT: f"{time.time():.1f}",
                LAST_USED: self.record.stamp(),
                **{INPUT + name: source.tag for name, source in wanted.inputs.items()},
                **self.tags,
            },
        )
        run_id = str(run.info.run_id)
        chosen = {name: value for name, value in wanted.settings.items() if value not in UNSET}
        texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in chosen.items()}
        params = [Param(name, text[:500]) for name, text in texts.items()]
        self.record.client.log_batch(run_id, params=params)
        self.record.client.log_dict(run_id, asdict(wanted), PROVENANCE)
        return run_id

    def _log(self, run_id: str, outputs: Path, done: Done) -> None:
        client = self.record.client
        figures = {**done.metrics, "seconds": done.seconds}
        self.record.log_metrics(run_id, figures, step=max(self.iteration, 0))
        self.record.artifacts.put(run_id, outputs)
        self._log_previews(run_id, outputs)
        client.log_dict(run_id, done.manifest, MANIFEST)  # last: before, the attempt does not count
        tags = {
            "digest": manifest_digest(done.manifest),
            "seconds": f"{done.seconds:.3f}",
            LAST_USED: self.record.stamp(),
            "complete": "true",
        }
        for key, value in tags.items():
            client.set_tag(run_id, key, value)

    def _log_previews(self, run_id: str, outputs: Path) -> None:
        tables = {f"{path.stem}.json": path for path in sorted(outputs.glob("*.parquet"))}
        for name, path in tables.items():
            self.record.client.log_text(run_id, json.dumps(preview(path)), name)
        if tables:
            self.record.client.set_tag(run_id, SHOWN, shown(list(tables)))


def _work(compute: Callable[[Workspace], Metrics], work: Workspace, device: Device) -> Done:
    with device(), pinned(load=False):
        started = time.monotonic()
        metrics = compute(work)
    return work.finish(metrics, time.monotonic() - started)


def _give_up(client: MlflowClient, run_id: str, error: BaseException) -> None:
    """Say why an attempt failed or who stopped it, unless the record itself is what failed."""
    stopped = not isinstance(error, Exception)  # Ctrl-C, or a signal that Prefect makes one of
    why = "interrupted" if stopped else clean(f"{type(error).__name__}: {error}")[:4000]
    try:
        client.set_tag(run_id, "failure", why)
        client.set_terminated(run_id, "KILLED" if stopped else "FAILED")
    except Exception as second:
        say(f"the failure could not be recorded either: {second}")
