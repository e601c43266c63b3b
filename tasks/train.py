"""The M-step: from conversations to learn from to an adapter and its training curve.

Maximises log p_θ(y2, z | x, y1): x and y1 are context, the loss is on z and y2 (STaPLe, section 3).
The baselines train here too: STaR on y2 without a principle, supervised fine-tuning on the golds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from constitutions.errors import UserError
from models.files import text_sha256
from models.policy import Message, PolicySettings, Progress
from models.pools.base import Where
from models.pools.processes import ProcessPool
from models.prompts import Templates, ask_refinement
from models.training.adapter import AdapterSettings, TrainingStep, plan_batches
from models.training.encoding import EncodedExample, Encoder, EncodingError
from models.training.examples import StoredExamples
from models.training.job import Examples, Job, run
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.tables import StoredRows
from tasks.record.work import Metrics, Workspace
from tasks.rows import Labelled, Prompt, Rejected, Trajectory

Turn = Literal["initial", "principle", "refined"]


class TrainSettings(AdapterSettings):
    """Principle learning: which turns are trained, and how. SAMI trains on responses."""

    loss_on: tuple[Turn, ...] = Field(("principle", "refined"), min_length=1)
    """Turns with loss: y1, z, y2. The method's are z and y2; where there is no principle, z does
    not count. Training on golds has its loss on them."""
    start: Literal["previous", "base"] = "previous"
    """Continue the adapter of the iteration before, or start at the base model."""
    max_tokens: int = Field(4096, ge=16, le=1_000_000)
    """A longer conversation is skipped, and reported: a cut one would teach cut answers."""
    kl: float = Field(0.0, ge=0, le=100)
    """SAMI: weight of the divergence (KL, per token) from the policy that training starts from."""
    end_token: bool = True
    """SAMI: whether the token that ends a response counts as one of its tokens. The reference
    leaves it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConversation:
    """A conversation to learn from."""

    prompt_id: str
    sample: int | None
    source: str
    messages: tuple[Message, ...]
    turns: tuple[int, ...]
    """The positions of the messages with loss."""
    weight: float = 1.0
    thoughts: tuple[str | None, ...] = ()
    """What the policy thought before each of `turns`, which is trained with it; None: the answer
    follows the template's empty thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training did: conversations = trained + skipped."""

    curve: tuple[TrainingStep, ...]
    counts: dict[str, int]
    """conversations, trained, skipped; examples, tokens (processed in all steps, context included),
    trained_tokens (those with loss), steps."""
    skipped: tuple[Rejected, ...]
    data_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a conversation is made into: examples, or the reason why it is skipped."""

    examples: tuple[EncodedExample, ...]
    skipped: tuple[Rejected, ...]
    digest: str
    """sha256 (hex) of the conversation."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The tokenised conversations, and those that could not be used."""

    conversations: int
    examples: Sequence[EncodedExample]
    skipped: tuple[Rejected, ...]
    digest: str
    """sha256 (hex) of the conversations, in their order."""

    @classmethod
    def of(cls, rows: Iterable[Encoded], file: Path) -> TrainingSet:
        """What is to be trained on; its examples go into a file, as the rows come."""
        skipped, digests = list[Rejected](), list[str]()

        def examples() -> Iterator[EncodedExample]:
            for row in rows:
                skipped.extend(row.skipped)
                digests.append(row.digest)
                yield from row.examples

        stored = StoredExamples.write(file, examples())
        return cls(
            conversations=len(digests),
            examples=stored,
            skipped=tuple(skipped),
            digest=text_sha256(" ".join(digests)),
        )


@dataclass(frozen=True)
class Training:
    """How the adapter of one iteration is trained, or all weights (`update: full`)."""

    model: Path | str
    """Directory or hub name of the base (`policy.model` may be "planted")."""
    policy: PolicySettings
    """How the base is held in memory."""
    previous_adapter: Path | None
    """The adapter that is continued; None starts at the base."""
    out: Path
    """The adapter's directory; unfinished work lies beside it."""
    settings: TrainSettings
    seed: int

    @classmethod
    def of(cls, policy: PolicySource, settings: TrainSettings, seed: int, out: Path) -> Training:
        """The training of a policy."""
        previous = policy.adapter_path if settings.start == "previous" else None
        return cls(policy.model, policy.settings, previous, out, settings, seed)

    def encoder(self) -> Encoder:
        """What tokenises for the base."""
        from models.training.bases import load_tokenizer

        tokenizer = load_tokenizer(self.model, self.policy.revision)
        return Encoder(tokenizer, self.settings.max_tokens, self.policy)

    def fit(
        self, examples: Examples, digest: str, progress: Progress | None = None
    ) -> list[TrainingStep]:
        """Train on tokenised examples, and write the adapter to `out`.

        Args:
            digest: identifies the examples.
            progress: called with 1 after each optimiser step.

        Raises:
            UserError: a base that cannot be loaded; a previous adapter of another base; a training
                that diverged; a process of several that failed.
        """
        job = Job(
            model=str(self.model),
            policy=self.policy,
            previous=self.previous_adapter,
            settings=self.settings,
            seed=self.seed,
            data_digest=digest,
            out=self.out,
            checkpoints=self._checkpoints(digest),
            kl=self.settings.kl,
        )
        return run(job, examples, progress)

    def _checkpoints(self, data: str) -> Path:
        """Beside `out`, named by what is trained: another training never resumes from it."""
        from models.training.bases import base_digest

        same = in_one_process(self.settings).model_dump_json()
        digest = hashlib.sha256(f"{data} {same} {self.seed}".encode())
        if self.previous_adapter:
            digest.update(base_digest(self.previous_adapter).encode())
        return self.out.with_name(f"{self.out.name}.checkpoints-{digest.hexdigest()[:12]}")


