"""Distillation on a small model: what the teacher knows of its prompt, the student learns without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_job
import torch
from chat_model import build_chat_model

from models.training import distillation
from models.training.adapter import AdapterSettings
from models.training.bases import load_base
from models.training.distillation import Start, distillation_loss
from models.training.encoding import EncodedExample
from models.training.job import run
from models.training.loop import Likelihood
from models.training.updates import attach_adapter, continue_adapter, new_adapter

SETTINGS = AdapterSettings(
    lora_rank=8, lora_alpha=16, learning_rate=1e-2, batch_size=2, epochs=40, micro_batch_tokens=64
)
ANSWER = (50, 51, 52, 53, 54)
job = partial(small_job.job, settings=SETTINGS, distils=True)


def example(number: int, taught: tuple[int, ...]) -> EncodedExample:
    prompt = (60 + number, 61, 62)
    marks = (False,) * len(prompt) + (True,) * len(ANSWER)
    return EncodedExample((*prompt, *ANSWER), marks, 0.5 + number, (*prompt, *taught))


EXAMPLES = [example(0, (70, 71, 72, 73)), example(1, (80, 81))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "llama")


def base(model: Path) -> Any:
    return load_base(model, quantization="none", dtype="float32", device="cpu")[0]


def loss(policy: Any, start: Start, *examples: EncodedExample) -> float:
    batch = Likelihood.collate(examples)
    with torch.no_grad():
        return distillation_loss(policy, start, batch, batch["teacher"]).item()


def predicted(policy: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    """p of every token at every place of the answer, from the definition."""
    with torch.no_grad():
        logits = policy(torch.tensor([[*prompt, *ANSWER]])).logits[0].double()
    return logits[len(prompt) - 1 : -1].softmax(-1)


@pytest.mark.parametrize("top", [3, 10**6])
def test_the_loss_is_the_mean_of_both_divergences(
    model: Path, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the teacher's likeliest tokens and the rest; with all tokens there is no rest."""
    monkeypatch.setattr(distillation, "TOP", top)
    policy = base(model).eval()
    wanted = 0.0
    for row in EXAMPLES:
        teacher = predicted(policy, tuple(row.taught))
        student = predicted(policy, tuple(row.ids[: -len(ANSWER)]))
        for p, q in zip(teacher, student, strict=True):
            order = p.argsort(descending=True)
            parts = [torch.cat([a[order[:top]], a[order[top:]].sum()[None]]) for a in (p, q)]
            p, q = (part[: len(part) - (top > len(p))] for part in parts)
            both = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
            wanted += row.weight * both.item() / 2
    assert wanted > 0.05
    assert loss(policy, Start(policy), *EXAMPLES) == pytest.approx(wanted, rel=1e-3)


def test_without_another_prompt_there_is_nothing_to_learn(model: Path) -> None:
    policy = base(model).eval()
    assert loss(policy, Start(policy), example(0, ())) == pytest.approx(0.0, abs=1e-6)


def test_the_student_comes_to_answer_as_the_teacher_did(model: Path, tmp_path: Path) -> None:
    """The teacher is the policy of the start: what it says does not move with the student."""
    made = job(model, tmp_path)
    curve = run(made, EXAMPLES)
    assert curve[-1].loss < 0.05 * curve[0].loss
    before, after = base(model).eval(), attach_adapter(base(model), made.out).eval()
    for row in EXAMPLES:
        bare = tuple(row.ids[: -len(ANSWER)])
        teacher = predicted(before, tuple(row.taught))
        near = (predicted(after, bare) - teacher).abs().sum(-1).mean()
        assert near < 0.3 * (predicted(before, bare) - teacher).abs().sum(-1).mean()


def test_a_start_gives_back_the_update_and_then_the_present_one(model: Path) -> None:
    policy = new_adapter(base(model), SETTINGS, seed=0).train()
    start = Start(policy)
    moved = next(p for n, p in policy.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        moved.add_(1.0)
    with start.restored(policy):
        assert not moved.any() and not policy.training
    assert (moved == 1).all() and policy.training


def test_a_continued_adapter_teaches_as_it_was(model: Path, tmp_path: Path) -> None:
    """Not as the base: the teacher of a second iteration has learned the first."""
    first = job(model, tmp_path / "first")
    run(first, EXAMPLES)
    policy = continue_adapter(base(model), first.out).eval()
    learned = loss(policy, Start(policy), *EXAMPLES)
    bare = base(model).eval()
    assert learned != pytest.approx(loss(bare, Start(bare), *EXAMPLES), rel=0.05)


def test_a_stopped_training_goes_on_with_the_same_teacher(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy of the start, not that of the checkpoint: the bytes are those of one run."""
    monkeypatch.setattr("models.training.loop.CHECKPOINT_STEPS", 2)
    short = SETTINGS.model_copy(update={"epochs": 6})
    whole, stopped = (job(model, tmp_path / name, settings=short) for name in ("a", "b"))
    curve, done = run(whole, EXAMPLES), list[int]()

    def stop(step: int) -> None:
        done.append(step)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, EXAMPLES, stop)
    assert run(stopped, EXAMPLES, done.append) == curve
    assert done == [1] * 5 + [4, 1, 1]  # the checkpoint's four steps are announced at once
    name = "adapter_model.safetensors"
    assert (stopped.out / name).read_bytes() == (whole.out / name).read_bytes()
