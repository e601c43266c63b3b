"""The flows that `prefect.yaml` deploys: the experiment, and every stage by itself.

Their parameters are forms of Prefect's UI; what they run is what the command line runs. Where the
record already has everything, a run ends in the state "Unchanged". `python -m flows.deployments`
writes the stages' entries of `prefect.yaml` anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import Flow, State, flow
from prefect.states import Completed
from pydantic import Field

from constitutions.errors import UserError
from flows.em import em_experiment
from flows.experiment import is_recorded, note_settings, recorded_settings, writing
from flows.forms import SettingsForm, changes, form_of
from flows.methods import METHODS
from flows.preflight import ask_server, check_all
from flows.schema import ExperimentSettings
from flows.settings import load_settings, presets, with_changes
from flows.stages import run_stage
from flows.states import stage_states, unchanged
from flows.together import go_on
from tasks.stages import STAGES, Stage, settings_of

DEPLOYED = tuple(name for name, stage in STAGES.items() if stage.deployed)
PREFECT_FILE = Path(__file__).parents[1] / "prefect.yaml"
MARK = "  # The stages, from tasks/stages.py: `python -m flows.deployments` writes what follows.\n"
ExperimentForm = form_of(ExperimentSettings)
UNCHANGED = ExperimentForm()


def with_form(
    form: type[SettingsForm], name: str, run_name: str
) -> Callable[[Callable[..., State[Any]]], Flow[..., State[Any]]]:
    """Make a flow of a function whose parameter `settings` is a form that is made at run time."""

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
    """Run an experiment: T iterations. What the record has is not computed again.

    Args:
        source: A preset's name, a YAML file where the worker runs, or the name of an experiment
            that was run before.
        settings: What to change. A field that stays empty is as the source has it.
        resume: Where the source names an experiment that was run before, go on with the settings
            that are recorded, and with those that were changed for single iterations. Without it
            the preset or file holds in every iteration.
        force: Compute again what the record has.
    """
    wanted = changes(settings)
    known = resume and _was_run(source)
    given = recorded_settings(source) if known else load_settings(source)
    chosen = with_changes(given, wanted)
    check_all(chosen)
    with writing(chosen.experiment, f"the form of {chosen.experiment}"):
        if known:  # as a run that was waited for has left them
            chosen = with_changes(recorded_settings(source), wanted)
        note_settings(chosen, list(wanted) if resume else None)
        found = None if force else unchanged(chosen)
        if found is None:
            ask_server(chosen)
        # in this very run, which the review can suspend
        done = em_experiment.fn(chosen, force) if found is None else found
        followed = go_on(chosen, done, resume=resume, force=force)
    if found is not None and not (followed and followed.computed):
        stages = sum(map(len, found))
        return _unchanged(f"all {stages} stages of {chosen.experiment} are as recorded")
    return Completed(message=f"{chosen.experiment}: {chosen.iterations} iterations")


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
        """Run one stage of one iteration by itself, from the recorded outputs before it.

        Args:
            experiment: The name of an experiment that was run before.
            iteration: The iteration; 0 is the initial policy's.
            settings: What to change for this iteration, from now on. A field that stays empty is as
                the experiment has it.
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
    """Whether an experiment of this name was run; a deleted one hides no preset or file."""
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