def train(data: TrainingSet, training: Training, progress: Progress | None = None) -> TrainResult:
    """Train one iteration.

    Raises:
        UserError: nothing to train on; else as `Training.fit`.
    """
    if not data.conversations:
        raise UserError(
            "there are no trajectories to train on",
            where="train",
            expected="at least one refinement that beat its initial response",
            fix="mine more prompts or more samples, or look at the filter's reasons",
        )
    if not data.examples:
        raise nothing_to_train_on(data.skipped, "conversations", training.settings)
    return TrainResult(
        curve=tuple(training.fit(data.examples, data.digest, progress)),
        counts=_counts(data, training),
        skipped=data.skipped,
        data_digest=data.digest,
    )


@stage("train")
def train_stage(
    at: Slot, settings: TrainSettings, policy: PolicySource, examples: Attempt
) -> Attempt:
    """examples, the adapter of iteration t−1 (inside `policy`) → adapter, curve, skipped.

    Args:
        examples: labelled trajectories of `cluster` or `review`; of `filter`, each under its own
            principle or under none; or `prompts`, whose golds are then learned.

    Raises:
        UserError: as `train`.
    """

    def compute(work: Workspace) -> Metrics:
        training = Training.of(policy, settings, at.seed, work.outputs / "adapter")
        data = tokenised(work, training, examples, policy.templates, at.iteration)
        total = expected_steps(data.conversations, settings)
        with work.device(), progress(f"train {at.iteration}", total, "steps") as tick:
            done = train(data, training, tick)
        losses = write_curve(work, done.curve, done.skipped)
        return {f"train/{name}": float(count) for name, count in done.counts.items()} | losses

    inputs = policy.inputs(labelled=examples)
    where, fixed = training_slot(policy, at), in_one_process(settings)
    return where.attempt("train", fixed, inputs, compute, takes_device=True)


def tokenised(
    work: Workspace, training: Training, examples: Attempt, templates: Templates, iteration: int
) -> TrainingSet:
    """The conversations of a stage's rows, tokenised shard by shard in several processes."""
    rows = _rows_of(examples)
    job = partial(_encode_shard, templates, training.settings)
    with ProcessPool(partial(_open_encoder, training), worth=32) as pool:
        encoded = work.in_shards(
            "encoded", Encoded, rows, pool, job, what=f"tokenise {iteration}", unit="conversations"
        )
    return TrainingSet.of(encoded, work.folder / "examples.arrow")


def _rows_of(examples: Attempt) -> StoredRows[Any]:
    match examples.stage:
        case "prompts":
            return examples.rows("prompts", Prompt)
        case "filter":
            return examples.rows("trajectories", Trajectory)
        case _:
            return examples.rows("labelled", Labelled)


def _open_encoder(training: Training, _: Where) -> Encoder:
    return training.encoder()


def _encode_shard(
    templates: Templates,
    settings: TrainSettings,
    encoder: Encoder,
    rows: Sequence[Prompt],
    advance: Progress,
) -> list[Encoded]:
    found = [encode(conversation_of(row, templates, settings), encoder) for row in rows]
    advance(len(rows))
    return found


def training_slot(policy: PolicySource, at: Slot) -> Slot:
    """The slot of a training: in this process, whatever answers for the policy; on a CPU its bytes
    depend on the threads."""
    noted = dataclasses.replace(policy.local.noted(at), uses=at.uses)  # no engine answers
    if policy.settings.device == "cuda":
        return noted
    return noted.using(threads=str(policy.settings.threads or "cores"))


