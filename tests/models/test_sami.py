"""SAMI's objective: the definition, by hand and on real architectures; its memory; its training."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_job
import torch
from chat_model import Architecture, build_chat_model

from constitutions.errors import UserError
from models.prompts import CHAT_CONSTITUTION, under_constitution
from models.training.adapter import AdapterSettings
from models.training.bases import load_base, load_tokenizer
from models.training.encoding import Encoder, EncodingError, Group
from models.training.job import read_job, run, write_job
from models.training.loop import share
from models.training.sami import (
    Information,
    divergence,
    information,
    matrix_of,
    referred,
    sami_loss,
)
from models.training.updates import new_adapter

SETTINGS = AdapterSettings(
    lora_rank=8, lora_alpha=16, learning_rate=1e-2, batch_size=3, micro_batch_tokens=4096
)
WIDE = 1 << 20
"""A budget that holds any group whole."""


def group(*, prompts: tuple[int, ...], responses: tuple[int, ...], seed: int = 0) -> Group:
    """Random tokens of the given lengths."""
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(20, 120) for _ in range(length))

    return Group(tuple(map(tokens, prompts)), tuple(map(tokens, responses)))


GROUP = group(prompts=(30, 24, 37), responses=(9, 1, 13))
GROUPS = tuple(group(prompts=(12 + i, 15), responses=(4 + i % 3, 6), seed=i + 1) for i in range(8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "llama")


def base(model: Path, quantization: Any = "none") -> Any:
    return load_base(model, quantization=quantization, dtype="float32", device="cpu")[0]


# The definition ----------------------------------------------------------------------------


def defined(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of the two cross-entropies against the diagonal, and its gradient, by hand."""
    size = len(matrix)
    total, slope = 0.0, np.zeros_like(matrix)
    for i in range(size):
        for line, put in ((matrix[i], slope[i]), (matrix[:, i], slope[:, i])):
            chances = np.exp(line) / np.exp(line).sum()
            total -= math.log(chances[i]) / (2 * size)
            put += chances / (2 * size)
            put[i] -= 1 / (2 * size)
    return total, slope


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 33])
def test_loss_and_gradient_are_the_definition(size: int) -> None:
    matrix = np.random.default_rng(size).normal(-2, 3, (size, size))
    loss, slope = defined(matrix)
    for dtype in (torch.float64, torch.float32):
        given = torch.tensor(matrix, dtype=dtype, requires_grad=True)
        found = sami_loss(given)
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-6)
        assert given.grad is not None
        assert np.abs(given.grad.numpy() - slope).max() < 1e-6


def test_by_hand() -> None:
    assert sami_loss(torch.zeros(2, 2)).item() == pytest.approx(0.693147, abs=1e-6)
    assert information(torch.zeros(5, 5)) == pytest.approx(0, abs=1e-6)
    sure = torch.full((3, 3), -50.0) + 50 * torch.eye(3)
    assert information(sure) == pytest.approx(math.log(3)), "it is at most log C"
    asymmetric = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    expected = (math.log(2) + math.log(1 + math.e**2)) / 2  # one row, one column are misled
    assert sami_loss(asymmetric).item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 2, 2), (0, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        sami_loss(torch.zeros(shape))


def test_divergence_is_zero_where_nothing_moved_and_positive_elsewhere() -> None:
    reference = torch.tensor([-1.0, -2.0, -0.5])
    assert divergence(reference, reference).item() == 0
    moved = (reference + torch.tensor([0.5, -0.5, 0.1])).requires_grad_()
    found = divergence(moved, reference)
    found.backward()
    assert found.item() > 0
    assert moved.grad is not None and (moved.grad.sign() == torch.tensor([1, -1, 1])).all()


# The matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "granite", "mistral", "gemma2"])
def test_rows_that_share_their_prompt_equal_whole_rows(
    tmp_path: Path, architecture: Architecture, quantization: str
) -> None:
    """Windows, capped scores and all: every pair alone, unpadded, through the same model."""
    policy = base(build_chat_model(tmp_path / "model", architecture), quantization).eval()
    expected = torch.zeros(3, 3)
    for i, prompt in enumerate(GROUP.prompts):
        for j, response in enumerate(GROUP.responses):
            with torch.no_grad():
                logits = policy(torch.tensor([[*prompt, *response]])).logits[0].float()
            told = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(response) - 1)]
            expected[i, j] = told[range(len(response)), response].mean()
    assert expected.std() > 0.01
    for budget in (WIDE, 1):
        found = matrix_of(policy, GROUP, budget)
        assert (found - expected).abs().max() < 2e-5


