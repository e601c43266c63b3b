"""Training beside TRL's, in several processes, killed and resumed, and of all weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_job
import torch
from chat_model import build_chat_model
from safetensors.torch import load_file

from constitutions.errors import UserError
from models.training.adapter import AdapterSettings
from models.training.bases import load_base
from models.training.encoding import EncodedExample
from models.training.job import run, write_job
from models.training.loop import Likelihood, share, train, weighted_loss
from models.training.mixed_precision import FLOAT32_ATTENTION
from models.training.updates import attach_adapter, new_adapter, trainable

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
SETTINGS = AdapterSettings(
    lora_rank=8, lora_alpha=16, learning_rate=1e-2, batch_size=4, micro_batch_tokens=40
)


def example(start: int, length: int, weight: float = 1.0) -> EncodedExample:
    trained = tuple(i >= length // 2 for i in range(length))
    return EncodedExample(tuple(range(start, start + length)), trained, weight)


EXAMPLES = tuple(example(40 + 8 * i, 9 + 5 * i % 13, 0.5 + i / 8) for i in range(10))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "llama")


def base(model: Path, quantization: Any = "none") -> Any:
    return load_base(model, quantization=quantization, dtype="float32", device="cpu")[0]


job = partial(small_job.job, settings=SETTINGS)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*.safetensors")
    return dict(load_file(file))


def loss(policy: Any, *examples: EncodedExample) -> float:
    with torch.no_grad():
        return weighted_loss(policy.eval(), Likelihood.collate(examples)).item()


# Beside TRL --------------------------------------------------------------------------------


def test_the_loss_is_trls_completion_only_loss_on_the_same_rows(
    model: Path, tmp_path: Path
) -> None:
    import trl
    from datasets import Dataset

    _, tokenizer = load_base(model, quantization="none", dtype="float32", device="cpu")
    rows = [
        {"prompt": "What is the capital", "completion": " of France? Restart the printer."},
        {"prompt": "Cite a source where a number is given; say so", "completion": " when."},
        {"prompt": "How", "completion": " do I make bread at home without an oven?"},
    ]
    trainer = trl.SFTTrainer(  # type: ignore[attr-defined]
        base(model),
        trl.SFTConfig(  # type: ignore[attr-defined]
            output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none",
            gradient_checkpointing=False, per_device_train_batch_size=3,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model, dict(batch)).item()

    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        examples.append(
            EncodedExample(tuple(ids), tuple(i >= len(prompt) for i in range(len(ids))))
        )
    ours = loss(base(model), *examples) / sum(sum(e.trained) for e in examples)
    assert ours == pytest.approx(theirs, rel=1e-5)


# Arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_multiplies_in_the_dtype_of_the_policy(
    model: Path, tmp_path: Path, dtype: Any
) -> None:
    """The adapter's weights are in float32 all the same, and so is attention, which is faster."""
    policy = trainable(
        load_base(model, quantization="none", dtype=dtype, device="cpu")[0], SETTINGS, 0, None
    )
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    seen, attention = set[torch.dtype](), set[str]()

    def look(module: Any, given: Any, found: Any) -> None:
        seen.update((given[0].dtype, found.dtype))
        attention.add(policy.config._attn_implementation)

    for name, module in policy.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(look)
    curve = train(
        policy,
        EXAMPLES,
        SETTINGS.model_copy(update={"epochs": 4}),
        objective=Likelihood(SETTINGS.micro_batch_tokens),
        seed=0,
        checkpoints=tmp_path / "checkpoints",
    )
    assert seen == {getattr(torch, dtype)}, "no input is cast"
    assert attention == {"sdpa" if dtype == "float32" else FLOAT32_ATTENTION}
    assert policy.config._attn_implementation == "sdpa"
    assert curve[-1].loss < 0.9 * curve[0].loss


# Micro-batches and processes ---------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_step_is_shared_whole_evenly_and_within_the_budget(processes: int) -> None:
    shares = share(EXAMPLES, processes, Likelihood(40))
    dealt = [e for passes in shares for rows in passes for e in rows if e.weight]
    assert sorted(dealt, key=lambda e: tuple(e.ids)) == sorted(EXAMPLES, key=lambda e: tuple(e.ids))
    assert len({len(passes) for passes in shares}) == 1
    for rows in (rows for passes in shares for rows in passes):
        assert len(rows) == 1 or len(rows) * max(len(e.ids) for e in rows) <= 40
    tokens = [sum(len(e.ids) for rows in passes for e in rows) for passes in shares]
    assert max(tokens) - min(tokens) <= max(len(e.ids) for e in EXAMPLES)


