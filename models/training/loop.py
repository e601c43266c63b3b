"""The training loop: `transformers.Trainer` with our objectives and micro-batches of limited size.

`models/training/job.py` calls `train` for a model that `models/training/updates.py` made, in one
process or in each of several that share every optimiser step. The objective is the M-step's
(`Likelihood`, below) or SAMI's (`models.training.sami.Information`).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.nn import functional

from constitutions.errors import UserError
from models.engine.output_layer import output_only
from models.policy import Progress
from models.training.adapter import AdapterSettings, TrainingStep, plan_batches
from models.training.distillation import Start, distillation_loss
from models.training.encoding import EncodedExample
from models.training.resumable import keep, newest

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

CHECKPOINT_STEPS = 50
Item = TypeVar("Item")
Passes = list[list[Item]]
"""The micro-batches of one process in one optimiser step."""


class Objective(Protocol[Item]):
    """What a training minimises over items, in nats."""

    @property
    def idle(self) -> Item:
        """An item without effect on the loss."""

    def tokens(self, item: Item) -> int:
        """The item's number of tokens, by which batches are planned."""

    def worth(self, item: Item) -> float:
        """What the item adds to the constant that divides a step's loss."""

    def micro_batches(self, rows: Sequence[Item]) -> Passes[Item]:
        """Items, given by rising length, in groups that fit into the memory."""

    def collate(self, rows: Sequence[Item]) -> dict[str, Any]:
        """A micro-batch as tensors."""

    def parts(self, model: Any, batch: dict[str, Any]) -> list[Callable[[], torch.Tensor]]:
        """Functions that compute scalars, one at a time, whose sum is the micro-batch's loss.

        Processes may have different numbers of them; they add up their gradients at the last one.
        """


def train(
    model: Any,
    examples: Sequence[Item],
    settings: AdapterSettings,
    *,
    objective: Objective[Item],
    seed: int,
    checkpoints: Path,
    progress: Progress | None = None,
) -> list[TrainingStep]:
    """Fit the model's trainable weights to the examples, in place; returns the training curve.

    Each step follows the gradient of the objective over its rows, divided by one constant (the mean
    worth of a step), so that a row has the same weight in every batch. The result depends only on
    the arguments and the machine's arithmetic. Several processes (`WORLD_SIZE`) share the rows of
    each step; their result differs from that of one process by rounding only.

    Args:
        model: from `updates.trainable`.
        examples: at least one.
        checkpoints: a directory of this training alone; one that was killed resumes at the last
            checkpoint there. Removed at the end.
        progress: called with the number of optimiser steps that a checkpoint has, then with 1 after
            each step (`len(plan_batches(…))` in all).

    Raises:
        UserError: the loss is no longer finite.
    """
    from models.training.mixed_precision import mixed_precision

    lengths = list(map(objective.tokens, examples))
    worths = list(map(objective.worth, examples))
    steps = plan_batches(lengths, settings, seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    total = sum(worths[i] for rows in steps for i in rows)
    trainer = _trainer(
        model,
        _Work(examples, steps, processes, objective),
        objective,
        scale=processes * len(steps) / total if total else 0.0,
        arguments=_arguments(model, settings, len(steps), seed, checkpoints),
        progress=progress,
    )
    begun = newest(checkpoints)
    with mixed_precision(model, active=trainer.args.bf16):
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(checkpoints, ignore_errors=True)
    return _curve(trainer.state.log_history, steps, lengths)


@dataclass(frozen=True)
class _Work(Sequence[Any]):
    """What every process does in every step, found when it is asked for: examples stay on disk."""

    examples: Sequence[Any]
    steps: Sequence[Sequence[int]]
    processes: int
    objective: Objective[Any]

    def __len__(self) -> int:
        return len(self.steps) * self.processes

    def __getitem__(self, index: Any) -> Any:
        step, process = divmod(range(len(self))[index], self.processes)
        rows = [self.examples[i] for i in self.steps[step]]
        return share(rows, self.processes, self.objective)[process]


def share(rows: Sequence[Item], processes: int, objective: Objective[Item]) -> list[Passes[Item]]:
    """The micro-batches of each process in one optimiser step over these rows.

    Every process gets rows of every length, and the same number of micro-batches: idle items fill
    up the shorter shares.
    """
    ordered = sorted(rows, key=objective.tokens)
    shares = [objective.micro_batches(ordered[r::processes]) for r in range(processes)]
    most = max(map(len, shares))
    return [passes + [[objective.idle]] * (most - len(passes)) for passes in shares]


# The M-step's objective --------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """The M-step's objective: −log p_θ of the trained tokens, weighted; see `weighted_loss`.

    Of examples with a teacher it is `distillation_loss`, in micro-batches of their own.
    """

    budget: int
    """Most tokens of a micro-batch, padding included; a longer row has one of its own."""
    start: Start | None = None
    """The policy at the start of the training, which is the teacher."""

    idle = EncodedExample((0, 0), (False, True), 0.0)

    def tokens(self, item: EncodedExample) -> int:
        """See `Objective`."""
        return item.tokens

    def worth(self, item: EncodedExample) -> float:
        """Its trained tokens times its weight."""
        return item.weight * int(np.sum(item.trained))

    def micro_batches(self, rows: Sequence[EncodedExample]) -> Passes[EncodedExample]:
        """See `Objective`; the padded size of each group is within the budget."""
        passes: Passes[EncodedExample] = []
        for row in sorted(rows, key=_has_teacher):
            together = passes and _has_teacher(passes[-1][0]) == _has_teacher(row)
            if together and (len(passes[-1]) + 1) * row.tokens <= self.budget:
                passes[-1].append(row)
            else:
                passes.append([row])
        return passes

    @classmethod
    def collate(cls, rows: Sequence[EncodedExample]) -> dict[str, Any]:
        """The batch of `weighted_loss`, padded on the right to the longest row; and the teacher's,
        where there is one, under "teacher"."""
        batch = cls._padded(rows)
        if _has_teacher(rows[0]):
            batch["teacher"] = cls._padded([row.teacher for row in rows])
        return batch

    @staticmethod
    def _padded(rows: Sequence[EncodedExample]) -> dict[str, Any]:
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        trained = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.as_tensor(np.array(row.ids))
            trained[i, : len(row.ids)] = torch.as_tensor(np.array(row.trained))
        weight = torch.tensor([row.weight for row in rows])
        return {"input_ids": ids, "trained": trained, "weight": weight}

    def parts(self, model: Any, batch: dict[str, Any]) -> list[Callable[[], torch.Tensor]]:
        """The one loss."""
        if "teacher" not in batch:
            return [partial(weighted_loss, model, batch)]
        assert self.start is not None, "a job with a teacher keeps the policy at its start"
        return [partial(distillation_loss, model, self.start, batch, batch["teacher"])]


def _has_teacher(row: EncodedExample) -> bool:
    return len(row.taught) > 0


def weighted_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Σ_i weight_i · −log p_θ(trained tokens of i | the tokens before them), in nats (a scalar).

    Where the weights are those of the posterior, its gradient is the M-step's: the posterior
    expectation of −∇ log p_θ(y2, z | x, y1) (STaPLe, section 3).

    Args:
        model: a causal language model, also in its wrapper for several processes.
        batch: `input_ids` (rows, length) padded on the right, `trained` (rows, length) bool,
            `weight` (rows,).
    """
    ids, trained, weight = batch["input_ids"], batch["trained"], batch["weight"]
    row, position = trained[:, 1:].nonzero(as_tuple=True)
    # No attention mask, for the faster kernel: causal attention ignores padding on the right.
    with output_only(model, row, position):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    losses = functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        ids[row, position + 1],
        reduction="none",
    )
    return (losses * weight[row]).sum()