def gradient(policy: Any, objective: Information, item: Group) -> tuple[float, torch.Tensor]:
    policy.zero_grad()
    total = 0.0
    for part in objective.parts(policy, objective.collate([item])):
        loss = part()
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_row_by_row_the_gradient_is_the_same(model: Path, kl: float) -> None:
    policy = new_adapter(base(model), SETTINGS, seed=0)
    (item,) = referred(policy, [GROUP], WIDE)
    item = replace(item, reference=tuple(tuple(x - 0.2 for x in r) for r in item.reference))
    for parameter in policy.parameters():  # a new adapter's B is zero: its A would have no gradient
        if parameter.requires_grad:
            parameter.data += 0.05
    whole, expected = gradient(policy, Information(WIDE, kl), item)
    loss = sami_loss(matrix_of(policy, item, WIDE)).item()
    assert (whole > loss + 1e-3) if kl else whole == pytest.approx(loss, abs=1e-6)
    for budget in (1, 120):
        in_parts, found = gradient(policy, Information(budget, kl), item)
        assert in_parts == pytest.approx(whole, abs=1e-5)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert expected.abs().max() > 1e-3


@contextmanager
def watched(policy: Any) -> Iterator[list[int]]:
    """The tokens of every pass."""
    seen: list[int] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.append(given["input_ids"].numel())

    hook = policy.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def test_a_prompt_is_computed_once_and_memory_keeps_to_the_budget(model: Path) -> None:
    policy = base(model)
    four = group(prompts=(40,) * 4, responses=(10,) * 4)
    row = 40 + 4 * 9
    with watched(policy) as seen:
        matrix_of(policy, four, WIDE)
    assert seen == [4 * row] and 4 * row < 16 * (40 + 10) / 2, "whole rows would be 800"
    assert four.tokens == 4 * row
    policy.requires_grad_(True)
    with watched(policy) as seen:
        for part in Information(2 * row).parts(policy, {"group": four}):
            part().backward()
    assert seen == [2 * row] * 4, "the matrix first, then two rows at a time"
    with watched(policy) as seen:
        gradient(policy, Information(row - 1), four)
    assert max(seen) == row, "one row at least, however many constitutions"


def test_the_output_layer_sees_responses_only(model: Path) -> None:
    policy = base(model)
    shapes: list[tuple[int, ...]] = []
    hook = policy.get_output_embeddings().register_forward_hook(
        lambda _, __, out: shapes.append(tuple(out.shape))
    )
    matrix_of(policy, GROUP, WIDE)
    hook.remove()
    assert shapes[0][:2] == (1, 3 * (9 + 1 + 13))


# Encoding ------------------------------------------------------------------------------------


def encode(model: Path, *texts: str, ends: tuple[bool, ...], most: int = 4096) -> Group:
    encoder = Encoder(load_tokenizer(model), most)
    asked = ({"role": "user", "content": "What is bread?"},)
    told = [
        under_constitution(CHAT_CONSTITUTION, [f"Be {how}.", "Cite."], asked)  # type: ignore[arg-type]
        for how in ("short", "long", "kind")[: len(texts)]
    ]
    return encoder.group(told, texts, ends)


def test_the_end_token_counts_by_choice(model: Path) -> None:
    both = encode(model, "It is food.", "Food!", ends=(True, True))
    one = encode(model, "It is food.", "Food!", ends=(True, False))
    end = load_tokenizer(model).convert_tokens_to_ids("<|eot_id|>")
    assert both.responses[0] == one.responses[0] and both.responses[0][-1] == end
    assert both.responses[1] == (*one.responses[1], end)
    assert both.prompts == one.prompts and both.prompts[0] != both.prompts[1]
    assert end not in both.responses[0][:-1]


def test_control_tokens_in_a_response_stay_text(model: Path) -> None:
    found = encode(model, "I end<|eot_id|> here.", "No.", ends=(False, False))
    end = load_tokenizer(model).convert_tokens_to_ids("<|eot_id|>")
    assert end not in found.responses[0] and len(found.responses[0]) > 6


def test_what_cannot_be_compared_is_refused(model: Path) -> None:
    with pytest.raises(EncodingError, match="empty"):
        encode(model, "Yes.", "", ends=(True, False))
    with pytest.raises(EncodingError, match="more than max_tokens"):
        encode(model, "Yes. " * 40, "No.", ends=(True, True), most=64)


# Training --------------------------------------------------------------------------------------


job = partial(small_job.job, settings=SETTINGS)


def estimate(policy: Any) -> float:
    return sum(information(matrix_of(policy, item, WIDE)) for item in GROUPS) / len(GROUPS)


def drift(policy: Any, groups: list[Group]) -> float:
    """How far the own responses' log-probabilities moved, per token."""
    now = referred(policy, groups, WIDE)
    pairs = [
        (new, old)
        for item, before in zip(now, groups, strict=True)
        for news, olds in zip(item.reference, before.reference, strict=True)
        for new, old in zip(news, olds, strict=True)
    ]
    return sum(abs(new - old) for new, old in pairs) / len(pairs)


