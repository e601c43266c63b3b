"""The flows that `prefect.yaml` deploys: the experiment, and every stage by itself.

Their parameters are forms of Prefect's UI; what they run is what the command line runs. Where the
record already has everything, a run ends in the state "Unchanged".
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
from flows.preflight import ask_server, check_all
from flows.settings import ExperimentSettings, load_settings, presets, with_changes
from flows.stages import run_stage
from flows.states import stage_states, unchanged
from flows.together import go_on
from models.settings import Settings
from tasks.cluster import ClusterSettings
from tasks.evaluate import EvaluateSettings
from tasks.filter import FilterSettings
from tasks.mine import MineSettings
from tasks.prompts import PromptSettings
from tasks.sami.sample import SampleSettings
from tasks.sami.write import WriteSettings
from tasks.score import ScoreSettings
from tasks.train import TrainSettings

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


def stage_flow(stage: str, settings: type[Settings]) -> Flow[..., State[Any]]:
    """The flow that runs one stage."""
    form = form_of(settings)
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
            iteration: The iteration. 0 has only prompts, SAMI's write, and evaluate.
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


prompts = stage_flow("prompts", PromptSettings)
mine = stage_flow("mine", MineSettings)
score = stage_flow("score", ScoreSettings)
filter_ = stage_flow("filter", FilterSettings)
cluster = stage_flow("cluster", ClusterSettings)
write = stage_flow("write", WriteSettings)
sample = stage_flow("sample", SampleSettings)
train = stage_flow("train", TrainSettings)
evaluate = stage_flow("evaluate", EvaluateSettings)


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
