"""What MLflow keeps of an experiment beside its runs.

Each trained policy is a logged model, with its card, its metrics, and the runs that made and
measured it; it is a version of the registered model with the experiment's name. Each constitution
that was trained on is a version of the prompt EXPERIMENT.constitution, a system prompt. The alias
"champion" of both follows the champion (`flows.champion`); there is none while the initial policy
is the champion. The corpora are inputs of the iterations' runs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from constitutions.constitution import load
from flows.commands.card import card
from flows.experiment import Experiment
from flows.methods import method_of
from models.policy import user
from models.prompts import CHAT_CONSTITUTION, under_constitution
from tasks.record.artifacts import link_files, local_folder
from tasks.record.record import Attempt, Record

if TYPE_CHECKING:
    from mlflow.entities import Dataset
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
"""The alias."""
CONSTITUTION = "constitution"
"""Tag of a model's version: the version of the prompt that it was trained on."""
MODEL = "model_id"
"""Tag of a model's version: the id of the logged model, which MLflow's tables do not keep."""
DIGEST_CHARACTERS = 36
"""Of a data set's digest, in MLflow's tables."""


def registered(e: Experiment, t: int, attempts: dict[str, Attempt]) -> str:
    """The id of an iteration's logged model, which is registered once for each training.

    Empty for iteration 0, before an evaluation, and for a version of an earlier program.
    """
    if "train" not in attempts or "evaluate" not in attempts:
        return ""
    version = _version(e.record, attempts["train"]) or _create_version(e, t, attempts)
    return version.tags.get(MODEL, "")


def crown(e: Experiment) -> None:
    """Let the aliases name the champion, if it is registered."""
    from mlflow.exceptions import MlflowException

    client, name = e.record.client, e.record.experiment
    try:
        known = client.get_registered_model(name).aliases
    except MlflowException:  # nothing was trained yet
        return
    if champion := e.champion(e.settings.last + 1):
        version = _version(e.record, e.needs("train", champion))
        if version is None or known.get(CHAMPION) == version.version:
            return
        client.set_registered_model_alias(name, CHAMPION, version.version)
        if prompt := version.tags.get(CONSTITUTION):
            client.set_prompt_alias(_prompt_name(e.record), CHAMPION, int(prompt))
    elif CHAMPION in known:
        before = client.get_model_version(name, known[CHAMPION])
        client.delete_registered_model_alias(name, CHAMPION)
        if CONSTITUTION in before.tags:
            client.delete_prompt_alias(_prompt_name(e.record), CHAMPION)


def log_corpora(e: Experiment, t: int, prompts: Attempt) -> None:
    """Show what an iteration's prompts come from as inputs of its run, with their digests."""
    from mlflow.entities import DatasetInput, InputTag

    context = InputTag("mlflow.data.context", "training" if t else "evaluation")
    datasets = [DatasetInput(dataset, [context]) for dataset in _corpora(e, t, prompts)]
    e.record.client.log_inputs(e.record.iteration_run(t), datasets)


def _corpora(e: Experiment, t: int, prompts: Attempt) -> Iterator[Dataset]:
    from mlflow.entities import Dataset

    settings = e.settings_at(t).prompts
    profile = json.dumps({"prompts": prompts.metrics["prompts"]})
    if settings.world:
        digest = prompts.digest[:DIGEST_CHARACTERS]
        yield Dataset(settings.world.name, digest, "embedded", "{}", profile=profile)
        return
    notes = prompts.provenance().notes
    for i, corpus in enumerate(settings.corpora):
        digest = notes.get(f"source/{i}/{corpus.label}", prompts.digest)[:DIGEST_CHARACTERS]
        source = corpus.model_dump_json(exclude_defaults=True)
        kind = "local" if corpus.path else "hugging_face"
        yield Dataset(corpus.label, digest, kind, source, profile=profile)


def _version(record: Record, trained: Attempt) -> ModelVersion | None:
    found = record.client.search_model_versions(f"run_id='{trained.run_id}'")
    return next((version for version in found if version.name == record.experiment), None)


def _create_version(e: Experiment, t: int, attempts: dict[str, Attempt]) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    client, name = e.record.client, e.record.experiment
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    model, place = _log_model(e, t, attempts)
    tags = {"iteration": str(t), MODEL: model}
    method = method_of(e.settings)
    if method.guided or method.constitutional:
        tags[CONSTITUTION] = str(_register_constitution(e, t))
    run = attempts["train"].run_id
    return client.create_model_version(name, place, run, tags=tags, model_id=model)


def _log_model(e: Experiment, t: int, attempts: dict[str, Attempt]) -> tuple[str, str]:
    """The id of a new logged model, and where its files are: the adapter or weights, and a card."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    client, trained = e.record.client, attempts["train"]
    adapter, name = trained.path("adapter"), f"{e.record.experiment}-{t}"
    allowed = re.sub("[/:.%\"']", "-", name)  # MLflow's rule for logged models alone
    kind = "adapter" if (adapter / "adapter_config.json").exists() else "full"
    model = client.create_logged_model(
        e.record.experiment_id,
        name=allowed,
        source_run_id=trained.run_id,
        tags={"iteration": str(t), "digest": trained.digest},
        params={"base_model": e.settings_at(t).policy.model},
        model_type=kind,
    )
    with TemporaryDirectory() as scratch:
        text = Path(scratch) / "README.md"
        text.write_text(card(e, t, name, kind=kind), "utf-8")
        if folder := local_folder(model.artifact_location):
            link_files(adapter, folder)
            shutil.copy(text, folder)
        else:
            client.log_model_artifacts(model.model_id, str(adapter))
            client.log_model_artifact(model.model_id, str(text))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(trained.run_id, [LoggedModelOutput(model.model_id, t)])
    client.log_inputs(attempts["evaluate"].run_id, models=[LoggedModelInput(model.model_id)])
    before = _version(e.record, e.needs("train", t - 1)) if t > 1 else None
    if before and MODEL in before.tags:  # whose samples it was trained on
        client.log_inputs(trained.run_id, models=[LoggedModelInput(before.tags[MODEL])])
    return str(model.model_id), str(model.artifact_location)


def _prompt_name(record: Record) -> str:
    return f"{record.experiment}.constitution"


def _register_constitution(e: Experiment, t: int) -> int:
    """The version of the prompt: the constitution as the policy is given one."""
    texts = load(e.constitution(t).path("constitution.yaml")).texts
    system, _ = under_constitution(CHAT_CONSTITUTION, texts, (user(""),))
    template = system["content"].replace("{{", "{ {")  # MLflow would fill in variables
    made = e.record.client.register_prompt(
        _prompt_name(e.record), template, f"iteration {t}", tags={"iteration": str(t)}
    )
    return int(made.version)