# The loop ----------------------------------------------------------------------------------


def _trainer(
    model: Any,
    work: Sequence[Passes[Item]],
    objective: Objective[Item],
    *,
    scale: float,
    arguments: TrainingArguments,
    progress: Progress | None,
) -> Trainer:
    """A Trainer whose step goes through the micro-batches of one item of `work`."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class WeightedTrainer(Trainer):
        def training_step(
            self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
        ) -> torch.Tensor:
            model.train()
            batches = self._prepare_inputs(inputs)["passes"]
            total = torch.zeros((), device=self.args.device)
            parts = [part for batch in batches for part in objective.parts(model, batch)]
            for part in parts:
                last = part is parts[-1]  # only then do several processes add their gradients
                with nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = part() * scale
                    self.accelerator.backward(loss)
                total += loss.detach()
            return total

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # the library's own looks for a batch

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if progress and state.global_step:  # resumed
                progress(state.global_step)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if progress:
                progress(1)

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            trainer.accelerator.wait_for_everyone()  # each process has written its part
            if state.is_world_process_zero:
                keep(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, work),
        data_collator=lambda items: {"passes": [objective.collate(r) for r in items[0]]},
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    model: Any, settings: AdapterSettings, steps: int, seed: int, checkpoints: Path
) -> TrainingArguments:
    from transformers import TrainingArguments

    on_gpu = model.device.type == "cuda"
    constant = settings.schedule == "constant"
    held_as = getattr(model, "held_as", model.dtype)  # all weights are in float32 while trained
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        per_device_train_batch_size=1,  # an item is a process's share of a step
        train_sampling_strategy="sequential",
        seed=seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if constant else settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=settings.max_gradient_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        bf16=held_as == torch.bfloat16,
        optim=_optimiser(settings, on_gpu=on_gpu),
        weight_decay=0.0,
        save_steps=CHECKPOINT_STEPS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process never spreads a batch over GPUs
    return arguments


def _optimiser(settings: AdapterSettings, *, on_gpu: bool) -> str:
    if settings.optimizer == "rmsprop":
        return "rmsprop"
    return "paged_adamw_8bit" if on_gpu else "adamw_torch"


def _curve(
    logs: list[dict[str, float]], steps: list[list[int]], lengths: list[int]
) -> list[TrainingStep]:
    curve: list[TrainingStep] = []
    tokens = 0
    for rows, log in zip(steps, (entry for entry in logs if "loss" in entry), strict=True):
        tokens += sum(lengths[i] for i in rows)
        step = TrainingStep(
            int(log["step"]), log["loss"], log["learning_rate"], log["grad_norm"], tokens
        )
        if not math.isfinite(step.loss):
            raise UserError(
                f"training diverged: the loss of step {step.step} is {step.loss}",
                fix="lower the learning rate",
            )
        curve.append(step)
    return curve
