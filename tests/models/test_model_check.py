"""Model directories as others leave them: opened without being loaded, and refused in one message."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_model import build_chat_model
from command import staple

from constitutions.errors import UserError
from models.checkpoints import bounded
from models.checkpoints import check as model_check
from models.checkpoints.architecture import compare
from models.checkpoints.check import check_directory, examine
from models.checkpoints.headers import check_listing, read_tensors
from models.policy import PolicySettings

SETTINGS = PolicySettings(quantization="none", dtype="float32", device="cpu")
END = "<|im_end|>"
SAID = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model") / "whole", "qwen2")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def config(**values: Any) -> Callable[[Path], object]:
    return lambda model: change(model / "config.json", **values)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def template(content: str) -> Callable[[Path], object]:
    return text("chat_template.jinja", content)


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Another header before the same bytes of weights."""

    def apply(model: Path) -> None:
        file = model / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        told = json.loads(data[8 : 8 + length])
        edit(told)
        said = json.dumps(told).encode()
        file.write_bytes(struct.pack("<Q", len(said)) + said + data[8 + length :])

    return apply


def weights(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Other tensors, in a whole file."""

    def apply(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return apply


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def index(shard: str) -> Callable[[Path], object]:
    """The weights in shards, one tensor of which is said to be in `shard`."""

    def apply(model: Path) -> None:
        names = list(read_tensors(model))
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        places = dict.fromkeys(names, "model-1.safetensors") | {names[0]: shard}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return apply


def only(*names: str) -> Callable[[Path], object]:
    """Files of other kinds in place of the weights."""

    def apply(model: Path) -> None:
        (model / "model.safetensors").unlink()
        for name in names:
            (model / name).write_text("{}")

    return apply


def added_tokens(*names: str) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
        tokenizer.save_pretrained(model)

    return apply


def pipe(name: str) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return apply


def link(name: str, to: str) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(to)

    return apply


def q(layer: str = "0") -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def twice(data: bytes) -> bytes:
    """The weights with a header that gives one tensor's entry twice."""
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    told = json.dumps(entries)[:-1] + f", {json.dumps(q())}: {json.dumps(entries[q()])}}}"
    return struct.pack("<Q", len(told)) + told.encode() + data[8 + length :]


def first(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = told[q()]
    return found


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    # files
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), "holds an adapter"),
    "pickled": (only("pytorch_model.bin"), "pickled weights"),
    "no weights": (only(), "lacks safetensors weights"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "lacks a tokenizer"),
    "weights are a pipe": (pipe("model.safetensors"), "is a pipe or a device"),
    "template is a pipe": (pipe("chat_template.jinja"), "is a pipe or a device"),
    "an endless device": (link("tokenizer_config.json", "/dev/zero"), "is a pipe or a device"),
    "a link to nothing": (link("generation_config.json", "gone"), "cannot be read"),
    "a huge configuration": (lambda m: os.truncate(m / "config.json", 1 << 33), "8,192 MiB"),
    # headers
    "empty weights": (raw(lambda data: b""), "is not a whole safetensors file"),
    "cut weights": (raw(lambda data: data[:-100]), "is not a whole safetensors file"),
    "cut header": (raw(lambda data: data[:200]), "is not a whole safetensors file"),
    "more bytes": (raw(lambda data: data + b"0"), "is not a whole safetensors file"),
    "endless header": (raw(lambda d: b"\xff" * 8 + d[8:]), "its header has 18,446,744"),
    "no JSON": (raw(lambda data: data[:8] + b"}" + data[9:]), "invalid JSON in header"),
    "deep JSON": (raw(lambda d: struct.pack("<Q", 200_000) + b"[" * 200_000), "invalid JSON in header"),
    "negative place": (header(lambda t: first(t).update(data_offsets=[-4, 4])), "integer `-4`"),
    "no shape": (header(lambda t: first(t).pop("shape")), "missing field `shape`"),
    "overlapping": (header(lambda t: first(t).update(data_offsets=t[q("1")]["data_offsets"])), "not a whole safetensors file"),
    "another size": (header(lambda t: first(t).update(shape=[64, 65])), "invalid shape, data type, or offset"),
    "unknown numbers": (header(lambda t: first(t).update(dtype="Q7")), "unknown variant `Q7`"),
    "a tensor twice": (raw(twice), f"the key '{q()}' occurs twice"),
    "no object": (header(lambda t: t.update({q(): 7})), "invalid type: integer `7`"),
    # shards
    "shard elsewhere": (index("../model-1.safetensors"), "as a file of weights"),
    "shard missing": (index("model-2.safetensors"), "model-2.safetensors is missing"),
    "index is a list": (lambda m: (only()(m), text("model.safetensors.index.json", "[]")(m)), "holds a list"),
    # tensors
    "tensor missing": (weights(lambda t: t.pop(q())), rf"lack 1 tensors \({q()}\)"),
    "tensor unknown": (weights(lambda t: t.update(extra=t[q()].clone())), r"does not know \(extra\)"),
    "tensor reshaped": (weights(lambda t: t.update({q(): t[q()].T[:32].contiguous()})), "is 32x64, not 64x64"),
    "fewer layers": (config(num_hidden_layers=1, layer_types=["full_attention"]), "does not know"),
    "more layers": (config(num_hidden_layers=9, layer_types=None), "lack 84 tensors"),
    # configuration
    "a list": (text("config.json", "[]"), "holds a list"),
    "cut configuration": (text("config.json", '{"a":'), "cannot be read as JSON"),
    "deep configuration": (text("config.json", "[" * 100_000), "nested too deeply"),
    "no type": (text("config.json", "{}"), "no configuration that transformers knows"),
    "unknown type": (config(model_type="hal9000"), "no configuration that transformers knows"),
    "own code": (config(model_type="hal9000", auto_map={"AutoConfig": "x.Y"}), "its own code"),
    "no causal model": (config(model_type="t5"), "describes a t5 model"),
    "a classifier": (config(architectures=["Qwen2ForSequenceClassification"]), "ForSequenceCl"),
    "negative size": (config(hidden_size=-64), "config.json"),
    "a size is a text": (config(hidden_size="wide"), "config.json"),
    "weights elsewhere": (config(transformers_weights="/etc/passwd"), "weights of its own"),
    "end out of range": (config(eos_token_id=10**6), "eos_token_id is 1000000"),
    "generation is a list": (text("generation_config.json", "[]"), "holds a list"),
    "ends out of range": (text("generation_config.json", '{"eos_token_id": [1, 99999]}'), "99999"),
    # tokens and templates
    "broken tokenizer": (text("tokenizer.json", '{"version": 1'), "tokenizer cannot be loaded"),
    "tokenizer is a list": (text("tokenizer.json", "[]"), "tokenizer cannot be loaded"),
    "broken tokenizer_config": (text("tokenizer_config.json", "{"), "tokenizer cannot be loaded"),
    "tokens without rows": (added_tokens("<|call|>", "<|told|>"), r"beyond them: '<\|call\|>' \(\d+\), '<\|told"),
    "no template": (lambda m: (m / "chat_template.jinja").unlink(), "no chat template"),
    "template is no Jinja": (template("{% for %}"), "the chat template refuses it"),
    "template swells": (template("{{ 'word ' * 1000000 }}"), "writes 5,000,000 characters"),
    "template drops the answer": (template("{% for m in messages %}{{ m.role }}{% endfor %}" + ASK), "template"),
}  # fmt: skip


