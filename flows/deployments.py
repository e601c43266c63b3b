"""The flows that `prefect.yaml` deploys: the experiment, and each stage alone.

Their parameters are forms in Prefect's UI; they run what the command line runs. A run for which the
record has every result ends in the state "Unchanged". `python -m flows.deployments` writes the
stages' entries in `prefect.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import Flow, State, flow
from prefect.states import Completed
from pydantic import Field

from constitutions.errors import UserError
from flows.experiment import is_recorded, recorded_settings, writing
from flows.forms import SettingsForm, changes, form_of
from flows.methods import METHODS
from flows.preflight import check_all
from flows.run import run_experiment, run_following
from flows.schema import ExperimentSettings
from flows.settings import load_settings, presets, with_changes
from flows.stages import run_stage
from flows.states import stage_states
from tasks.stages import STAGES, Stage, settings_of

DEPLOYED = tuple(name for name, stage in STAGES.items() if stage.deployed)
PREFECT_FILE = Path(__file__).parents[1] / "prefect.yaml"
MARK = "  # The stages, from tasks/stages.py: `python -m flows.deployments` writes what follows.\n"
ExperimentForm = form_of(ExperimentSettings)
UNCHANGED = ExperimentForm()


def with_form(
    form: type[SettingsForm], name: str, run_name: str
) -> Callable[[Callable[..., State[Any]]], Flow[..., State[Any]]]:
    """Make a flow of a function whose parameter `settings` has this form, which code generates."""

    def decorate(run: Callable[..., State[Any]]) -> Flow[..., State[Any]]:
        run.__annotations__["settings"] = form
        return flow(name=name, flow_run_name=run_name)(run)

    return decorate


@with_form(ExperimentForm, name="experiment", run_name="{source}")
def experiment(
    source: str = "planted",
    settings: SettingsForm = UNCHANGED,
    resume: bool = True,
    force: bool = False,
) -> State[Any]:
    """Run an experiment of T iterations. Recorded results are reused.

    Args:
        source: A preset's name, a YAML file on the worker's machine, or the name of a recorded
            experiment.
        settings: Settings to change. An empty field keeps the source's value.
        resume: If the record has an experiment of this name, continue it with its settings, and
            with the settings of its single iterations. Otherwise use the preset or file in every
            iteration.
        force: Compute again what the record has.
    """
    wanted = changes(settings)
    known = resume and _was_run(source)
    given = recorded_settings(source) if known else load_settings(source)
    chosen = with_changes(given, wanted)
    check_all(chosen)
    with writing(chosen.experiment, f"the form of {chosen.experiment}"):
        if known:  # the run that held the lock may have changed them
            chosen = with_changes(recorded_settings(source), wanted)
        keep = list(wanted) if resume else None
        done = run_experiment(chosen, keep_changes=keep, force=force, subflow=False)
        followed = run_following(chosen, done, resume=resume, force=force)
    every = [*done, *(followed.done if followed else ())]
    reviewed = len(done) == 1 or "train" in done[-1]
    if reviewed and all(attempt.reused for attempts in every for attempt in attempts.values()):
        stages = sum(map(len, done))
        return _unchanged(f"all {stages} stages of {chosen.experiment} are as recorded")
    return Completed(message=f"{chosen.experiment}: {chosen.last} iterations")


def stage_flow(stage: str) -> Flow[..., State[Any]]:
    """The flow that runs one stage."""
    form = form_of(settings_of(stage))
    empty = form()

    @with_form(form, name=stage, run_name=f"{{experiment}} {stage} {{iteration}}")
    def run(
        experiment: str,
        iteration: Annotated[int, Field(ge=0)],
        settings: SettingsForm = empty,
        force: bool = False,
    ) -> State[Any]:
        """Run one stage of one iteration, on the recorded outputs of the stages before it.

        Args:
            experiment: The name of a recorded experiment.
            iteration: The iteration; 0 is the initial policy's.
            settings: Settings to change in this iteration, from now on. An empty field keeps the
                experiment's value.
            force: Compute again what the record has.
        """
        attempt = run_stage(experiment, stage, iteration, changes(settings, stage), force)
        if attempt.reused:
            return _unchanged(f"{stage} {iteration} of {experiment} is as recorded")
        states = stage_states(recorded_settings(experiment))
        stale = [f"{name} {t}" for (name, t), state in states.items() if state.standing == "stale"]
        now = f"; stale now: {', '.join(stale)}" if stale else ""
        return Completed(message=f"{stage} {iteration}, {attempt.seconds:.1f} s{now}")

    return run


def __getattr__(name: str) -> Flow[..., State[Any]]:
    """The flow of the stage `name`, as Prefect looks up `flows.deployments.<name>`.

    Raises:
        AttributeError: no deployed stage has this name.
    """
    if name not in DEPLOYED:
        raise AttributeError(name)
    found = globals()[name] = stage_flow(name)
    return found


def prefect_yaml(text: str) -> str:
    """The text of `prefect.yaml` with an entry for each deployed stage after the line `MARK`."""
    head, mark, _ = text.partition(MARK)
    return head + mark + "".join(_entry(name, STAGES[name]) for name in DEPLOYED)


def _entry(name: str, stage: Stage) -> str:
    users = [method.name for method in METHODS.values() if name in method.all_stages]
    tags = ["stage", *(users if len(users) < len(METHODS) else ())]
    return f"""  - name: {name}
    entrypoint: flows.deployments.{name}
    description: "**One stage by itself:** {stage.about}."
    tags: [{", ".join(tags)}]
    work_pool: *{stage.pool}
"""


def _was_run(source: str) -> bool:
    """Whether the record has this experiment; a deleted one does not hide a preset or file."""
    try:
        return is_recorded(source)
    except UserError:
        if source in presets() or Path(source).is_file():
            return False
        raise


def _unchanged(message: str) -> State[Any]:
    return Completed(name="Unchanged", message=message)


if __name__ == "__main__":
    PREFECT_FILE.write_text(prefect_yaml(PREFECT_FILE.read_text("utf-8")), "utf-8")
