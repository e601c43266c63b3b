"""Teaching: before iteration 1 a policy learns the method's two skills, on rules of their own.

STaPLe needs a policy that can name what a better response does, z ~ p(· | x, y1, yG), and that can
follow a named rule, y2 ~ p(· | x, y1, z). A weak or base model is taught both on examples of
*other* rules than its prompts call for: an embedded world's, or a file's. What it learns is an
adapter, that of iteration 0's policy: from it the iterations go on, against it they are measured.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from constitutions.errors import UserError
from models.files import Damaged, file_sha256, read_sealed, remove, text_sha256, write_sealed
from models.policy import FINGERPRINT, Messages, assistant, user
from models.prompts import Templates, ask_refinement, ask_with_gold
from models.settings import Settings
from models.training.adapter import AdapterSettings
from models.worlds.base import SkillExample, World
from tasks.benchmarks.rows import ValidText, read_rows
from tasks.corpus.files import checked_file
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress, say
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace, is_intact, manifest
from tasks.rows import prompt_id
from tasks.train import (
    Training,
    TrainingConversation,
    TrainSettings,
    in_one_process,
    itself,
    tokenised,
    train,
    training_slot,
    write_curve,
)

SEAL = "seal.json"


class TeachSettings(Settings):
    """Whether a policy is taught the method's two skills first, and on what."""

    examples: int = Field(0, ge=0, le=1_000_000)
    """Examples that are taught: of the embedded world, or of `file`, of which 0 means all. Without
    a file, 0 teaches nothing."""
    file: str | None = Field(None, min_length=1)
    """A file with a row for each example: prompt, initial (y1), principle (z), refined (y2), and
    gold, which the hint shows, where it is not the refined response."""
    naming: float = Field(1 / 3, ge=0, le=1)
    """Share of the examples that teach to name what the better response does; the others teach to
    follow the named rule, which takes more of them."""
    keep_first: bool = True
    """Whether y1 has loss as well, so that first answers stay as the examples have them: a policy
    that only learns the last turns soon answers prompts with principles."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate; all that is not here is as in `train`."""
    epochs: int = Field(1, ge=1, le=100)
    """How often each example is trained on."""
    batch_size: int = Field(8, ge=1, le=4096)
    """Examples per optimiser step."""
    seed: int = Field(0, ge=0)
    """Seeds the examples, their order and the adapter; not the experiment's seed, so that its
    repetitions share the skills."""

    @property
    def on(self) -> bool:
        """Whether anything is taught."""
        return bool(self.examples or self.file)

    def named(self, examples: int) -> int:
        """How many of so many examples teach naming."""
        return round(self.naming * examples)

    def training(self, settings: TrainSettings) -> TrainSettings:
        """How the adapter is trained that the iterations go on with."""
        names = ("learning_rate", "epochs", "batch_size")
        own = {name: getattr(self, name) for name in names}
        return settings.model_copy(update={**own, "tokens": None, "kl": 0.0, "start": "base"})

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """A file's contents are in the fingerprint, not its place."""
        found: dict[str, Any] = dump(self)
        dropped = ("file",) if info.context == FINGERPRINT else ()
        return {name: value for name, value in found.items() if name not in dropped}


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; expected a text")
    return text


Filled = Annotated[ValidText, AfterValidator(_filled)]


class SkillRow(BaseModel):
    """A row of a user's file."""

    prompt: Filled
    initial: Filled
    principle: Filled
    refined: Filled
    gold: Annotated[Filled | None, BeforeValidator(lambda cell: cell or None)] = None
    """Where it differs from `refined`; a cell of a CSV file may stay empty."""


def skill_examples(settings: TeachSettings, world: World | None) -> list[SkillExample]:
    """The examples that are taught.

    Raises:
        UserError: the file cannot be read, or is too short; the world has too few, or none.
        UserErrors: the rows that are wrong, each with its fields.
    """
    found = _of_file(settings.file) if settings.file else _of_world(settings, world)
    if settings.examples > len(found):
        raise UserError(
            f"{settings.examples:,} examples were asked for",
            where="setting 'teach.examples'",
            expected=f"at most {len(found):,}, as many as {settings.file} has",
        )
    return found[: settings.examples or None]


def _of_file(path: str) -> list[SkillExample]:
    rows = read_rows(path, SkillRow)
    return [
        SkillExample(
            prompt=row.prompt,
            initial=row.initial,
            gold=row.gold or row.refined,
            principle=row.principle,
            refined=row.refined,
            source=f"teach.file:{number}",  # its name is no part of what is taught
        )
        for number, row in enumerate(rows, start=1)
    ]