def looked_into(model: Path) -> str:
    """As `check_directory` does, without the child."""
    check_listing(model)
    return examine(model, SETTINGS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_directory_is_refused_in_one_message(model: Path, fault: str) -> None:
    damage, said = FAULTS[fault]
    damage(model)
    with pytest.raises(UserError, match=said) as told:
        looked_into(model)
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 1500


def test_a_whole_directory_is_named(model: Path, whole: Path) -> None:
    told = "Qwen2ForCausalLM, 102,016 parameters, turns end with '<|im_end|>'"
    assert examine(whole, SETTINGS) == told
    index("model-1.safetensors")(model)
    assert examine(model, SETTINGS) == told


def test_buffers_of_old_checkpoints_and_placeholders_for_images_are_let_through(
    model: Path,
) -> None:
    import torch

    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "mtp.fc.weight": torch.ones(2)}  # fmt: skip
    weights(lambda tensors: tensors.update(old))(model)
    added_tokens("<image_soft_token>")(model)
    assert "Qwen2ForCausalLM" in examine(model, SETTINGS)


def test_a_reward_model_is_held_against_its_own_architecture(model: Path, whole: Path) -> None:
    import torch

    with pytest.raises(UserError, match=r"lack 1 tensors \(score\.weight\)"):
        examine(whole, SETTINGS, "reward")
    change(model / "config.json", num_labels=1, architectures=["Qwen2ForSequenceClassification"])
    weights(lambda tensors: tensors.update({"score.weight": torch.ones(1, 64)}))(model)
    assert examine(model, SETTINGS, "reward").startswith("Qwen2ForSequenceClassification, ")
    with pytest.raises(UserError, match="describes Qwen2ForSequenceClassification"):
        examine(model, SETTINGS, "sampled")


