"""`staple plan`: an estimate of the tokens, memory, disk and hours that an experiment takes, and of
its constitution's size and coverage.

No model is loaded and nothing is fetched. `flows.plan.workload` has the turns of each stage,
`flows.plan.cost` what a turn costs on a GPU; this module adds them up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from constitutions.errors import UserError
from flows.experiment import record_of, recorded_settings
from flows.methods import method_of
from flows.plan.constitution import Foreseen, foreseen
from flows.plan.cost import GIB, GPUS, Gpu, Held
from flows.plan.machine import CPU, this_machine
from flows.plan.sami import workload_of
from flows.plan.workload import CHARACTERS, Assumed, JudgeTurns, SampledTurn, Workload, lengths
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from models.checkpoints.gguf import local_directory
from models.checkpoints.shapes import WIDTH, shape_of
from models.policy import PolicySettings
from models.worlds.registry import WORLD_MODELS
from tasks.clustering.wordings import TABLE
from tasks.record.record import Attempt
from tasks.rows import ClusterRow

MASK_BYTES = 3
"""Bytes per pair of positions of a row while its mask is made, beside the mask itself."""
SMALL = 20_000_000
"""Parameters below which a CPU does: the embedded worlds' models have fewer than a million."""
COPIES = 3
"""Copies of each text: in mine's rows, in score's, and in the running stage's parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The work of one stage in one iteration; tokens are expected values, except `at_most`."""

    stage: str
    prompts: float
    samples: float = 0.0
    generated: float = 0.0
    at_most: float = 0.0
    """Tokens to generate if every turn took its whole limit."""
    prefilled: float = 0.0
    trained: float = 0.0
    """Tokens that training processes, context included."""
    hours: float | None = 0.0
    """On the GPU; None: elsewhere, behind an endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterations:
    """`first` … `last`, which are alike: the work of each."""

    first: int
    last: int
    work: tuple[StageCost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose, and the settings to change where the GPU has fewer."""

    title: str
    parts: dict[str, float]
    remedy: str = ""

    @property
    def bytes(self) -> float:
        """In all."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an experiment takes on one GPU, or on this machine's processor."""

    settings: ExperimentSettings
    gpu: Gpu
    parameters: int
    iterations: tuple[Iterations, ...]
    memory: tuple[Memory, ...]
    disk: dict[str, float]
    """Bytes by what they are for; records uncompressed."""
    notes: tuple[str, ...]
    """What was assumed, and what is left out."""

    @property
    def on_cpu(self) -> bool:
        """Whether the hours are this machine's processor's."""
        return self.gpu.name == CPU

    def facts(self) -> dict[str, object]:
        """All of it but the settings, for a program; memory and disk in bytes."""
        return {
            "experiment": self.settings.experiment,
            "gpu": self.gpu.name,
            "parameters": self.parameters,
            "iterations": [asdict(part) for part in self.iterations],
            "memory": [asdict(memory) for memory in self.memory],
            "disk": self.disk,
            "hours": self.total("hours"),
            "notes": self.notes,
        }

    def total(self, figure: str) -> float:
        """A figure of `StageCost` over all stages and iterations."""
        return sum(
            (part.last - part.first + 1) * (getattr(work, figure) or 0.0)
            for part in self.iterations
            for work in part.work
        )


def plan(
    settings: ExperimentSettings, gpu: str | None = None, assumed: Assumed | None = None
) -> Plan:
    """Estimate an experiment on one device.

    Args:
        gpu: a name of `flows.plan.cost.GPUS`; "cpu" measures this machine for a second. None: that,
            where the policy is set to it or is small, else an H100.

    Raises:
        UserError: no such GPU; a model whose sizes are unknown; a data file or a constitution that
            is wrong.
    """
    names = (CPU, *GPUS)
    if gpu not in (None, *names):
        raise UserError("no such GPU", where=f"--gpu {gpu}", expected=f"one of {', '.join(names)}")
    small = shape_of(settings.policy).parameters < SMALL
    gpu = gpu or (CPU if small or settings.policy.device == "cpu" else "h100")
    device = this_machine(settings.policy.threads) if gpu == CPU else GPUS[gpu]
    known = lengths(settings.prompts, settings.seed)
    estimate = _Estimate(settings, device, workload_of(settings, known, assumed or Assumed()))
    return Plan(
        settings=settings,
        gpu=device,
        parameters=estimate.policy.shape.parameters,
        iterations=tuple(estimate.iterations()),
        memory=tuple(estimate.memory()),
        disk=estimate.disk(),
        notes=tuple(estimate.notes()),
    )