def write_curve(
    work: Workspace, curve: Sequence[TrainingStep], skipped: Sequence[Rejected]
) -> Metrics:
    """Write the training curve and what was skipped.

    Returns:
        The first loss, and the mean of the last tenth.
    """
    work.write("curve", curve, TrainingStep)
    work.write("skipped", skipped, Rejected)
    losses = [step.loss for step in curve]
    last = losses[-max(1, len(losses) // 10) :]
    return {"train/first_loss": losses[0], "train/last_loss": sum(last) / len(last)}


def expected_steps(labelled: int, settings: TrainSettings) -> int:
    """Optimiser steps when no trajectory is skipped: the total of `progress`.

    0 where a budget of tokens decides: it is known only when all is tokenised.
    """
    if settings.tokens:
        return 0
    return math.ceil(labelled * settings.epochs / settings.batch_size)


def training_conversation(
    row: Trajectory, label: str, templates: Templates, settings: TrainSettings
) -> TrainingConversation:
    """x, y1, z, y2 as the policy is asked without the gold, or x, y1, y2; z is the label."""
    asked = ask_refinement(templates, row.prompt, row.initial, label)
    places = _places(len(row.prompt), templates.guided)
    as_sampled = label == row.principle and not row.principle_thoughts
    thoughts: dict[Turn, str | None] = {
        "initial": row.initial_thoughts,
        "principle": "" if as_sampled else None,  # they may quote the gold, or name another one
        "refined": row.refined_thoughts,
    }
    trained = [turn for turn in places if turn in settings.loss_on]  # in their order
    return TrainingConversation(
        prompt_id=row.prompt_id,
        sample=row.sample,
        source=row.source,
        messages=(*asked, {"role": "assistant", "content": row.refined}),
        turns=tuple(places[turn] for turn in trained),
        weight=row.weight,
        thoughts=tuple(thoughts[turn] for turn in trained),
    )


def demonstration(row: Prompt) -> TrainingConversation:
    """x, yG: what supervised fine-tuning on golds learns from."""
    answer: Message = {"role": "assistant", "content": row.gold}
    return TrainingConversation(
        prompt_id=row.prompt_id,
        sample=None,
        source=row.source,
        messages=(*row.prompt, answer),
        turns=(len(row.prompt),),
    )


def conversation_of(
    row: Prompt, templates: Templates, settings: TrainSettings
) -> TrainingConversation:
    """What is learned from a row: its trajectory under its label or its own principle; its gold,
    where it has no trajectory."""
    if not isinstance(row, Trajectory):
        return demonstration(row)
    label = row.label if isinstance(row, Labelled) else row.principle
    return training_conversation(row, label, templates, settings)


def encode(row: TrainingConversation, encoder: Encoder) -> Encoded:
    """Tokenise a conversation, or say why it cannot be used."""
    known = {
        turn: thoughts
        for turn, thoughts in zip(row.turns, row.thoughts, strict=False)
        if thoughts is not None
    }
    digest = text_sha256(json.dumps(dataclasses.asdict(row), sort_keys=True))
    try:
        examples = tuple(encoder.encode(row.messages, row.turns, row.weight, known))
    except EncodingError as error:
        skipped = Rejected(
            prompt_id=row.prompt_id,
            sample=row.sample,
            source=row.source,
            reason="cannot be trained on",
            detail=str(error),
        )
        return Encoded(examples=(), skipped=(skipped,), digest=digest)
    return Encoded(examples=examples, skipped=(), digest=digest)


def _places(prompt: int, guided: bool) -> dict[Turn, int]:
    """Where the policy's turns stand: x · y1 · ask · z · ask · y2, or x · y1 · ask · y2."""
    if guided:
        return {"initial": prompt, "principle": prompt + 2, "refined": prompt + 4}
    return {"initial": prompt, "refined": prompt + 2}


def nothing_to_train_on(
    skipped: Sequence[Rejected], what: str, settings: TrainSettings
) -> UserError:
    """The error of a training set of which nothing is left."""
    return UserError(
        f"none of the {len(skipped):,} {what} can be trained on; the first: {skipped[0].detail}",
        where=skipped[0].source,
        fix=f"raise train.max_tokens (now {settings.max_tokens:,}) if they are too long",
    )


def in_one_process(settings: TrainSettings) -> TrainSettings:
    """The settings that decide the result: more processes change it by rounding only."""
    return settings.model_copy(update={"processes": 1})


def _counts(data: TrainingSet, training: Training) -> dict[str, int]:
    lengths = [len(example.ids) for example in data.examples]
    trained = [int(np.sum(example.trained)) for example in data.examples]
    steps = plan_batches(lengths, training.settings, training.seed)
    return {
        "lessons": data.conversations,
        "trained": data.conversations - len(data.skipped),
        "skipped": len(data.skipped),
        "examples": len(data.examples),
        "tokens": sum(lengths[i] for rows in steps for i in rows),
        "trained_tokens": sum(trained[i] for rows in steps for i in rows),
        "steps": len(steps),
    }
