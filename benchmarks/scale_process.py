"""One process of `benchmarks.scale`: a stage over the real record, and what it took.

`python -m benchmarks.scale_process TASK`, where TASK is a `Task` in JSON. Only the model is
replaced: `PolicySource.load`, by which stages open their policy, gives a `Recombined`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale_world import Recombined, World, write_model, write_prompts

EXPERIMENT = "scale"
PR_SET_PDEATHSIG = 1
PROMPTS, SETTINGS, MEASURED = "prompts.jsonl", "settings.yaml", "measured.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process does in a place: a folder with its record, prompts and settings."""

    does: str
    """"place", "run", "form", or the name of a stage."""
    place: str
    world: str
    """The folder of the texts and of the model."""
    memory: float | None = None
    """GB of address space at most."""
    overrides: tuple[str, ...] = ()
    """Settings, as `--set` takes them."""
    force: bool = False
    """Compute again what the record has."""
    settings: dict[str, Any] = field(default_factory=dict)
    """"place": the settings that differ from the experiment's usual ones."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a stage's process says of itself: seconds of processor time, bytes."""

    start: float
    """Before the stage began: imports, and opening the record and the policy's files."""
    model: float
    """In the policy that stands for the model."""
    own_rss: int
    """Peak of this process (`resource.getrusage`)."""
    reused: bool
    attempts: int
    """Attempts of the stage in the record."""
    figures: dict[str, float]


def main() -> None:
    """Do the task that the command names."""
    given = json.loads(sys.argv[1])
    task = Task(**given | {"overrides": tuple(given.get("overrides", ()))})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with who measures it
    if task.memory:
        most = int(task.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    match task.does:
        case "place":
            begin(task)
        case "run":
            run_all(task)
        case "form":
            print(json.dumps(form_bytes(task)))
        case _:
            found = run_stage(task)
            Path(task.place, MEASURED).write_text(json.dumps(asdict(found)), "utf-8")


def begin(task: Task) -> None:
    """Write the model, prompts and settings, and let the model be checked: that is done once."""
    import yaml

    place = Path(task.place)
    settings = task.settings
    count = settings["prompts"]["first"] + settings["prompts"]["held_out"]
    world, model = World.load(Path(task.world, "world.json")), Path(task.world, "model")
    if not (model / "tokenizer.json").exists():
        write_model(world, model)
    write_prompts(world, count, place / PROMPTS)
    (place / SETTINGS).write_text(yaml.safe_dump(settings), "utf-8")
    with _here(task):
        from flows.experiment import note_settings, open_experiment
        from flows.settings import load_settings

        loaded = load_settings(SETTINGS)
        note_settings(loaded)
        print(open_experiment(loaded).model.path)


def run_stage(task: Task) -> Measured:
    """One stage of iteration 1; the earlier ones come from the record."""
    with _here(task):
        import prefect  # noqa: F401  # each stage imports it

        from flows.em import steps
        from flows.experiment import open_experiment
        from flows.settings import load_settings
        from flows.states import stage_states

        settings = load_settings(SETTINGS, task.overrides)
        only = 1, task.does
        experiment = open_experiment(settings, force=task.force, only=only)
        stage_states(settings)  # what a command does once, whatever the size: it computes nothing
        start = processor_seconds()
        reused, figures = False, dict[str, float]()
        with until_the_first_step() if task.does == "train" else contextlib.nullcontext():
            for attempt in steps(experiment, 1):
                if attempt.stage == task.does:
                    reused, figures = attempt.reused, attempt.metrics
                    break
        return Measured(
            start=start,
            model=Recombined.seconds,
            own_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            reused=reused,
            attempts=len(experiment.record.attempts(task.does, 1)),
            figures=figures,
        )


def run_all(task: Task) -> None:
    """All stages of both iterations, in the working directory, as `staple run` wires them."""
    from flows.commands.cli import _environment

    _environment()
    _replace_model(World.load(Path(task.world, "world.json")))
    from flows.em import steps
    from flows.experiment import note_settings, open_experiment, writing
    from flows.publish import publish_experiment, publish_iteration
    from flows.settings import load_settings

    settings = load_settings(str(Path(task.place, SETTINGS)), task.overrides)
    with writing(settings.experiment, "benchmarks.scale"):
        note_settings(settings)
        experiment = open_experiment(settings)
        done = []
        for t in range(settings.last + 1):
            done.append({attempt.stage: attempt for attempt in steps(experiment, t)})
            publish_iteration(experiment, t, done[t])
        publish_experiment(experiment, done)


def form_bytes(task: Task) -> dict[str, int]:
    """The pages of the review's form, and the bytes of their schemas and descriptions."""
    with _here(task):
        from constitutions.constitution import load
        from flows.experiment import newest, recorded_settings
        from flows.review import examples_of, form_of, pages_of
        from tasks.rows import Labelled

        clustered = newest(recorded_settings(EXPERIMENT), "cluster", 1)
        constitution = load(clustered.path("constitution.yaml"))
        examples = examples_of(constitution, clustered.read("labelled", Labelled))
        pages = range(len(pages_of(constitution)))
        forms = [form_of(constitution, examples, 1, page=page) for page in pages]
        schemas = [json.dumps(f.model_json_schema()) + (f._description or "") for f in forms]
        return {"pages": len(pages), "bytes": sum(len(text.encode()) for text in schemas)}


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def _here(task: Task) -> Iterator[None]:
    """In the task's place, with homes inside of it and the model replaced."""
    os.chdir(task.place)
    os.environ |= environment(Path(task.place))
    from flows.commands.cli import _environment

    _environment()
    _replace_model(World.load(Path(task.world, "world.json")))
    yield


def environment(place: Path) -> dict[str, str]:
    """Variables with which `staple` keeps everything in a place."""
    return {
        "STAPLE_HOME": str(place / ".staple"),
        "PREFECT_HOME": str(place / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
    }


def _replace_model(world: World) -> None:
    from tasks.policies.opening import PolicySource

    def load(_: PolicySource) -> Recombined:
        return Recombined(world)

    PolicySource.load = load  # type: ignore[method-assign, assignment]


class FirstStep(Exception):
    """Training is prepared: its first step would be next."""


@contextlib.contextmanager
def until_the_first_step() -> Iterator[None]:
    """End a training when transformers' Trainer, prepared, is told to train."""
    from transformers import Trainer

    def stop(*_: object, **__: object) -> None:
        raise FirstStep("measured until here")

    Trainer.train = stop  # type: ignore[method-assign, assignment]
    with contextlib.suppress(FirstStep):
        yield


if __name__ == "__main__":
    main()