def like(experiment: str) -> Assumed:
    """Assumptions measured on the newest finished iteration of a recorded experiment.

    Raises:
        UserError: no iteration of this name sampled and trained.
    """
    settings, record = recorded_settings(experiment), record_of(experiment)
    done = [t for t in range(settings.last, 0, -1) if record.current("train", t)]
    work = workload_of(settings, lengths(settings.prompts, settings.seed), Assumed())
    explored = work.explored()
    if explored is None or not done:
        raise UserError(
            "no iteration of it mined and trained",
            where=f"experiment {experiment}",
            fix="run a small one first: staple run PRESET --set iterations=1 "
            "--set prompts.first=100 --set experiment=pilot",
        )
    method, train = method_of(settings), settings.train
    stages = (explored[0], *(["filter"] if method.mines else []), "train")
    m = {k: v for stage in stages for k, v in record.needs(stage, done[0]).metrics.items()}
    if method.constitutional:
        asked, learned = m["sampled_responses"] / work.rows, m["train/trained"]
        accepted = learned / m["train/queries"]
    else:
        asked, learned = m["mined_prompts"], m["train/examples"]
        accepted = m["trajectories"] / m["prompts_in"]
    limits = asked * sum(turn.samples * turn.limit for turn in explored[1])
    found = Assumed(
        filled=m["generated_tokens"] / limits,
        accepted=accepted,
        clusters=_clusters(record.needs("cluster", done[0])) if method.guided else (),
        like=experiment,
    )
    if train.tokens or train.first_answer != "none":  # rows do not tell the prompts' length
        return found
    others, _ = replace(work, assumed=replace(found, prompt=0.0)).learned()
    each = m["train/tokens"] / (learned * work.rows * train.epochs)
    return replace(found, prompt=max(1.0, each - others))


def _clusters(clustered: Attempt) -> tuple[int, ...]:
    """The trajectories of each cluster, the tail's included."""
    sizes: Counter[int] = Counter()
    for row in clustered.read(TABLE, ClusterRow):
        sizes[row.cluster] += row.support
    return tuple(sizes.values())


