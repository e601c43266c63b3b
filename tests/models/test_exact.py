"""The check of the engines: what is wrong is caught, what is exact is used, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from chat_model import build_chat_model

from constitutions.errors import UserError
from models.engine import comparison, exact
from models.engine.base import Decoding, Engine, Sample
from models.engine.by_length import ByLength
from models.engine.decoding import Decoder
from models.engine.local import load_policy
from models.engine.plain import Plain
from models.engine.shared_prefix import _Call
from models.policy import PolicySettings, Request
from models.training import bases, updates
from models.training.adapter import AdapterSettings

SETTINGS = PolicySettings(dtype="float32", device="cpu", quantization="none")
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more})).eval()


def made(
    engine: Engine, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
) -> dict[tuple[int, int], Sample]:
    samples: list[Sample] = []
    engine.sample(prompts, requests, samples.append)
    return {(sample.request, sample.number): sample for sample in samples}


PROMPTS = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 13, 14, 15], [40, 41], [42, 43]]


def asked(**more: Any) -> list[Request]:
    return [Request(messages="", key=str(i), n=3, max_tokens=9 + 4 * i, **more)
            for i in range(len(PROMPTS))]  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8}, {"stop": ("17",)}])
@pytest.mark.parametrize("batching", ["padded", "equal", "single", "recomputed"])
def test_both_engines_give_the_same_samples(batching: Any, how: dict[str, Any]) -> None:
    def decoding() -> Decoding:
        return Decoding(stop=(5, 6, 7, 8), rows=5)

    shared = made(Decoder(llama(), decoding()), PROMPTS, asked(**how))
    plain = made(Plain(llama(), decoding(), batching), PROMPTS, asked(**how))
    assert shared.keys() == plain.keys() and len(shared) == 12
    for key, sample in shared.items():
        assert (plain[key].tokens, plain[key].finish) == (sample.tokens, sample.finish)
        assert plain[key].logprob == pytest.approx(sample.logprob, abs=1e-3)
    assert len({tuple(sample.tokens) for sample in shared.values()}) > 8


def test_both_engines_score_alike_and_have_the_same_states() -> None:
    pairs = [(p, [20 + i, 30, 31][: i + 1]) for i, p in enumerate(PROMPTS[:3])]
    shared, plain = Decoder(llama()), Plain(llama())
    for ours, theirs in zip(shared.score(pairs), plain.score(pairs), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert shared.states(PROMPTS) == pytest.approx(plain.states(PROMPTS), abs=1e-3)


# What is caught ------------------------------------------------------------------------------


def test_settings_of_a_models_own_generation_change_no_sample() -> None:
    model = llama()
    model.generation_config.update(repetition_penalty=9.0, suppress_tokens=list(range(200)))
    expected = made(Plain(llama()), PROMPTS, asked())
    found = made(Plain(model), PROMPTS, asked())
    assert [s.tokens for s in found.values()] == [s.tokens for s in expected.values()]
    assert model.generation_config.repetition_penalty == 9.0


def broken(change: str) -> Callable[..., torch.Tensor]:
    """An attention with a fault in its last layer."""
    right = _Call.attend

    def attend(
        self: _Call, layer: int, query: Any, scaling: float, window: Any, softcap: Any
    ) -> Any:
        if layer == 1 and change == "scaling":
            scaling *= 1.1
        if layer == 1 and change == "window":
            window = 8
        if layer == 1 and change == "no prefix":
            keys, values = self.cache.prefix[layer]
            self.cache.prefix[layer] = (keys, torch.zeros_like(values))
        if change == "exception":
            raise RuntimeError("no such kernel\nand so on")
        return right(self, layer, query, scaling, window, softcap)

    return attend


@pytest.mark.parametrize("change", ["scaling", "window", "no prefix", "exception"])
def test_an_engine_that_is_wrong_is_not_used(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Call, "attend", broken(change))
    verdict = exact.find(llama(), "auto")
    assert verdict.way == "padded"
    assert ("RuntimeError: no such kernel" if change == "exception" else "differ by") in verdict.why
    with pytest.raises(UserError, match=r"cannot be sampled from exactly.*policy.engine at auto"):
        exact.find(llama(), "shared")


def test_layers_that_drop_what_the_engine_hands_them_are_caught() -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    verdict = exact.find(StableLmForCausalLM(StableLmConfig(**SHAPE)).eval(), "auto")
    assert verdict.way == "padded" and "reach 0 of 2 layers" in verdict.why


def test_sixteen_bits_are_held_to_what_rounding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact.find(llama().bfloat16(), "shared").way == "shared"
    monkeypatch.setattr(_Call, "attend", broken("no prefix"))
    assert exact.find(llama().bfloat16(), "auto").way == "padded"


def test_a_window_that_is_not_told_is_caught_before_a_text_is_that_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    windows: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 0,
    }
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **windows)).eval()
    monkeypatch.setattr(comparison, "AFFORDABLE", {})
    assert exact.find(model, "auto").way == "shared"  # its layers tell the window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    verdict = exact.find(model, "auto")
    assert verdict.way == "padded"
    assert verdict.why == "layer 0 does not pass its window of 4,096 tokens"


# Length-dependent RoPE -------------------------------------------------------------------------


def test_rope_that_depends_on_the_longest_text_gives_each_what_it_gets_alone() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 32, "short_factor": [1.0] * 8,
            "long_factor": [float(2 + i) for i in range(8)]}  # fmt: skip
    model = llama(rope_parameters=rope)
    prompts = [list(range(20, 20 + length)) for length in (6, 20, 26, 40, 47, 47)]
    requests = [Request(messages="", key=str(i), n=2, max_tokens=6) for i in range(6)]
    alone = [made(Plain(model, batching="single"), [p], [r])[0, 1].tokens
             for p, r in zip(prompts, requests, strict=True)]  # fmt: skip
    engine = exact.open_engine(model)
    assert isinstance(engine, ByLength) and engine.limit == 32
    together = made(engine, prompts, requests)
    assert [together[i, 1].tokens for i in range(6)] == alone
    scored = list(engine.score([(p, [5, 6]) for p in prompts]))
    again = [next(iter(engine.long.score([(p, [5, 6])]))) for p in prompts]
    assert [x for some in scored for x in some] == pytest.approx(
        [x for some in again for x in some], abs=1e-3
    )


# In use ----------------------------------------------------------------------------------------


def test_a_model_without_attention_is_sampled_by_the_plain_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / "home"))
    directory = build_chat_model(tmp_path / "model", "llama")
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "vocab_size": 600,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 1,
    }
    MambaForCausalLM(MambaConfig(**tiny, initializer_range=0.3)).save_pretrained(directory)
    asking = Request(messages="Why?", key="k", n=2, temperature=0, max_tokens=8)
    monkeypatch.setattr(exact, "_reported", set())
    policy = load_policy(SETTINGS, directory, None)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "samples come from" in x]
    assert "MambaForCausalLM" in line and "3 times slower" in line
    ((first, second),) = policy.generate([asking])
    ids = torch.tensor([policy.tokenizer("Why?", add_special_tokens=False)["input_ids"]])
    expected = policy.model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]  # type: ignore[operator]
    assert first.text == second.text == cast(str, policy.tokenizer.decode(expected)).strip()
    with pytest.raises(UserError, match=r"MambaForCausalLM.*no attention"):
        load_policy(SETTINGS.model_copy(update={"engine": "shared"}), directory, None)


def test_what_was_found_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / "home"))
    directory = build_chat_model(tmp_path / "model", "llama")
    find, tried = exact.find, []

    def counted(model: Any, choice: Any, special: Any = ()) -> exact.EngineChoice:
        tried.append(choice)
        return find(model, choice, special)

    monkeypatch.setattr(exact, "find", counted)
    load_policy(SETTINGS, directory, None)
    load_policy(SETTINGS, directory, None)
    assert tried == ["auto"]
    (memory,) = (tmp_path / "home" / "engines").iterdir()
    assert memory.read_text().endswith("\nshared\n")
    for folder in memory.parents[:2]:
        assert folder.stat().st_mode & 0o777 == 0o700
    for damaged in (b"", b"share", b"fast\n", b"\x00\xff"):
        memory.write_bytes(damaged)
        load_policy(SETTINGS, directory, None)
    assert len(tried) == 5
    load_policy(SETTINGS.model_copy(update={"engine": "plain"}), directory, None)
    other = build_chat_model(tmp_path / "other", "llama", seed=1)
    load_policy(SETTINGS, other, None)
    monkeypatch.setattr(exact, "_version", lambda: "another")
    load_policy(SETTINGS, directory, None)
    assert tried[5:] == ["plain", "auto", "auto"]


def test_an_adapter_is_tried_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / "home"))
    directory = build_chat_model(tmp_path / "model", "llama")
    base, _ = bases.load_base(directory, quantization="none", dtype="float32", device="cpu")
    model = updates.new_adapter(base, AdapterSettings(lora_rank=4), seed=0)
    updates.save_adapter(model, tmp_path / "adapter", data_digest="none")
    policy = load_policy(SETTINGS, directory, None)
    tried: list[Any] = []

    def wrong_with_adapters(model: Any, way: str, special: Any) -> str:
        tried.append(hasattr(model, "peft_config"))
        return "it drops the adapter" if way == "shared" and tried[-1] else ""

    monkeypatch.setattr(exact, "difference", wrong_with_adapters)
    policy.use(tmp_path / "adapter")
    assert isinstance(policy.decoder, Plain) and tried == [True, True]
    policy.use(None)
    assert isinstance(policy.decoder, Decoder)


def test_the_choice_of_an_engine_is_no_part_of_a_fingerprint() -> None:
    from models.policy import FINGERPRINT

    dumps = [PolicySettings(engine=e).model_dump(context=FINGERPRINT) for e in ("auto", "plain")]
    assert dumps[0] == dumps[1]