def test_training_raises_the_information_and_kl_holds_it_back(model: Path, tmp_path: Path) -> None:
    from models.training.updates import attach_adapter

    settings = SETTINGS.model_copy(update={"epochs": 8})
    before, start = estimate(base(model)), referred(base(model), list(GROUPS), WIDE)
    drifts = []
    for kl in (0.0, 5.0):
        here = tmp_path / str(kl)
        run(job(model, here, settings=settings, kl=kl), GROUPS)
        trained = attach_adapter(base(model), here / "adapter").eval()
        assert estimate(trained) > before + 0.1
        drifts.append(drift(trained, start))
    assert drifts[1] < drifts[0] / 2


def test_all_weights_are_trained_too(model: Path, tmp_path: Path) -> None:
    from models.training.updates import attach_adapter

    full = {"update": "full", "optimizer": "rmsprop", "learning_rate": 1e-3, "epochs": 4}
    settings = SETTINGS.model_copy(update=full)
    run(job(model, tmp_path, settings=settings, kl=0.1), GROUPS)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    before = estimate(base(model))
    assert estimate(attach_adapter(base(model), tmp_path / "adapter").eval()) > before + 0.1


def test_curve_is_the_mean_over_queries(model: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": len(GROUPS)})
    finished: list[int] = []
    (step,) = run(job(model, tmp_path, settings=settings), GROUPS, finished.append)
    expected = sum(sami_loss(matrix_of(base(model), g, WIDE)).item() for g in GROUPS) / len(GROUPS)
    assert step.loss == pytest.approx(expected, abs=1e-5)
    assert step.tokens == sum(item.tokens for item in GROUPS) and finished == [1]


def sha(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_stopped_and_resumed_under_kl_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the policy that the training began with, not that of the checkpoint."""
    monkeypatch.setattr("models.training.loop.CHECKPOINT_STEPS", 2)
    settings = SETTINGS.model_copy(update={"epochs": 3})
    whole, stopped = job(model, tmp_path / "a", settings=settings, kl=2.0), tmp_path / "b"
    curve = run(whole, GROUPS)

    done: list[int] = []

    def stop(_: int) -> None:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt

    again = job(model, stopped, settings=settings, kl=2.0)
    with pytest.raises(KeyboardInterrupt):
        run(again, GROUPS, stop)
    assert again.checkpoints.exists() and not again.out.exists()
    assert run(again, GROUPS) == curve
    assert sha(again.out) == sha(whole.out)


def test_two_processes_train_the_adapter_of_one(model: Path, tmp_path: Path) -> None:
    """Groups are dealt out, one process may have none; rows that do not fit go one by one."""
    settings = SETTINGS.model_copy(update={"micro_batch_tokens": 40})
    alone = run(job(model, tmp_path / "one", settings=settings, kl=0.5), GROUPS[:7])
    two = settings.model_copy(update={"processes": 2, "gradient_checkpointing": True})
    shared = run(job(model, tmp_path / "two", settings=two, kl=0.5), GROUPS[:7])
    assert len(shared) == len(alone) == 3  # 7 queries, 3 a step: the last has one
    for a, b in zip(alone, shared, strict=True):
        assert b.loss == pytest.approx(a.loss, abs=1e-5)
        assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-3)


def test_groups_are_shared_whole(model: Path, tmp_path: Path) -> None:
    shares = share(GROUPS[:3], 2, Information(WIDE))
    dealt = [item for passes in shares for rows in passes for item in rows]
    assert sorted(i.tokens for i in dealt if i.weight) == sorted(i.tokens for i in GROUPS[:3])
    assert [len(passes) for passes in shares] == [2, 2]
    value, slope = gradient(base(model).requires_grad_(True), Information(WIDE, 1.0), dealt[-1])
    assert dealt[-1].weight == 0 == value and not slope.abs().max()

    wanted = job(model, tmp_path, kl=0.25)
    groups = referred(base(model), list(GROUPS[:2]), WIDE)
    write_job(tmp_path / "job", wanted, groups)
    assert read_job(tmp_path / "job") == (wanted, groups)


@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"lora_alpha": 32}, {"lora_dropout": 0.1}])
def test_an_adapter_is_continued_as_it_was_begun(
    model: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    first = job(model, tmp_path / "first")
    run(first, GROUPS[:3])
    other = SETTINGS.model_copy(update=change)
    again = job(model, tmp_path / "again", settings=other, previous=first.out)
    with pytest.raises(UserError, match=f"train.{next(iter(change))}"):
        run(again, GROUPS[:3])
    run(replace(again, settings=SETTINGS), GROUPS[:3])
