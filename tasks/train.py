"""The M-step: from conversations to learn from to an adapter and its training curve.

Maximises log p_θ(y2, z | x, y1): x and y1 are context, the loss is on z and y2 (STaPLe, section 3).
With `train.first_answer` it also maximises log p_θ(y2 | x), which is no part of the paper's method.
The baselines train here too: STaR on y2 without a principle, supervised fine-tuning on the golds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from constitutions.errors import UserError
from models.files import text_sha256
from models.policy import Message, PolicySettings, Progress
from models.pools.base import Where
from models.pools.processes import ProcessPool
from models.prompts import Templates, ask, ask_refinement
from models.training.adapter import AdapterSettings, TrainingStep, plan_batches
from models.training.encoding import EncodedExample, Encoder, EncodingError
from models.training.examples import StoredExamples
from models.training.job import Examples, Job, run
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import NOT_BETTER, FirstAnswer, Labelled, Prompt, Rejected, Trajectory

Turn = Literal["initial", "principle", "refined"]


class TrainSettings(AdapterSettings):
    """Principle learning: which turns are trained, and how. SAMI trains on responses."""

    loss_on: tuple[Turn, ...] = Field(("principle", "refined"), min_length=1)
    """Turns with loss: y1, z, y2. The method's are z and y2; where there is no principle, z does
    not count. Training on golds has its loss on them."""
    start: Literal["previous", "base"] = "previous"
    """Continue the adapter of the iteration before, or start at the initial policy: the base model,
    or what it was taught (`teach`)."""
    first_answer: Literal["none", "refined", "distilled"] = "none"
    """Whether first answers learn, too, so that a policy that is asked once gives what it would
    have refined: "refined" also trains the kept refinement as the answer to the prompt alone,
    "distilled" the probabilities that the policy, as the iteration finds it, has under the label.
    """
    first_answer_weight: float = Field(1.0, gt=0, le=100)
    """Weight of these examples beside the method's own."""
    gate: bool = False
    """Whether the policy learns to keep first answers: prompts whose candidates all failed to
    improve them become examples of the principle that says so, and need no third turn."""
    gate_weight: Annotated[float, Field(gt=0, le=100, exclude_if=lambda weight: weight == 1.0)] = (
        1.0
    )
    """Weight of these examples beside the method's own: where few prompts are improved, less than
    1 keeps the policy from keeping every first answer."""
    max_tokens: int = Field(4096, ge=16, le=1_000_000)
    """A longer conversation is skipped, and reported: a cut one would teach cut answers."""
    kl: float = Field(0.0, ge=0, le=100)
    """SAMI: weight of the divergence (KL, per token) from the policy that training starts from."""
    end_token: bool = True
    """SAMI: whether the token that ends a response counts as one of its tokens. The reference
    leaves it out."""

    @model_validator(mode="after")
    def _teacher_is_an_adapter(self) -> TrainSettings:
        if self.first_answer == "distilled" and self.update == "full":
            raise ValueError(
                "first_answer: distilled needs update: lora (a copy of all weights would be a "
                "second model in memory)"
            )
        return self


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
    teacher: tuple[Message, ...] = ()
    """Where the last message is distilled: the prompt after which the teacher gives it."""


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
    """The adapter that is continued: the last iteration's or a taught one; None starts at the base.
    """
    out: Path
    """The adapter's directory; unfinished work lies beside it."""
    settings: TrainSettings
    seed: int

    @classmethod
    def of(cls, policy: PolicySource, settings: TrainSettings, seed: int, out: Path) -> Training:
        """The training of a policy."""
        previous = policy.adapter_path if settings.start == "previous" else policy.taught_path
        return cls(policy.model, policy.settings, previous, out, settings, seed)

    def encoder(self) -> Encoder:
        """What tokenises for the base."""
        from models.training.bases import load_tokenizer

        tokenizer = load_tokenizer(self.model, self.policy.revision)
        return Encoder(tokenizer, self.settings.max_tokens, self.policy)

    def planned(self, examples: Examples) -> list[list[int]]:
        """The examples of each optimiser step, by number; of no examples no step."""
        lengths = [example.tokens for example in examples]
        return plan_batches(lengths, self.settings, self.seed) if lengths else []

    def fit(
        self, examples: Examples, digest: str, progress: Progress | None = None
    ) -> list[TrainingStep]:
        """Train on tokenised examples, and write the adapter to `out`.

        Args:
            digest: identifies the examples.
            progress: called with the number of optimiser steps done (`len(planned(…))` in all).

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
            distils=self.settings.first_answer == "distilled",
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
    at: Slot,
    settings: TrainSettings,
    policy: PolicySource,
    examples: Attempt,
    *,
    mined: Attempt | None = None,
    filtered: Attempt | None = None,
) -> Attempt:
    """examples, the adapter of iteration t−1 (inside `policy`) → adapter, curve, skipped.

    Args:
        examples: labelled trajectories of `cluster` or `review`; of `filter`, each under its own
            principle or under none; or `prompts`, whose golds are then learned.
        mined, filtered: what was mined and which of it was kept, where the policy learns to keep
            first answers.

    Raises:
        UserError: as `train`.
    """

    def compute(work: Workspace) -> Metrics:
        training = Training.of(policy, settings, at.seed, work.outputs / "adapter")
        asked = partial(conversations_of, templates=policy.templates, settings=settings)
        rows = _rows_of(examples)
        if mined and filtered:
            rows = [*rows, *not_improved(mined, filtered)]
        data = tokenised(work, training, rows, asked, str(at.iteration))
        total = len(training.planned(data.examples))
        with work.device(), progress(f"train {at.iteration}", total, "steps") as tick:
            done = train(data, training, tick)
        losses = write_curve(work, done.curve, done.skipped)
        return {f"train/{name}": float(count) for name, count in done.counts.items()} | losses

    gate = {"mined": mined, "filtered": filtered} if mined and filtered else {}
    inputs = policy.begun(settings.start, labelled=examples, **gate)
    where, fixed = training_slot(policy, at), in_one_process(settings)
    return where.attempt("train", fixed, inputs, compute, takes_device=True)


def tokenised(
    work: Workspace,
    training: Training,
    rows: Sequence[Any],
    conversations: Callable[[Any], Sequence[TrainingConversation]],
    what: str,
) -> TrainingSet:
    """Rows as conversations, tokenised shard by shard in several processes.

    Args:
        conversations: what is learned from a row; other processes call it.
        what: the name of the rows, for the progress bar.
    """
    job = partial(_encode_shard, conversations)
    with ProcessPool(partial(_open_encoder, training), worth=32) as pool:
        encoded = work.in_shards(
            "encoded", Encoded, rows, pool, job, what=f"tokenise {what}", unit="conversations"
        )
    return TrainingSet.of(encoded, work.folder / "examples.arrow")


def not_improved(mined: Attempt, filtered: Attempt) -> Iterator[FirstAnswer]:
    """The finished first answers that no candidate improved, all of them being sound."""
    whole = (row for row in filtered.rows("rejected", Rejected) if row.sample is None)
    failed = {row.prompt_id for row in whole if row.detail == NOT_BETTER}
    for row in mined.rows("mined", FirstAnswer):
        if row.prompt_id in failed and row.initial_finish == "stop":
            yield row


def _rows_of(examples: Attempt) -> Sequence[Any]:
    match examples.stage:
        case "prompts":
            return examples.rows("prompts", Prompt)
        case "filter":
            return examples.rows("trajectories", Trajectory)
        case _:
            return examples.rows("labelled", Labelled)


def _open_encoder(training: Training, _: Where) -> Encoder:
    return training.encoder()


def itself(row: TrainingConversation) -> list[TrainingConversation]:
    """The conversation of a row that is one."""
    return [row]


def _encode_shard(
    conversations: Callable[[Any], Sequence[TrainingConversation]],
    encoder: Encoder,
    rows: Sequence[Any],
    advance: Progress,
) -> list[Encoded]:
    found = [encode(each, encoder) for row in rows for each in conversations(row)]
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
    work: Workspace,
    curve: Sequence[TrainingStep],
    skipped: Sequence[Rejected],
    stage: str = "train",
) -> Metrics:
    """Write the training curve and what was skipped.

    Returns:
        The first loss, and the mean of the last tenth.
    """
    work.write("curve", curve, TrainingStep)
    work.write("skipped", skipped, Rejected)
    losses = [step.loss for step in curve]
    last = losses[-max(1, len(losses) // 10) :]
    return {f"{stage}/first_loss": losses[0], f"{stage}/last_loss": sum(last) / len(last)}


def training_conversation(
    row: Trajectory, label: str, templates: Templates, settings: TrainSettings
) -> TrainingConversation:
    """x, y1, z, y2 as the policy is asked without the gold, or x, y1, y2; z is the label."""
    asked = ask_refinement(templates, row.prompt, row.initial, label)
    places = _places(len(asked), templates.guided)
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


def demonstrations(row: Prompt) -> list[TrainingConversation]:
    """x, yG: what supervised fine-tuning on golds learns from, one for each gold of the prompt."""
    return [
        TrainingConversation(
            prompt_id=row.prompt_id,
            sample=None,
            source=row.source,
            messages=(*row.prompt, {"role": "assistant", "content": gold}),
            turns=(len(row.prompt),),
        )
        for gold in row.golds
    ]


def first_answer(row: Trajectory, text: str, weight: float) -> TrainingConversation:
    """x, y: one of the row's answers to the prompt alone, after an empty thought: what was thought
    before a refinement speaks of the principle."""
    return TrainingConversation(
        prompt_id=row.prompt_id,
        sample=row.sample,
        source=row.source,
        messages=(*row.prompt, {"role": "assistant", "content": text}),
        turns=(len(row.prompt),),
        weight=row.weight * weight,
    )


def kept_answer(
    row: FirstAnswer, templates: Templates, weight: float = 1.0
) -> TrainingConversation:
    """x, y1, keep: the policy's turn that says that y1 stands, with loss on it alone."""
    asked = ask(templates, row.prompt, row.initial)
    return TrainingConversation(
        prompt_id=row.prompt_id,
        sample=None,
        source=row.source,
        messages=(*asked, {"role": "assistant", "content": templates.keep}),
        turns=(len(asked),),
        weight=weight,
    )


