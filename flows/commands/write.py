"""Write a constitution of principles and antitheses to a file: `staple constitution write`.

The record keeps nothing of it. People edit the file, and an experiment names it in
`write.constitution`.
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
from flows.settings import explain, with_templates
from models.policy import Policy, PolicySettings
from models.templates import constitution_wording_of
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
    """Let a model write a constitution, and save it.

    Args:
        given: settings of `WriteSettings` by name, as in {"topics": […], "writer.model": "small"}.
            Without `writer.model` the writer is the experiment's policy, or `DEFAULT_WRITER`.
        experiment: write antitheses for its newest constitution, reviewed if it has a review;
            empty: write principles too.
        seed: the same one writes the same constitution.
        force: replace an existing file.

    Raises:
        UserError: a setting is wrong, the file exists, there is no constitution, the model cannot
            be loaded, or it writes too few pairs.
    """
    check_output(out)
    if out.exists() and not force:
        raise UserError(
            "there is such a file already",
            where=f"--out {out}",
            fix="choose another file, or replace it: --force",
        )
    opened = open_experiment(recorded_settings(experiment)) if experiment else None
    settings, writer = _settings(given or {}, opened)
    discovered = _newest_constitution(opened) if opened else None
    if discovered is not None and "principles" in (given or {}):
        raise UserError(
            "the experiment's constitution has the principles: their number is fixed",
            where=f"--principles, --from {experiment}",
            fix="leave one of them out",
        )
    policy = _load(writer, seed, opened)
    wording, key = constitution_wording_of(writer.templates), f"{seed}/write"
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
    """The newest discovered constitution, reviewed if it has a review."""
    check_discovers(opened.settings)
    clustered = newest(opened.settings, "cluster", None)
    return recorded_review(opened.record, clustered.iteration, clustered) or clustered


def _settings(
    given: Mapping[str, Any], opened: Experiment | None
) -> tuple[WriteSettings, PolicySettings]:
    """The effective settings, and the writer's among them."""
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
    given, wrong = with_templates({**values, "writer": writer}, "")
    if wrong:
        raise UserErrors(wrong)
    try:
        settings = WriteSettings.model_validate(given)
    except ValidationError as error:
        raise UserErrors(explain(error, "", WriteSettings)) from None
    unused = [name for name in ("constitution", "held_out") if name in values]
    if unused:
        raise UserErrors([UserError("it has no effect here", where=f"'{n}'") for n in unused])
    assert settings.writer is not None, "it was given"
    return settings, settings.writer


def _load(writer: PolicySettings, seed: int, opened: Experiment | None) -> Policy:
    """Load the writer; its files are found or made first."""
    if writer.endpoint:
        path = writer.model
    elif opened and writer.model == opened.settings_at(0).policy.model:
        path = opened.model.path
    else:
        path = model_path(writer, seed)
    return PolicySource(writer, path, "").load()


def model_path(writer: PolicySettings, seed: int) -> str:
    """Where the writer's files are; a world's model is pretrained the first time.

    Raises:
        UserError: staple cannot sample from the model exactly.
    """
    if writer.model not in WORLD_MODELS:
        open_model(writer, "sampled")
        return writer.model
    return str(make_world_model(writer.model, seed, home()))


def show_written(found: Written) -> None:
    """Print the pairs of the constitution, and why others were rejected."""
    rows = [
        (str(number), Text(entry.text), Text(entry.antithesis))
        for number, entry in enumerate(found.constitution.principles, start=1)
    ]
    columns = ("#", "principle", "antithesis")
    console.print(table("constitution", columns, rows, texts=(1, 2)))
    reasons = Counter(row.reason for row in found.rejected).most_common()
    why = "".join(f"\n  {times} × {reason}" for reason, times in reasons)
    console.print(f"{len(found.rejected)} rejected{':' if why else '.'}{why}")