def _of_world(settings: TeachSettings, world: World | None) -> list[SkillExample]:
    where = "setting 'teach.examples'"
    try:
        found = world.skill_examples(settings.examples, settings.seed) if world else []
    except ValueError as error:
        raise UserError(str(error), where=where, expected="fewer examples") from error
    if not found:
        whose = f"the world {world.name} teaches" if world else "corpora teach"
        raise UserError(
            f"{whose} no skills",
            where=where,
            expected="0, or examples of your own",
            fix="set teach.file to a file with rows of prompt, initial, principle and refined",
        )
    return found


def lessons(
    examples: Sequence[SkillExample], settings: TeachSettings, templates: Templates
) -> Iterator[TrainingConversation]:
    """Each example as one conversation, of which y1 and the last turn have loss.

    Naming: x, y1, the hint with the gold → z. Following: x, y1, z as the policy is asked without
    the gold → y2. They are the prompts of mining and evaluation.
    """
    order = range(len(examples))
    naming = set(random.Random(settings.seed).sample(order, settings.named(len(examples))))
    for number, row in enumerate(examples):
        prompt: Messages = (user(row.prompt),)
        if number in naming:
            asked = ask_with_gold(templates, prompt, row.initial, row.gold)
            answer, first = row.principle, len(asked) - 2
        else:
            asked = ask_refinement(templates, prompt, row.initial, row.principle)
            answer, first = row.refined, len(asked) - 4
        yield TrainingConversation(
            prompt_id=prompt_id(prompt),
            sample=None,
            source=row.source,
            messages=(*asked, assistant(answer)),
            turns=((first,) if settings.keep_first else ()) + (len(asked),),
        )


@stage("teach")
def teach_stage(
    at: Slot,
    settings: TeachSettings,
    training: TrainSettings,
    policy: PolicySource,
    world: World | None,
) -> Attempt:
    """examples of the two skills → adapter, curve, skipped.

    Every method is taught alike, also one without principles. What an experiment of this home was
    taught is kept: another one with the same model, examples and settings takes it.

    Args:
        training: the settings of `train`, with which the iterations go on.
        policy: the base model.

    Raises:
        UserError: as `skill_examples` and `tasks.train.train`.
    """
    how = settings.training(training)
    policy = replace(policy, guided=True, constitutional=False)
    at = replace(at, seed=settings.seed)

    def compute(work: Workspace) -> Metrics:
        kept = work.folder.parent.with_name("taught") / work.folder.name
        if at.mode("teach") != "force" and (found := _recalled(kept, work)) is not None:
            return found
        examples = skill_examples(settings, world)
        given = list(lessons(examples, settings, policy.templates))
        ready = Training.of(policy, how, at.seed, work.outputs / "adapter")
        data = tokenised(work, ready, given, itself, "the lessons")
        total = len(ready.planned(data.examples))
        with work.device(), progress("teach", total, "steps") as tick:
            done = train(data, ready, tick)
        metrics = {f"teach/{name}": float(count) for name, count in done.counts.items()}
        metrics["teach/naming"] = float(settings.named(len(examples)))
        metrics |= write_curve(work, done.curve, done.skipped, "teach")
        _keep(kept, work, metrics)
        return metrics

    fields = {*AdapterSettings.model_fields, "max_tokens"}
    noted = training_slot(policy, at).using(
        *((type(world).__module__,) if world and not settings.file else ()),
        training=text_sha256(in_one_process(how).model_dump_json(include=fields)),
        **({"examples": file_sha256(checked_file(Path(settings.file)))} if settings.file else {}),
    )
    return noted.attempt("teach", settings, {}, compute, takes_device=True)


def _keep(kept: Path, work: Workspace, metrics: Metrics) -> None:
    """Copy the outputs to where other experiments find them; the seal, last, makes them count.

    Only the holder of the fingerprint's lock writes there.
    """
    remove(kept)
    shutil.copytree(work.outputs, kept / "outputs")
    write_sealed(kept / SEAL, {"metrics": metrics, "manifest": manifest(work.outputs)})


def _recalled(kept: Path, work: Workspace) -> Metrics | None:
    """The metrics of what another experiment was taught, and its outputs; None where nobody was."""
    try:
        seal = read_sealed(kept / SEAL)
        if not is_intact(kept / "outputs", seal["manifest"]):
            raise Damaged(kept, "its files' digests differ")
    except FileNotFoundError:
        return None
    except Damaged as error:
        say(f"{error}; the skills are taught again")
        return None
    shutil.copytree(kept / "outputs", work.outputs, dirs_exist_ok=True)
    return dict(seal["metrics"])