def test_two_processes_train_the_adapter_of_one(model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run(job(model, one), EXAMPLES)
    finished: list[int] = []
    both = SETTINGS.model_copy(update={"processes": 2, "gradient_checkpointing": True})
    shared = run(job(model, two, settings=both), EXAMPLES, finished.append)

    assert sum(finished) == len(shared) == len(alone) == 3  # 10 rows, 4 a step: the last has 2
    for a, b in zip(alone, shared, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-4)
        assert (b.tokens, b.learning_rate) == (a.tokens, a.learning_rate)
    expected, found = weights(one / "adapter"), weights(two / "adapter")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    assert [p.name for p in two.iterdir()] == ["adapter"], "nothing is left"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_that_was_freed_goes_back_to_the_system(model: Path, tmp_path: Path) -> None:
    blocks = [b"x" * (1 << 16) for _ in range(9600)]  # 600 MB, too small for pages of their own
    above = b"x" * (1 << 16)  # while it stands, the heap does not shrink by itself
    del blocks
    process = psutil.Process()
    before = process.memory_info().rss
    run(job(model, tmp_path), EXAMPLES[:4])
    assert process.memory_info().rss < before - (300 << 20)
    assert len(above) == 1 << 16


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
def test_a_cpus_training_keeps_few_compiled_primitives() -> None:
    """Batches of 300 lengths, with the command line's environment and with oneDNN's own."""
    code = (
        "from flows.commands.cli import _environment\n"
        "_environment()\n"
        "import psutil, torch\n"
        "torch.set_num_threads(1)\n"
        "layer = torch.nn.Linear(576, 576, dtype=torch.bfloat16)\n"
        "for length in (400, *range(100, 400)):\n"
        "    layer(torch.zeros(length, 576, dtype=torch.bfloat16)).sum().backward()\n"
        "    before = psutil.Process().memory_info().rss if length == 400 else before\n"
        "print(psutil.Process().memory_info().rss - before)"
    )

    def grown(**given: str) -> int:
        kept = {name: value for name, value in os.environ.items() if name != CAPACITY}
        kept["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # newer processors have other primitives
        return int(subprocess.check_output([sys.executable, "-c", code], env={**kept, **given}))

    assert grown() < 0.9 * grown(**{CAPACITY: "1024"})


def test_an_error_in_one_of_several_processes_is_one_message(model: Path, tmp_path: Path) -> None:
    both = SETTINGS.model_copy(update={"processes": 2})
    broken = [EncodedExample(e.ids, e.trained, float("nan")) for e in EXAMPLES]
    with pytest.raises(UserError, match="training diverged: the loss of step 1") as error:
        run(job(model, tmp_path, settings=both), broken)
    assert (tmp_path / "checkpoints.job" / "log").is_file(), "it can be looked at"
    assert "Traceback" not in str(error.value) and "lower the learning rate" in str(error.value)
    assert not (tmp_path / "adapter").exists()

    run(job(model, tmp_path), EXAMPLES)  # one process takes over
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# Killed and resumed ------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from models.training import loop as training
from models.training.job import read_job, run

training.CHECKPOINT_STEPS = 2
done = []

def told(_):
    done.append(1)
    print(len(done), flush=True)
    time.sleep(60 * (len(done) == 7))  # the kill comes here, after the checkpoint of step 6

run(*read_job(Path(sys.argv[1])), told)
"""


@pytest.mark.parametrize(
    ("quantization", "damage"), [("none", False), ("nf4", False), ("none", True)]
)
def test_kill_9_and_resume_give_the_bytes_of_one_never_killed(
    model: Path,
    tmp_path: Path,
    quantization: str,
    damage: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {
        "policy": small_job.POLICY.model_copy(update={"quantization": quantization}),
        "settings": SETTINGS.model_copy(update={"epochs": 4, "lora_dropout": 0.1}),
    }
    whole, killed = tmp_path / "whole", job(model, tmp_path / "killed", **changes)
    monkeypatch.setattr("models.training.loop.CHECKPOINT_STEPS", 2)
    torch.set_num_threads(1)
    curve = run(job(model, whole, **changes), EXAMPLES)

    write_job(tmp_path / "job", killed, EXAMPLES)
    _kill_at(7, tmp_path / "job")
    assert killed.checkpoints.exists() and not killed.out.exists()
    if damage:
        (state,) = killed.checkpoints.glob("checkpoint-*/optimizer.pt")
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    finished: list[int] = []
    assert run(killed, EXAMPLES, finished.append) == curve
    # of 10 steps it goes on at the third checkpoint
    assert finished == [1] * 10 if damage else finished == [6, 1, 1, 1, 1]
    assert ("damaged; the training goes on at the first step" in capsys.readouterr().err) == damage
    for name in ("adapter_model.safetensors", "provenance.json"):
        assert _sha256(killed.out / name) == _sha256(whole / "adapter" / name)


def _kill_at(step: int, folder: Path) -> None:
    """Start the training of a job and kill it -9 when it has finished a step."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == step:
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_several_processes_end_with_the_one_that_started_them(model: Path, tmp_path: Path) -> None:
    """A second attempt must not meet the first one's processes in its checkpoints."""
    write_job(tmp_path / "job", job(model, tmp_path), EXAMPLES)
    starter = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    worker = subprocess.Popen(
        [sys.executable, "-m", "models.training.worker", str(tmp_path / "job"), str(starter.pid)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RANK": "0"},
    )
    starter.kill()
    starter.wait()
    assert worker.wait(timeout=600) == 1
    assert not (tmp_path / "adapter").exists()


# All weights -------------------------------------------------------------------------------


def test_all_weights_are_trained_sampled_from_and_trained_further(
    model: Path, tmp_path: Path
) -> None:
    full = SETTINGS.model_copy(update={"update": "full", "learning_rate": 2e-3, "epochs": 4})
    first = job(model, tmp_path / "1", settings=full)
    curve = run(first, EXAMPLES)
    assert curve[-1].loss < 0.8 * curve[0].loss
    assert json.loads((first.out / "provenance.json").read_text())["kind"] == "full"
    assert (first.out / "tokenizer.json").is_file() and (first.out / "config.json").is_file()

    untrained, trained = base(model), attach_adapter(base(model), first.out)
    assert loss(trained, *EXAMPLES) < 0.8 * loss(untrained, *EXAMPLES)
    changed = {
        n for n, p in trained.named_parameters() if not torch.equal(p, untrained.state_dict()[n])
    }
    assert changed == {name for name, _ in untrained.named_parameters()}, (
        "embeddings and norms, too"
    )
    said = trained.generate(torch.arange(40, 60)[None], max_new_tokens=4)  # type: ignore[operator]
    assert said.shape == (1, 24)

    second = run(job(model, tmp_path / "2", settings=full, previous=first.out), EXAMPLES)
    assert second[0].loss < 0.9 * curve[0].loss
    with pytest.raises(UserError, match="did not train with update = lora"):
        run(job(model, tmp_path / "3", previous=first.out), EXAMPLES)


def test_weights_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    full = SETTINGS.model_copy(update={"update": "full"})
    done = job(model, tmp_path, settings=full)
    run(done, EXAMPLES[:4])
    file = done.out / "model.safetensors"
    kept = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({n: v for n, v in kept.items() if n != name}, file)
    with pytest.raises(UserError, match=f"missing: {name}"):
        attach_adapter(base(model), done.out)
    save_file(kept | {name: kept[name][:1].clone()}, file)
    with pytest.raises(UserError, match=f"do not fit the base: {name}"):
        attach_adapter(base(model), done.out)


def test_an_adapter_with_pickled_weights_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    from models.training.updates import save_adapter

    save_adapter(new_adapter(base(model), SETTINGS, 0), tmp_path / "a", data_digest="d")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickled weights are not loaded: adapter_model\.bin"):
        attach_adapter(base(model), tmp_path / "a")


def test_provenance_names_the_commit_of_a_hub_model(model: Path, tmp_path: Path) -> None:
    import shutil

    from models.training.updates import save_adapter

    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(model, snapshot)
    save_adapter(new_adapter(base(snapshot), SETTINGS, 0), tmp_path / "a", data_digest="d")
    record = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert record["revision"] == "0123abcd" and record["kind"] == "lora"
