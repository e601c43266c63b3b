"""Several principles vote: an answer is refined under a majority's, or stands as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError
from scripted import Script

from models.planted import oracle
from models.policy import Completion, no_answer, vote
from models.prompts import CHAT
from models.serving.batching import Batcher
from models.serving.turns import Asked, Conversation, Turn
from tasks.judging.pairs import principle_pairs
from tasks.judging.truth import faithfulness_metrics
from tasks.policies.answers import AnswerSettings, Generation
from tasks.rows import Answer, Prompt

SAID = {
    "agreed": ["Give reasons.", "Be brief.", "give reasons", "Give  reasons!"],
    "split": ["Give reasons.", "Be brief.", "Give reasons.", "Be kind."],
    "silent": ["", "", "", "Be brief."],
}
"""What is asked → the principles that the policy samples."""
SETTINGS = AnswerSettings(temperature=0.5, votes=4)


def completion(text: str, tokens: int = 2) -> Completion:
    return Completion(text=text, tokens=tokens, logprob=-1.0, finish="stop")


@pytest.mark.parametrize(
    ("said", "won"),
    [
        (["Be kind."], "Be kind."),
        (SAID["agreed"], "Give reasons."),
        (["Be brief.", *SAID["agreed"]], "Give reasons."),
        (SAID["split"], ""),
        (SAID["silent"], ""),
    ],
)
def test_more_than_half_have_to_agree(said: list[str], won: str) -> None:
    found = vote([completion(text) for text in said])
    assert (found.text, found.tokens, found.finish) == (won, 2 * len(said), "stop")


def test_a_prompt_without_room_is_not_a_vote() -> None:
    assert vote([no_answer("overflow")] * 3) == no_answer("overflow")


def test_all_votes_of_a_greedy_policy_would_be_the_same() -> None:
    with pytest.raises(ValidationError, match="votes need a temperature above 0"):
        AnswerSettings(votes=4)
    assert "votes" not in AnswerSettings().model_dump(), "older records are as they were"


class Voter(Script):
    """A policy with `SAID` principles."""

    def __init__(self) -> None:
        super().__init__(self._say)
        self.given = 0

    def _say(self, messages: Sequence[Any]) -> str:
        name, last = messages[0]["content"], messages[-1]["content"]
        if last == CHAT.propose:
            self.given += 1
            return SAID[name][(self.given - 1) % 4]
        return f"y2, {messages[-2]['content']}" if last == CHAT.refine else f"y1 of {name}"


def prompt(name: str) -> Prompt:
    turns = ({"role": "user", "content": name},)
    return Prompt(prompt_id=name, prompt=turns, gold="g", source=f"{name}:1")  # type: ignore[arg-type]


PROMPTS = list(map(prompt, SAID))


def answered(done: list[int] | None = None) -> list[Answer]:
    generation = Generation(templates=CHAT, settings=SETTINGS, seed=0, iteration=1)
    assert generation.completions == 6
    return generation.ask(Voter(), PROMPTS, None if done is None else done.append)


def test_without_a_majority_the_first_answer_stands() -> None:
    done: list[int] = []
    agreed, split, silent = answered(done)
    assert (agreed.principle, agreed.refined) == ("Give reasons.", "y2, Give reasons.")
    for row in (split, silent):
        assert (row.principle, row.refined, row.finish) == ("", row.initial, "stop")
    assert sum(done) == 6 * len(PROMPTS)
    assert [
        pair.prompt.prompt_id for pair in principle_pairs([agreed, split, silent], PROMPTS)
    ] == ["agreed"]


def test_an_answer_without_a_principle_has_none_to_follow() -> None:
    _, split, silent = answered()
    assert faithfulness_metrics(oracle, labelled=[], answers=[split, silent]) == {}


@pytest.mark.parametrize("name", list(SAID))
def test_a_served_answer_is_the_evaluated_one(name: str) -> None:
    batcher = Batcher(Voter(), lambda messages: 10)
    conversation = Conversation(
        batcher=batcher, templates=CHAT, max_principle_tokens=5, votes=4, key=lambda *_: "k"
    )
    asked = Asked(
        messages=prompt(name).prompt, mode="refine", seed=0, temperature=0.5, top_p=1.0,
        max_tokens=9, stop=(),
    )  # fmt: skip

    async def turns() -> list[Turn]:
        return [turn async for turn in conversation.turns(asked)]

    try:
        found = asyncio.run(turns())
    finally:
        batcher.close()
    (wanted,) = (row for row in answered() if row.prompt_id == name)
    assert [turn.completion.text for turn in found] == [
        wanted.initial, wanted.principle, wanted.refined,
    ]  # fmt: skip
    assert sum(turn.completion.tokens for turn in found) == wanted.tokens