def test_a_hubs_model_is_opened_where_it_is_whole_in_the_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "cached_config", lambda settings: model / "config.json")
    named = PolicySettings(model="owner/model")
    assert model_check.located(named) == model
    index("model-2.safetensors")(model)
    assert model_check.located(named) is None, "a shard is yet to come"
    monkeypatch.setattr(model_check, "cached_config", lambda settings: None)
    assert model_check.located(named) is None


def test_a_checkpoint_that_is_quantised_is_not_quantised_again(model: Path) -> None:
    config(quantization_config={"quant_method": "gptq", "bits": 4})(model)
    with pytest.raises(UserError, match=r"quantised already \(gptq\)"):
        examine(model, SETTINGS.model_copy(update={"quantization": "nf4"}))


def test_a_model_is_not_made_up_when_it_is_loaded(model: Path) -> None:
    """The last line of defence, for a hub's model that came after the checks."""
    from models.training.bases import load_base

    weights(lambda tensors: tensors.pop(q()))(model)
    with pytest.raises(UserError, match="lack 1 tensors"):
        load_base(model, quantization="none", dtype="float32", device="cpu")


CHECK = """
import resource, sys
from pathlib import Path
from constitutions.errors import UserError
from models.checkpoints.check import check_directory
from models.policy import PolicySettings

settings = PolicySettings(quantization="none", dtype="float32", device="cpu")
try:
    check_directory(Path(sys.argv[1]), settings, "trained")
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def check_alone(model: Path) -> tuple[str, int]:
    """The message of a check in a new process, and the peak of that one's child, in KiB.

    Linux counts what a process holds when it starts a child as the child's own memory, so a worker
    of the tests, which may hold gigabytes, cannot measure one.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(model)], capture_output=True, text=True, check=True
    )
    *message, child = done.stdout.splitlines()
    return "\n".join(message), int(child)


def test_a_template_that_loops_is_ended(model: Path) -> None:
    """By its processor time, in a child: the step is named, and the caller goes on."""
    template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")(
        model
    )
    message, child = check_alone(model)
    assert message.startswith(f"model directory {model}: ")
    assert "rendering the chat template takes more than 8 s" in message
    assert child < 2_000_000


def test_a_template_that_makes_gigabytes_is_ended(model: Path) -> None:
    template("{% for m in messages %}{{ 'word ' * 600000000 }}{% endfor %}")(model)
    message, child = check_alone(model)
    assert "the chat template takes more than 1,600 MiB of memory" in message
    assert child < 2_000_000


