"""Write a constitution of principles and antitheses to a file: `staple constitution write`.

Nothing is recorded: the file is for people to edit, and for an experiment's `write.constitution`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.text import Text

from constitutions.constitution import load, save
from constitutions.errors import UserError, UserErrors
from constitutions.terminal import console
from flows.commands.output import check_output
from flows.commands.tables import table
from flows.experiment import (
    Experiment,
    check_discovers,
    home,
    newest,
    open_experiment,
    recorded_settings,
)
from flows.settings import explain
from models.policy import Policy, PolicySettings
from models.prompts import CONSTITUTION_WORDINGS
from models.worlds.registry import WORLD_MODELS
from tasks.policies.base import make_world_model, open_model
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.review import recorded_review
from tasks.sami.write import WriteSettings, Written, oppose, write_pairs

FILE = Path("constitution.yaml")
DEFAULT_WRITER = "planted-sami"


def write_constitution(
    out: Path = FILE,
    given: Mapping[str, Any] | None = None,
    *,
    experiment: str = "",
    seed: int = 0,
    force: bool = False,
) -> Written:
    """Have a principle writer word a constitution, and save it.

    Args:
        given: settings of `WriteSettings` by name, as in {"topics": […], "writer.model": "small"}.
            Without `writer.model` it is the experiment's policy, or `DEFAULT_WRITER`.
        experiment: words the antitheses of the newest constitution that it discovered, as a person
            approved it where one did; empty: words principles too.
        seed: of the noise; the same one writes the same constitution.
        force: replace the file, where there is one.

    Raises:
        UserError: a setting is wrong, there is such a file already, nothing was discovered, the
            model cannot be loaded, or words too few pairs.
    """
    check_output(out)
    if out.exists() and not force:
        raise UserError(
            "there is such a file already",
            where=f"--out {out}",
            fix="name another one, or replace it: --force",
        )
    opened = open_experiment(recorded_settings(experiment)) if experiment else None
    settings, writer = _settings(given or {}, opened)
    discovered = _newest_constitution(opened) if opened else None
    if discovered is not None and "principles" in (given or {}):
        raise UserError(
            "there is no such choice: the principles are those that were discovered",
            where=f"--principles, --from {experiment}",
            fix="leave one of them out",
        )
    policy = _load(writer, seed, opened)
    wording, key = CONSTITUTION_WORDINGS[writer.templates], f"{seed}/write"
    constitution = load(discovered.path("constitution.yaml")) if discovered else None
    total = len(constitution.principles) if constitution else 2 * settings.principles
    with progress("write", total, "requests") as tick:
        if constitution:
            found = oppose(policy, constitution, settings, wording, key, tick)
        else:
            found = write_pairs(policy, settings, wording, key, tick)
    save(found.constitution, out)
    return found


def _newest_constitution(opened: Experiment) -> Attempt:
    """The newest that was discovered, reviewed where it was reviewed."""
    check_discovers(opened.settings)
    clustered = newest(opened.settings, "cluster", None)
    return recorded_review(opened.record, clustered.iteration, clustered) or clustered


def _settings(
    given: Mapping[str, Any], opened: Experiment | None
) -> tuple[WriteSettings, PolicySettings]:
    """The settings that hold, and the writer's among them."""
    own = "writer."
    values = {name: value for name, value in given.items() if not name.startswith(own)}
    writer = {n.removeprefix(own): value for n, value in given.items() if n.startswith(own)}
    if opened and "model" not in writer:
        writer = opened.settings_at(0).policy.model_dump() | writer
    else:
        model = writer.setdefault("model", DEFAULT_WRITER)
        world = WORLD_MODELS.get(model)
        writer = dict(world.policy if world else {}) | writer
    if world := WORLD_MODELS.get(writer["model"]):
        values.setdefault("topics", world.topics)  # the only topics that it knows
    try:
        settings = WriteSettings.model_validate({**values, "writer": writer})
    except ValidationError as error:
        raise UserErrors(explain(error, "", WriteSettings)) from None
    if vain := [name for name in ("constitution", "held_out") if name in values]:
        raise UserErrors([UserError("it changes nothing here", where=f"'{name}'") for name in vain])
    assert settings.writer is not None, "it was given"
    return settings, settings.writer


def _load(writer: PolicySettings, seed: int, opened: Experiment | None) -> Policy:
    """The writer, ready to be asked; its files are found or made first."""
    if writer.endpoint:
        path = writer.model
    elif opened and writer.model == opened.settings_at(0).policy.model:
        path = opened.model.path
    else:
        path = model_path(writer, seed)
    return PolicySource(writer, path, "").load()


def model_path(writer: PolicySettings, seed: int) -> str:
    """Where the writer's files are; a world's model is pretrained here the first time.

    Raises:
        UserError: the model cannot be sampled from exactly.
    """
    if writer.model not in WORLD_MODELS:
        open_model(writer, home(), "sampled")
        return writer.model
    return str(make_world_model(writer.model, seed, home()))


def show_written(found: Written) -> None:
    """Print the pairs of a constitution that was just written, and why others were rejected."""
    rows = [
        (str(number), Text(entry.text), Text(entry.antithesis))
        for number, entry in enumerate(found.constitution.principles, start=1)
    ]
    columns = ("#", "principle", "antithesis")
    console.print(table("constitution", columns, rows, texts=(1, 2)))
    reasons = Counter(row.reason for row in found.rejected).most_common()
    why = "".join(f"\n  {times} × {reason}" for reason, times in reasons)
    console.print(f"{len(found.rejected)} rejected{':' if why else '.'}{why}")
