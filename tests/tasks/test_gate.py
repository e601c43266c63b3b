"""The gate: what is learned from prompts that no candidate improved, and what a kept answer costs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scripted import Script

from models.policy import Messages, Scoring
from models.prompts import CHAT, ask
from models.serving.batching import Batcher
from models.serving.turns import Asked, Conversation, Turn
from tasks.judging.gate import gate_curve, gate_metrics
from tasks.policies.answers import AnswerSettings, Generation
from tasks.record.record import Attempt
from tasks.rows import Answer, Comparison, FirstAnswer, Prompt, Rejected
from tasks.train import TrainSettings, conversations_of, not_improved

GATED = replace(CHAT, gated=True)
ASKS = {"easy": 0.9, "fair": 0.6, "hard": 0.2}
"""What is asked → how probable it is that its first answer is kept; "easy" is said to be kept."""


class Gate(Script):
    """A policy that keeps its first answer to "easy", and otherwise says how probable it was."""

    def __init__(self) -> None:
        super().__init__(self._say)

    def _say(self, messages: Sequence[Any]) -> str:
        if messages[-1]["content"] == CHAT.propose:
            return CHAT.keep if messages[0]["content"] == "easy" else "Give reasons."
        kind = "y2" if messages[-1]["content"] == CHAT.refine else "y1"
        return f"{kind} of {messages[0]['content']}. End."

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        for messages, answer in pairs:
            assert (messages[-1]["content"], answer) == (CHAT.propose, CHAT.keep)
        return [Scoring(logprob=math.log(ASKS[m[0]["content"]]), tokens=8) for m, _ in pairs]


def prompt(text: str) -> Prompt:
    turns = ({"role": "user", "content": text},)
    return Prompt(prompt_id=text, prompt=turns, gold="g", source=f"{text}:1")  # type: ignore[arg-type]


PROMPTS = list(map(prompt, ASKS))


def answered(policy: Script, gated: bool = True) -> list[Answer]:
    templates = GATED if gated else CHAT
    settings = AnswerSettings(max_response_tokens=9)
    return Generation(templates=templates, settings=settings, seed=0, iteration=1).ask(
        policy, PROMPTS
    )


# Learning ------------------------------------------------------------------------------------


def mined(name: str, finish: str = "stop") -> FirstAnswer:
    one = prompt(name)
    return FirstAnswer(
        prompt_id=name, prompt=one.prompt, gold="g", source=one.source,
        initial=f"y1 of {name}", initial_finish=finish,
    )  # fmt: skip


def rejected(name: str, detail: str, sample: int | None = None) -> Rejected:
    return Rejected(prompt_id=name, sample=sample, source="s", reason="r", detail=detail)


def attempt(**tables: Sequence[Any]) -> Attempt:
    return cast(Attempt, SimpleNamespace(rows=lambda name, _: tables[name]))


def test_prompts_whose_candidates_all_failed_to_improve_are_kept() -> None:
    """Not those of which a candidate was unsound, or y1 was cut: they tell nothing of y1."""
    names = ("kept", "improved", "malformed", "cut")
    whole = [
        rejected("kept", "not better"),
        rejected("improved", "not better", sample=3),
        rejected("malformed", "malformed principle, not better"),
        rejected("cut", "not better"),
    ]
    rows = [mined(name, "length" if name == "cut" else "stop") for name in names]
    found = list(not_improved(attempt(mined=rows), attempt(rejected=whole)))
    assert [row.prompt_id for row in found] == ["kept"]
    (lighter,) = conversations_of(found[0], CHAT, TrainSettings(gate_weight=0.3))
    (conversation,) = conversations_of(found[0], CHAT, TrainSettings())
    assert (conversation.weight, lighter.weight) == (1.0, 0.3)
    assert replace(lighter, weight=1.0) == conversation
    assert "gate_weight" not in TrainSettings().model_dump(), "older records are as they were"
    assert conversation.messages == (
        *ask(CHAT, found[0].prompt, "y1 of kept"),
        {"role": "assistant", "content": CHAT.keep},
    )
    assert conversation.turns == (3,) and conversation.weight == 1


# Answering -----------------------------------------------------------------------------------


def test_a_kept_answer_costs_no_third_call() -> None:
    policy = Gate()
    easy, fair, hard = answered(policy)
    assert (easy.principle, easy.refined, easy.tokens) == (CHAT.keep, easy.initial, 6)
    assert (fair.principle, fair.refined, fair.tokens) == ("Give reasons.", "y2 of fair. End.", 9)
    assert [a.keep for a in (easy, fair, hard)] == pytest.approx(list(ASKS.values()))
    assert easy.initial_tokens == 3
    assert len(policy.asked) == 3 + 3 + 2


def test_a_policy_that_did_not_learn_to_keep_is_never_asked_to() -> None:
    plain = Gate()
    easy = answered(plain, gated=False)[0]
    assert (easy.refined, easy.keep) == ("y2 of easy. End.", None) and len(plain.asked) == 9


# The curve -----------------------------------------------------------------------------------


def outcome(name: str, answer: str, value: float | None) -> Comparison:
    return Comparison(
        prompt_id=name, iteration=1, answer=answer, against=0, reference="initial", judge="j",
        ours="a", theirs="b", our_score=None, their_score=None, outcome=value, failure=None,
    )  # fmt: skip


def test_the_curve_trades_tokens_for_wins() -> None:
    """A first answer to "easy" is as good as its refinement; to the others it is not."""
    first = {"easy": 1.0, "fair": 0.5, "hard": 0.0}
    rows = [outcome(name, "initial", value) for name, value in first.items()]
    rows += [outcome(name, "refined", 1.0) for name in first]
    curve = gate_curve(answered(Gate()), rows, seed=0, resamples=100)
    told: list[Any] = [(p.threshold, p.kept, p.tokens, p.win_rate) for p in curve]
    third = pytest.approx(1 / 3)
    assert told == [
        (1.0, third, pytest.approx(8), 1.0),  # what the policy keeps by itself
        (pytest.approx(0.9), third, pytest.approx(7), 1.0),  # z is not asked for either
        (pytest.approx(0.6), pytest.approx(2 / 3), pytest.approx(5), pytest.approx(2.5 / 3)),
        (pytest.approx(0.2), 1.0, pytest.approx(3), 0.5),
    ]
    assert all(p.low <= p.win_rate <= p.high for p in curve)
    chosen = gate_metrics(curve)
    assert chosen["gate/threshold"] == pytest.approx(0.9), "the next has under .95 of the wins"
    assert chosen["gate/tokens"] == pytest.approx(7) and chosen["gate/win_rate"] == 1


def test_without_a_gate_or_a_judgement_there_is_no_curve() -> None:
    failed = [outcome(name, kind, None) for name in ASKS for kind in ("initial", "refined")]
    assert gate_curve(answered(Gate()), failed, seed=0, resamples=100) == []
    won = [replace(row, outcome=1.0) for row in failed]
    assert gate_curve(answered(Gate(), gated=False), won, seed=0, resamples=100) == []
    assert gate_metrics([]) == {}


# Serving -------------------------------------------------------------------------------------


def served(name: str, mode: Any, threshold: float, *, stop: tuple[str, ...] = ()) -> list[Turn]:
    batcher = Batcher(Gate(), lambda messages: 10 * len(messages))
    conversation = Conversation(
        batcher=batcher, templates=GATED, max_principle_tokens=5, key=lambda *_: "k"
    )
    asked = Asked(
        messages=prompt(name).prompt, mode=mode, seed=0, temperature=0.0, top_p=1.0,
        max_tokens=9, stop=stop, threshold=threshold,
    )  # fmt: skip

    async def turns() -> list[Turn]:
        return [turn async for turn in conversation.turns(asked)]

    try:
        return asyncio.run(turns())
    finally:
        batcher.close()


@pytest.mark.parametrize(
    ("name", "mode", "threshold", "roles", "text", "tokens"),
    [
        ("fair", "gated", 0.5, ["initial"], "y1 of fair. End.", 3),
        ("fair", "gated", 0.7, ["initial", "principle", "refined"], "y2 of fair. End.", 9),
        ("easy", "gated", 1.0, ["initial", "principle", "refined"], "y1 of easy. End.", 6),
        ("easy", "refine", 0.0, ["initial", "principle", "refined"], "y1 of easy. End.", 6),
        ("easy", "first", 0.0, ["initial"], "y1 of easy. End.", 3),
    ],
)
def test_a_served_answer_is_kept_from_a_threshold_on(
    name: str, mode: str, threshold: float, roles: list[str], text: str, tokens: int
) -> None:
    """A kept answer is counted once."""
    turns = served(name, mode, threshold)
    assert [turn.role for turn in turns] == roles
    assert [turn.last for turn in turns] == [False] * (len(turns) - 1) + [True]
    assert turns[-1].completion.text == text
    assert sum(turn.completion.tokens for turn in turns) == tokens


def test_a_kept_answer_ends_before_the_stop_text() -> None:
    (kept,) = served("fair", "gated", 0.5, stop=(" End",))
    assert kept.completion.text == "y1 of fair."


def test_a_prompt_that_the_template_refuses_is_not_kept() -> None:
    batcher = Batcher(Gate(), lambda messages: 0)
    try:
        assert batcher.probability(prompt("easy").prompt, CHAT.keep).result(5) == 0
    finally:
        batcher.close()


def test_scores_are_used_in_the_order_of_the_requests() -> None:
    batcher = Batcher(Gate(), lambda messages: 10)
    try:
        waiting = [
            batcher.probability(ask(CHAT, prompt(name).prompt, "y1"), CHAT.keep) for name in ASKS
        ]
        assert [w.result(5) for w in waiting] == pytest.approx(list(ASKS.values()))
    finally:
        batcher.close()