def test_what_was_found_good_is_remembered_and_a_change_is_seen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def here(module: str, request: Any) -> bounded.Ended:
        asked.append(request)
        return bounded.Ended({"found": f"answer {len(asked)}"})

    monkeypatch.setattr(model_check, "ask", here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert check_directory(model, SETTINGS, "trained") == "answer 1"
    assert check_directory(model, SETTINGS, "trained") == "answer 1"
    assert check_directory(model, SETTINGS, "sampled") == "answer 1"
    assert check_directory(model, SETTINGS, "reward") == "answer 2"
    raw(lambda data: data[:-100])(model)
    assert check_directory(model, SETTINGS, "trained") == "answer 3"
    template(SAID)(model)
    assert check_directory(model, SETTINGS, "trained") == "answer 4"


def test_a_hub_sized_directory_takes_seconds(model: Path) -> None:
    """8B parameters in four sparse shards, as published: nothing of the weights is read."""
    change(
        model / "config.json",
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, layer_types=None,
    )  # fmt: skip
    (model / "model.safetensors").unlink()
    shards = list(sparse_shards(model, dict(eight_billion())))
    assert sum(file.stat().st_size for file in shards) > 16_000_000_000
    assert sum(file.stat().st_blocks for file in shards) < 1000
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert examine(model, SETTINGS).startswith("Qwen2ForCausalLM, 8,030,457,856 parameters")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def eight_billion() -> Iterator[tuple[str, list[int]]]:
    yield "model.embed_tokens.weight", [128256, 4096]
    for n in range(32):
        layer = f"model.layers.{n}."
        for name, rows in (("q", 4096), ("k", 1024), ("v", 1024)):
            yield f"{layer}self_attn.{name}_proj.weight", [rows, 4096]
            yield f"{layer}self_attn.{name}_proj.bias", [rows]
        yield f"{layer}self_attn.o_proj.weight", [4096, 4096]
        for name in ("gate", "up"):
            yield f"{layer}mlp.{name}_proj.weight", [14336, 4096]
        yield f"{layer}mlp.down_proj.weight", [4096, 14336]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", [4096]
    yield "model.norm.weight", [4096]
    yield "lm_head.weight", [128256, 4096]


def sparse_shards(model: Path, shapes: dict[str, list[int]]) -> Iterator[Path]:
    """bfloat16 tensors without bytes on the disk, in four files and an index."""
    names = list(shapes)
    places = {}
    for number in range(4):
        file = model / f"model-{number}.safetensors"
        told, end = {}, 0
        for name in names[number::4]:
            begin, end = end, end + 2 * shapes[name][0] * (shapes[name] + [1])[1]
            told[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            places[name] = file.name
        said = json.dumps(told).encode()
        file.write_bytes(struct.pack("<Q", len(said)) + said)
        os.truncate(file, 8 + len(said) + end)
        yield file
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


ARCHITECTURES = (
    *("afmoe", "apertus", "arcee", "bitnet", "bloom", "codegen", "cohere2", "deepseek_v2"),
    *("deepseek_v3", "diffllama", "ernie4_5_moe", "exaone4", "falcon", "gemma3_text", "glm4_moe"),
    *("gpt2", "gpt_neox", "gpt_oss", "granitemoe", "helium", "llama4_text", "minimax", "mixtral"),
    *("mpt", "nemotron_h", "olmo3", "olmoe", "opt", "phi3", "phimoe", "qwen3_moe", "qwen3_next"),
    *("rwkv", "seed_oss", "smollm3", "starcoder2", "zamba2"),
)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_fits_its_own_checkpoint(kind: str) -> None:
    """Renamed, fused and tied as `save_pretrained` writes it; without one tensor it does not fit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    from models.checkpoints.headers import Tensor

    config = AutoConfig.for_model(kind)
    name = next(n for n in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(config, n))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    setattr(config, name, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    written = revert_weight_conversion(model, model.state_dict())
    held = {
        key: Tensor("F32", tuple(tensor.shape), "")
        for key, tensor in written.items()
        if key not in (model.all_tied_weights_keys or {})
    }
    assert compare(config, held, "sampled")[0] == type(model).__name__
    del held[next(key for key in held if "layers.1." in key or "h.1." in key or "blocks.1." in key)]
    with pytest.raises(UserError, match=r"they lack|another shape"):
        compare(config, held, "sampled")


# By the command line -----------------------------------------------------------------------------


@pytest.fixture
def validate(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], tuple[int, str]]:
    rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(model: Path) -> tuple[int, str]:
        ran = staple(
            capsys, "validate", "planted",
            "--set", f"policy={{model: {model}, quantization: none, dtype: float32, device: cpu}}",
            "--set", "prompts={sources: [{path: rows.jsonl}], first: 2, later: 2, held_out: 2}",
            "--set", "evaluate.judge=similarity",
        )  # fmt: skip
        return ran.code, ran.out + ran.err

    return run


@pytest.mark.parametrize(
    "fault", ["a list", "cut weights", "tokens without rows", "template is a pipe"]
)
def test_validate_refuses_it_without_a_traceback(
    model: Path, validate: Callable[[Path], tuple[int, str]], fault: str
) -> None:
    damage, said = FAULTS[fault]
    damage(model)
    code, told = validate(model)
    assert code == 2
    assert "Traceback" not in told
    shown = " ".join(told.split())
    assert said.split(r"\(")[0].replace("'<", "").split("beyond")[0] in shown


def test_validate_opens_the_model(
    whole: Path, validate: Callable[[Path], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole.parent / "cache"))  # as on another machine
    code, told = validate(whole)
    assert (code, "Qwen2ForCausalLM, 102,016 parameters" in " ".join(told.split())) == (0, True)