@dataclass(frozen=True)
class _Estimate:
    settings: ExperimentSettings
    gpu: Gpu
    workload: Workload

    def _held(self, model: PolicySettings, rank: int = 0) -> Held:
        return Held(
            shape=shape_of(model),
            quantization=model.quantization,
            dtype=model.dtype,
            rank=rank,
            gpu=self.gpu,
        )

    @cached_property
    def policy(self) -> Held:
        """The model that improves itself, on the GPU."""
        train = self.settings.train
        adapted = self._adapters and train.update == "lora"
        return self._held(self.settings.policy, train.lora_rank if adapted else 0)

    @property
    def _adapters(self) -> int:
        """How many are trained: one an iteration, and a taught one."""
        return self.settings.last + self.settings.teach.on

    def _micro(self, length: float) -> int:
        """Conversations of a length that are trained on together."""
        train = self.settings.train
        return max(1, min(self.workload.step_rows, int(train.micro_batch_tokens // length)))

    # Work

    def iterations(self) -> Iterator[Iterations]:
        """Iteration 0, the first, and the later ones."""
        last = self.settings.last
        yield Iterations(first=0, last=0, work=(*self._taught(), *self._evaluated(0)))
        for first, end in ((1, 1), (2, last)):
            if first <= min(end, last):
                work = (*self._improved(first), *self._evaluated(first))
                yield Iterations(first=first, last=end, work=work)

    def _taught(self) -> Iterator[StageCost]:
        """What the initial policy is taught, also where another experiment kept the same."""
        if not self.settings.teach.on:
            return
        count, length, loss = self.workload.taught()
        s = self.settings.teach.training(self.settings.train)
        tokens = count * s.epochs * length
        seconds = self._training_seconds(tokens, length, loss)
        hours = seconds / s.processes / 3600
        yield StageCost(stage="teach", prompts=count, trained=tokens, hours=hours)

    def _improved(self, iteration: int) -> Iterator[StageCost]:
        sizes = self.settings.prompts
        prompts = sizes.first if iteration == 1 else sizes.later
        if explored := self.workload.explored():
            yield self._sampled(explored[0], self.settings.policy, prompts, explored[1])
        yield from map(self._judged, self.workload.graded(prompts))
        yield self._training(prompts * self.workload.accepted)

    def _evaluated(self, iteration: int) -> Iterator[StageCost]:
        s, benchmarks = self.settings, self.workload.benchmarks
        prompts = s.prompts.held_out + sum(benchmarks.values())
        yield self._sampled("evaluate", s.policy, prompts, self.workload.answered())
        if turns := self.workload.informed():
            yield self._sampled("information", s.policy, prompts, turns)
        yield from map(self._judged, self.workload.judged(iteration))

    def _judged(self, asked: JudgeTurns) -> StageCost:
        assert asked.judge.policy is not None, "JudgeSettings checks it"
        return self._sampled(asked.stage, asked.judge.policy, asked.prompts, [asked.turn])

    def _sampled(
        self, stage: str, model: PolicySettings, prompts: int, turns: Sequence[SampledTurn]
    ) -> StageCost:
        """The turns of one model, which has the GPU to itself."""
        at_most = prompts * sum(turn.samples * turn.limit for turn in turns)
        return StageCost(
            stage=stage,
            prompts=prompts,
            samples=prompts * sum(turn.samples for turn in turns),
            generated=self.workload.assumed.filled * at_most,
            at_most=at_most,
            prefilled=prompts * sum(turn.prefilled for turn in turns),
            hours=self._hours(model, prompts, turns),
        )

    def _hours(
        self, model: PolicySettings, prompts: int, turns: Sequence[SampledTurn]
    ) -> float | None:
        """Prompts are prefilled, then decoded as many at a time as are set, fit, and a shard has.

        None behind an endpoint.
        """
        if model.endpoint:
            return None
        held = (self.policy if model is self.settings.policy else self._held(model)).sampled
        seconds = 0.0
        for turn in turns:
            together = self._rows(held, model.batch_rows, turn)
            new = self.workload.assumed.filled * turn.limit
            steps = prompts * turn.samples * new / together
            read = turn.cached(new / 2)
            seconds += steps * held.step_seconds(together, turn.context + new / 2, read)
            seconds += held.prefill_seconds(prompts * turn.prefilled, turn.context)
        return seconds / 3600

    def _rows(self, held: Held, rows: int | None, turn: SampledTurn) -> int:
        """Rows that are decoded together: as many as are set, or fit, and a shard has."""
        rows = rows or max(1, held.rows_that_fit(turn.cached(turn.limit)))
        return min(rows, self.settings.shard_size * turn.samples)

    def _training(self, examples: float) -> StageCost:
        s = self.settings.train
        length, loss = self.workload.learned()
        first, first_loss = self.workload.first_answers()
        each = length + first
        tokens = s.tokens or examples * self.workload.rows * s.epochs * each
        length, loss = (each / 2, (loss + first_loss) / 2) if first else (length, loss)
        seconds = self._training_seconds(tokens, length, loss)
        hours = seconds * (1 + self._ahead(length)) / s.processes / 3600
        return StageCost(stage="train", prompts=examples, trained=tokens, hours=hours)

    def _training_seconds(self, tokens: float, length: float, loss: float) -> float:
        """On one GPU, for rows of `length` tokens of which `loss` have loss."""
        return self.policy.training_seconds(
            tokens,
            tokens * loss / length,
            rows=self._micro(length),
            length=length,
            checkpointing=self.settings.train.gradient_checkpointing,
        )

    def _ahead(self, length: float) -> float:
        """What SAMI's further forward passes add, as a share: see `models.training.sami`.

        One for the matrix, where a query's rows do not fit together; one, not in every epoch but
        once, for what the KL term holds the policy to.
        """
        s = self.settings.train
        if not method_of(self.settings).constitutional:
            return 0.0
        passes = 1 + (1 if self.policy.rank else 2) + s.gradient_checkpointing
        again = (self._micro(length) < self.workload.rows) + bool(s.kl) / s.epochs
        return again / passes

    # Memory

    def memory(self) -> Iterator[Memory]:
        """Of sampling and of training, with settings to change where it is too much."""
        kinds = []
        if not self.settings.policy.endpoint:
            kinds.append((self.sampling(), self._fewer_rows))
        if self._adapters:
            kinds.append((self.training(), self._smaller_steps))
        for memory, remedy in kinds:
            fits = memory.bytes <= self.gpu.room
            yield memory if fits else replace(memory, remedy=remedy())

    def sampling(self) -> Memory:
        """Of the largest turn, with every turn at its token limit."""
        found = [self._sampling_of(turn) for turn in self._longest_turns()]
        return max(found, key=lambda memory: memory.bytes)

    def _sampling_of(self, turn: SampledTurn) -> Memory:
        held = self.policy.sampled
        rows = self._rows(held, self.settings.policy.batch_rows, turn)
        tokens = turn.cached(turn.limit)
        parts = held.sampling_memory(rows, tokens)
        return Memory(title=f"sampling {rows:,} × {tokens:,.0f}", parts=parts)

    def _longest_turns(self) -> Iterator[SampledTurn]:
        """Every turn of the policy at its limits."""
        work = self.workload.at_limits()
        if self.settings.last and (explored := work.explored()):
            yield from explored[1]
        yield from work.answered()

    def _fewer_rows(self) -> str:
        """As many rows as fit; with NF4 weights, where not one does without."""
        tokens = max(turn.cached(turn.limit) for turn in self._longest_turns())
        smaller = replace(self.policy, quantization="nf4")
        for held, change in (
            (self.policy, {}),
            (smaller, {"policy.quantization": "nf4"}),
        ):
            if rows := held.sampled.rows_that_fit(tokens):
                return _flags({**change, "policy.batch_rows": rows})
        return _larger(sum(smaller.sampling_memory(1, tokens).values()))

    def training(self) -> Memory:
        """At a micro-batch of the longest conversations."""
        length, loss = self.workload.at_limits().learned()
        checkpointing = self.settings.train.gradient_checkpointing
        rows = self._micro(length)
        parts = self.policy.training_memory(rows, length, loss, checkpointing=checkpointing)
        if method_of(self.settings).constitutional:  # responses do not see each other
            parts["mask"] = rows * length**2 * (WIDTH[self.policy.dtype] + MASK_BYTES)
        return Memory(title=f"training {rows} × {length:,.0f}", parts=parts)

    def _smaller_steps(self) -> str:
        """The first of these changes, each with those before it, that makes training fit."""
        train, changes, needed = self.settings.train, dict[str, Any](), math.inf
        last = (
            ("policy.quantization", "nf4") if train.update == "lora" else ("train.update", "lora")
        )
        for name, value in (
            ("train.gradient_checkpointing", True),
            ("train.micro_batch_tokens", min(2048, train.micro_batch_tokens)),
            last,  # it changes what is learned
            *([("sample.constitutions", 2)] if self.workload.rows > 1 else []),
        ):
            changes[name] = value
            settings = with_changes(self.settings, changes)
            other = _Estimate(settings, self.gpu, replace(self.workload, settings=settings))
            needed = other.training().bytes
            if needed <= self.gpu.room:
                now = self.settings.model_dump()
                return _flags({n: v for n, v in changes.items() if _value(now, n) != v})
        return _larger(needed)

    # Disk

    def disk(self) -> dict[str, float]:
        """Bytes; without the corpora, which are the hub's to tell."""
        s, shape = self.settings, self.policy.shape
        directory = local_directory(s.policy.model)
        files = directory.glob("*.safetensors") if directory else ()
        published = "float32" if s.policy.model in WORLD_MODELS else "bfloat16"
        weights = sum(f.stat().st_size for f in files) or shape.parameters * WIDTH[published]
        found = {"model": float(weights)}
        if self._adapters:
            adapter = float(shape.adapter(self.policy.rank) * WIDTH["float32"])
            full = float(shape.parameters * WIDTH[s.policy.dtype])
            found["adapters" if adapter else "weights, one an iteration"] = (adapter or full) * (
                self._adapters
            )
            found["training checkpoint"] = 1.5 * (adapter or full)
        if s.last and (explored := self.workload.explored()):
            (stage, turns), shard = explored, s.shard_size
            row = self._row_bytes(turns)
            prompts = s.prompts.first + s.prompts.later * (s.last - 1)
            found["records"] = COPIES * row * prompts
            found[f"a part of {stage} ({shard} prompts)"] = row * shard
        return found

    def _row_bytes(self, turns: Sequence[SampledTurn]) -> float:
        """Of what one mined or sampled prompt adds to the record, uncompressed."""
        work, known = self.workload, self.workload.lengths
        new = work.rows * work.given
        for turn in turns:
            new += work.assumed.filled * turn.samples * turn.limit
        return CHARACTERS * (known.prompt + known.gold + new)

    # Notes

    def notes(self) -> Iterator[str]:
        """The assumptions behind the figures."""
        s, assumed, known = self.settings, self.workload.assumed, self.workload.lengths
        how = f"as in {assumed.like}" if assumed.like else "assumed (--filled, --accepted, --like)"
        kept = "trajectories are kept a mined prompt"
        if method_of(s).constitutional:
            kept = "of the queries are trained on"
            yield self._rows_note()
        yield (
            f"turns fill {assumed.filled:.0%} of their limits ('at most': all of them), and "
            f"{self.workload.accepted:.2f} {kept}: {how}"
        )
        yield (
            f"prompts of {self.workload.prompt:,.0f} tokens, up to {known.longest:,.0f}, golds of "
            f"{known.gold:,.0f}, at {CHARACTERS} characters a token; what samples share is "
            "prefilled once"
        )
        if s.iterations == "auto":
            yield f"at most {s.last} iterations: it ends after two that do not become the champion"
        if method_of(s).guided:
            yield from self._constitutions()
        gpu, reached = self.gpu, self.policy.efficiency
        rates = f"{gpu.bandwidth:,.0f} GB/s and {gpu.rate(s.policy.dtype) / 1e12:,.3g} TFLOP/s"
        yield (
            f"{gpu.name}{', measured now' * (gpu.name == CPU)}: {rates}, of which "
            f"decoding reaches {reached.decode:.0%}, prefill {reached.prefill:.0%}, training "
            f"{reached.training:.0%}; each layer of a step takes "
            f"{reached.layer_seconds * 1e3:.3g} ms besides"
        )
        if s.train.processes > 1:
            yield f"training on {s.train.processes} such GPUs, all else on one"
        if s.policy.device == "cpu" and gpu.name != CPU:
            yield "policy.device is cpu: the hours are the GPU's all the same"
        yield f"left out: {self.workload.rest}, loading, endpoints, corpora, older champions"

    def constitution(self, iteration: int) -> Foreseen:
        """What can be said of an iteration's constitution before it is there."""
        sizes = self.settings.prompts
        prompts = sizes.first if iteration == 1 else sizes.later
        trajectories = prompts * self.workload.accepted
        return foreseen(self.settings.cluster, trajectories, self.workload.assumed.clusters)

    def _constitutions(self) -> Iterator[str]:
        last = self.settings.last
        for first, end in ((1, 1), (2, last)):
            if first <= min(end, last):
                which = str(first) if first == end else f"{first}–{end}"
                said = _foreseen_text(self.constitution(first), self.workload.assumed.like)
                yield f"constitution of iteration {which}: {said}"

    def _rows_note(self) -> str:
        """What SAMI's rows hold, and how many are in memory (`models.training.sami`)."""
        size, length = self.workload.rows, self.workload.learned()[0]
        longest = self.workload.at_limits().learned()[0]
        together = self._micro(longest)
        how = (
            f"of the longest {together} at a time, in two passes: more constitutions take more time"
            if together < size
            else f"all {size} at a time"
        )
        return (
            f"C = {size}: a query is trained on in {size} rows, each its prompt under one "
            f"constitution and all {size} responses, {length:,.0f} tokens, at most "
            f"{longest:,.0f}; {how} (train.micro_batch_tokens = "
            f"{self.settings.train.micro_batch_tokens:,})"
        )


def _foreseen_text(found: Foreseen, like: str) -> str:
    of = f"{found.trajectories:,.0f} trajectories"
    if found.principles is None:
        bound = "cluster.constitution_size bounds it"
        if found.coverage is None:
            bound = "how many of them they label, a small run tells (--like)"
        return f"at most {found.at_most:,.0f} principles of {of}; {bound}"
    exact = "" if found.principles == found.at_most else "at least "
    return (
        f"{exact}{found.principles:,.0f} principles, which label about {found.coverage:.0%} of "
        f"{of}, if their clusters are as in {like}"
    )


def _flags(changes: dict[str, Any]) -> str:
    texts = {name: str(value).lower() for name, value in changes.items()}
    return " ".join(f"--set {name}={text}" for name, text in texts.items())


def _value(values: dict[str, Any], name: str) -> Any:
    part, _, field = name.partition(".")
    return values[part][field]


def _larger(needed: float) -> str:
    """The smallest GPU that has so much, where no setting helps."""
    enough = [g for g in sorted(GPUS.values(), key=lambda g: g.memory) if g.room >= needed]
    name = f"--gpu {enough[0].name}" if enough else "several GPUs"
    return f"no setting helps: at least {needed / GIB:,.0f} GiB, so {name}"
