"""E-step proposals with a real (random, tiny) chat model: what each turn sees, and what repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from chat_model import build_chat_model
from scripted import turns_of

from models.engine.local import LocalPolicy, load_policy
from models.policy import Completion, Messages, PolicySettings, Request
from models.prompts import CHAT
from tasks.mine import MineSettings, completions_per_prompt, mine
from tasks.rows import Mined, Prompt, prompt_id

SETTINGS = MineSettings(
    samples=3, max_response_tokens=8, max_principle_tokens=6, max_critique_tokens=5
)


class Listening:
    """The real policy, with its requests written down."""

    def __init__(self, policy: LocalPolicy) -> None:
        self.policy = policy
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[Request], progress: object = None
    ) -> list[list[Completion]]:
        self.requests += requests
        return self.policy.generate(requests, progress)  # type: ignore[arg-type]

    def role(self, role: str) -> list[Request]:
        return [r for r in self.requests if r.key.endswith(f"/{role}")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LocalPolicy:
    directory = build_chat_model(tmp_path_factory.mktemp("model"), "qwen2")
    return load_policy(PolicySettings(dtype="float32", device="cpu"), directory, None)


def prompts(*texts: str) -> list[Prompt]:
    rows = []
    for i, text in enumerate(texts):
        turns: Messages = (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": text},
        )
        rows.append(
            Prompt(prompt_id=prompt_id(turns), prompt=turns, gold=f"GOLD-{i}", source=f"f:{i}")
        )
    return rows


def test_the_first_of_several_golds_is_shown(policy: LocalPolicy) -> None:
    (row,) = prompts("How do I bake bread?")
    listening = Listening(policy)
    row = replace(row, other_golds=("GOLD-other",))
    mine(SETTINGS, CHAT, "0/1", listening, [row])  # type: ignore[arg-type]
    seen = [str(request.messages) for request in listening.requests]
    assert any("GOLD-0" in text for text in seen)
    assert not any("GOLD-other" in text for text in seen)


def test_every_candidate_is_there_in_order(policy: LocalPolicy) -> None:
    rows = prompts("How do I bake bread?", "What is the capital of France?")
    answered: list[int] = []
    mined = mine(SETTINGS, CHAT, "0/1", policy, rows, answered.append)
    assert [m.prompt_id for m in mined] == [r.prompt_id for r in rows]
    assert [[c.sample for c in m.candidates] for m in mined] == [[0, 1, 2], [0, 1, 2]]
    assert all(c.critique and c.finish in ("stop", "length") for m in mined for c in m.candidates)
    assert sum(answered) == len(rows) * completions_per_prompt(SETTINGS, CHAT)
    assert len({c.principle for m in mined for c in m.candidates}) == 6


def test_only_the_principle_is_hinted(policy: LocalPolicy) -> None:
    listening = Listening(policy)
    (mined,) = mine(SETTINGS, CHAT, "0/1", listening, prompts("How do I bake bread?"))  # type: ignore[arg-type]

    def seen(role: str) -> list[str]:
        return ["\n".join(m["content"] for m in turns_of(r)) for r in listening.role(role)]

    assert all("GOLD-0" in text for text in seen("principle"))
    for role in ("initial", "critique", "refined"):
        assert seen(role)
        assert not any("GOLD-0" in text for text in seen(role))
    first = turns_of(listening.role("refined")[0])
    assert [m["role"] for m in first[-2:]] == ["assistant", "user"]
    assert mined.candidates[0].critique == first[-2]["content"]
    assert mined.candidates[0].principle in seen("refined")[0]


def test_the_critique_can_be_left_out(policy: LocalPolicy) -> None:
    listening = Listening(policy)
    settings = SETTINGS.model_copy(update={"critique": False})
    (mined,) = mine(settings, CHAT, "0/1", listening, prompts("How do I bake bread?"))  # type: ignore[arg-type]
    assert not listening.role("critique")
    assert sum(r.n for r in listening.requests) == completions_per_prompt(settings, CHAT)
    assert {c.critique for c in mined.candidates} == {""}


def same(a: Sequence[Mined], b: Sequence[Mined]) -> bool:
    return {m.prompt_id: m for m in a} == {m.prompt_id: m for m in b}


def test_samples_do_not_depend_on_the_shard(policy: LocalPolicy) -> None:
    rows = prompts("How do I bake bread?", "What is the capital of France?", "Why?")
    whole = mine(SETTINGS, CHAT, "0/1", policy, rows)
    parts = [m for row in reversed(rows) for m in mine(SETTINGS, CHAT, "0/1", policy, [row])]
    assert same(whole, parts)
    assert not same(whole, mine(SETTINGS, CHAT, "0/2", policy, rows))


def test_a_prompt_without_room_is_marked(policy: LocalPolicy) -> None:
    long, short = mine(SETTINGS, CHAT, "0/1", policy, prompts("word " * 9000, "Why?"))
    assert long.initial_finish == "overflow"
    assert {c.finish for c in long.candidates} == {"overflow"}
    assert short.initial_finish != "overflow"


def test_without_principles_refinements_see_the_first_response_alone(policy: LocalPolicy) -> None:
    rows = prompts("How do I bake bread?", "What is the capital of France?")
    listening, templates = Listening(policy), CHAT.unguided()
    mined = mine(SETTINGS, templates, "0/1", listening, rows)  # type: ignore[arg-type]
    assert len(listening.requests) == len(rows) * 2
    asked = listening.role("unguided")
    assert [r.n for r in asked] == [3, 3]
    for row, request in zip(mined, asked, strict=True):
        *_, first, turn = turns_of(request)
        assert first["content"] == row.initial and turn["content"] == CHAT.improve
        assert not any(row.gold in m["content"] for m in turns_of(request))
        assert [c.sample for c in row.candidates] == [0, 1, 2]
        assert all(c.principle == c.critique == "" and c.tokens > 0 for c in row.candidates)
