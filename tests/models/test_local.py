"""The local engine: exact, reproducible whatever the batch, and honest sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import build_chat_model

from models.decoding import Sample
from models.local import LocalPolicy, load_policy
from models.policy import Message, PolicySettings, Request

SETTINGS = PolicySettings(dtype="float32", device="cpu", quantization="none")


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def policy(directory: Path) -> LocalPolicy:
    return load_policy(SETTINGS, directory, None)


TEXTS = ["Why?", "How do I make bread at home without an oven?", "Write " + "a short answer. " * 9]


def test_greedy_equals_transformers_unpadded(policy: LocalPolicy) -> None:
    requests = [Request(messages=user(t), key=t, temperature=0, max_tokens=24) for t in TEXTS]
    for request, (ours,) in zip(requests, policy.generate(requests), strict=True):
        ids = policy.tokenizer.apply_chat_template(
            list(request.messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        theirs = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )[0, ids.shape[1] :]
        text = policy.tokenizer.decode(theirs, skip_special_tokens=True).strip()
        assert ours.text == text


def test_a_sample_does_not_depend_on_its_batch(policy: LocalPolicy) -> None:
    requests = [Request(messages=user(t), key=t, n=3, max_tokens=16) for t in TEXTS]
    together = policy.generate(requests)
    alone = [policy.generate([r])[0] for r in reversed(requests)][::-1]
    assert [[c.text for c in cs] for cs in together] == [[c.text for c in cs] for cs in alone]
    assert len({c.text for c in together[0]}) == 3
    small = LocalPolicy(policy.model, policy.tokenizer, batch_rows=2)
    assert [[c.text for c in cs] for cs in small.generate(requests)] == [
        [c.text for c in cs] for cs in together
    ]


def test_the_key_decides(policy: LocalPolicy) -> None:
    one, same, other = (
        policy.generate([Request(messages=user("Why?"), key=k, max_tokens=16)])[0][0].text
        for k in ("a", "a", "b")
    )
    assert one == same != other


def steps(policy: LocalPolicy, messages: tuple[Message, ...], ids: list[int]) -> list[float]:
    """The log-probability of each token after a prompt: one plain forward pass."""
    prompt = policy.chat.prompt(messages)
    logits = policy.model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    return [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)]


def test_the_log_probability_of_what_was_sampled(policy: LocalPolicy) -> None:
    samples: list[Sample] = []
    request = Request(messages=user("Why?"), key="k", n=12, max_tokens=3)
    policy.decoder.sample([policy.chat.prompt(request.messages)], [request], samples.append)
    cut = [s for s in samples if s.finish == "length"]  # the others also count what ended them
    assert len(samples) == 12 and len(cut) > 6
    for sample in cut:
        expected = sum(steps(policy, request.messages, sample.tokens))
        assert sample.logprob == pytest.approx(expected, abs=1e-3)


def test_the_log_probability_of_a_given_response(policy: LocalPolicy) -> None:
    text = "Restart the printer."
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = steps(policy, user("Why?"), [*ids, min(policy.stop)])
    (scored,) = policy.logprobs([(user("Why?"), text)])
    assert scored.logprob == pytest.approx(sum(expected), abs=1e-3)
    assert scored.tokens == len(expected)


def test_given_responses_are_scored_alike_in_any_batch(policy: LocalPolicy) -> None:
    pairs = [(user(t), "Restart the printer.") for t in TEXTS]
    together = policy.logprobs(pairs)
    alone = [policy.logprobs([pair])[0] for pair in pairs]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone], abs=1e-3)


def test_hidden_states_do_not_see_the_padding(policy: LocalPolicy) -> None:
    together = policy.hidden_states(TEXTS)
    alone = policy.hidden_states(TEXTS[:1])
    assert together.shape == (3, policy.model.config.hidden_size)
    assert together[0] == pytest.approx(alone[0], abs=1e-4)


def test_top_p_keeps_the_nucleus(policy: LocalPolicy) -> None:
    greedy, narrow = (
        policy.generate([Request(messages=user("Why?"), key="k", max_tokens=12, **how)])[0][0].text
        for how in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 1e-6})
    )
    assert greedy == narrow


def test_nf4_on_a_cpu_is_held_dequantised(directory: Path) -> None:
    exact = load_policy(SETTINGS, directory, None)
    rounded = load_policy(SETTINGS.model_copy(update={"quantization": "nf4"}), directory, None)
    pair = (user("Why?"), "Restart the printer.")
    a, b = exact.logprobs([pair])[0].logprob, rounded.logprobs([pair])[0].logprob
    assert a != b
    assert a == pytest.approx(b, rel=0.1)