def conversations_of(
    row: Prompt, templates: Templates, settings: TrainSettings
) -> list[TrainingConversation]:
    """What is learned from a row: its trajectory under its label or its own principle, and its
    first answer where the settings say so; that its first answer is kept; its golds, where it has
    neither."""
    if isinstance(row, FirstAnswer):
        return [kept_answer(row, templates, settings.gate_weight)]
    if not isinstance(row, Trajectory):
        return demonstrations(row)
    label = row.label if isinstance(row, Labelled) else row.principle
    found = [training_conversation(row, label, templates, settings)]
    if settings.first_answer == "none":
        return found
    first = first_answer(row, row.refined, settings.first_answer_weight)
    if settings.first_answer == "refined":
        return [*found, first]
    teacher = ask_refinement(templates, row.prompt, row.initial, label)
    own = first_answer(row, row.initial, settings.first_answer_weight)
    return [*found, *(dataclasses.replace(each, teacher=teacher) for each in (first, own))]


def encode(row: TrainingConversation, encoder: Encoder) -> Encoded:
    """Tokenise a conversation, or say why it cannot be used."""
    known = {
        turn: thoughts
        for turn, thoughts in zip(row.turns, row.thoughts, strict=False)
        if thoughts is not None
    }
    digest = text_sha256(json.dumps(dataclasses.asdict(row), sort_keys=True))
    try:
        examples = tuple(_examples(row, encoder, known))
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


def _examples(
    row: TrainingConversation, encoder: Encoder, thoughts: Mapping[int, str]
) -> list[EncodedExample]:
    if not row.teacher:
        return encoder.encode(row.messages, row.turns, row.weight, thoughts)
    *prompt, answer = row.messages
    return [encoder.distilled(tuple(prompt), row.teacher, answer["content"], row.weight)]


def _places(last: int, guided: bool) -> dict[Turn, int]:
    """Where the policy's turns stand: x · y1 · ask · z · ask · y2, or x · y1 · ask · y2."""
    if guided:
        return {"initial": last - 4, "principle": last - 2, "refined": last}
    return {"initial": last - 2, "refined": last}


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
    lengths = [example.tokens for example in data.examples]
    trained = [int(np.sum(example.trained)) for example in data.examples]
    steps = training.planned(data.examples)
    return {
        "lessons": data.conversations,
        "trained": data.conversations - len(data.skipped),
        "skipped": len(data.skipped),
        "examples": len(data.examples),
        "tokens": sum(lengths[i] for rows in steps for i in rows),
        "trained_tokens": sum(trained[i] for rows in steps for i in rows),
        "steps": len(steps),
    }
