"""Thoughts through the loop: in columns of their own, shown to no later turn, trained as sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import pytest
from chat_model import build_tokenizer
from filtered import filter_rows
from real_templates import CHATML, QWEN3, QWEN35
from scripted import Script

from models.policy import Completion, PolicySettings, Progress, Request
from models.prompts import CHAT, CHAT_CONSTITUTION
from models.training.encoding import Encoder
from tasks.filter import FilterSettings
from tasks.mine import MineSettings, mine
from tasks.policies.answers import AnswerSettings, Generation
from tasks.policies.opening import PolicySource
from tasks.record.slot import Slot
from tasks.rows import (
    Answer,
    Draw,
    Labelled,
    Mined,
    Prompt,
    Sampled,
    Scored,
    ScoredCandidate,
    fields,
    from_table,
    to_table,
)
from tasks.sami.train import groups_of
from tasks.train import (
    TrainingConversation,
    TrainSettings,
    demonstrations,
    encode,
    training_conversation,
)

PROMPT = Prompt(
    prompt_id="p",
    prompt=({"role": "user", "content": "Name a fruit."},),
    gold="GOLD.",
    source="f:1",
)


class Thinker(Script):
    """Thinks of whatever it was asked, then says which turn it is."""

    def __init__(self) -> None:
        super().__init__(lambda messages: f"Turn {len(messages)}.")

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        return [
            [
                dataclasses.replace(c, thoughts=f"<think>\n{r.messages[-1]}\n</think>\n\n")
                for c in some
            ]
            for some, r in zip(super().generate(requests, progress), requests, strict=True)
        ]


def labelled(**change: Any) -> Labelled:
    values: dict[str, Any] = {
        **fields(PROMPT), "sample": 0, "initial": "A fruit.", "principle": "Name one.",
        "refined": "A fig.", "initial_score": 0.1, "score": 0.9, "weight": 1.0,
        "label": "Name one.", "cluster": 0, "replaced": False,
    }  # fmt: skip
    return Labelled(**(values | change))


def encoder_of(template: str) -> Encoder:
    tokenizer = build_tokenizer(template, "<|im_end|>", ["<|im_start|>"])
    if "</think>" in template:
        tokenizer.add_tokens(["<think>", "</think>"])
    return Encoder(tokenizer, 4096)


def learned(row: TrainingConversation, encoder: Encoder) -> list[tuple[str, str]]:
    """Of each example, the last of the context and what is trained."""
    found = encode(row, encoder)
    assert not found.skipped
    decode = encoder.chat.tokenizer.decode
    parts = []
    for example in found.examples:
        first = list(example.trained).index(True)
        kept = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
        parts.append((decode(list(example.ids[:first]))[-40:], decode(kept)))
    return parts  # type: ignore[return-value]


def test_mining_keeps_thoughts_apart_and_shows_them_to_no_later_turn() -> None:
    thinker = Thinker()
    (row,) = mine(MineSettings(samples=1), CHAT, "0/1", thinker, [PROMPT])
    (found,) = row.candidates
    columns = (row.initial_thoughts, found.principle_thoughts, found.critique_thoughts)
    assert all("<think>" in text for text in (*columns, found.refined_thoughts))
    assert "GOLD." in found.principle_thoughts and "GOLD." not in found.refined_thoughts
    said = (row.initial, found.principle, found.critique, found.refined)
    assert said == ("Turn 1.", "Turn 3.", "Turn 5.", "Turn 7.")
    assert not any("<think>" in m["content"] for r in thinker.asked for m in r.messages)


GENERATION = Generation(templates=CHAT, settings=AnswerSettings(), seed=0, iteration=0)


def test_answers_keep_thoughts_apart() -> None:
    (row,) = GENERATION.ask(Thinker(), [PROMPT])
    assert (row.initial, row.principle, row.refined) == ("Turn 1.", "Turn 3.", "Turn 5.")
    thoughts = (row.initial_thoughts, row.principle_thoughts, row.refined_thoughts)
    assert all(text.startswith("<think>\n") for text in thoughts)
    assert "GOLD." not in "".join(thoughts)


@pytest.mark.parametrize("kind", [Mined, Answer, Labelled, Sampled])
def test_records_without_thoughts_are_read(kind: type) -> None:
    """As they were written before there were such columns."""
    draw = Draw(identifiers=(), principles=(), response="y", finish="stop", tokens=1)
    rows: dict[type, Any] = {
        Mined: mine(MineSettings(samples=2), CHAT, "0/1", Script(lambda m: "x"), [PROMPT])[0],
        Answer: GENERATION.ask(Script(lambda m: "x"), [PROMPT])[0],
        Labelled: labelled(),
        Sampled: Sampled(**fields(PROMPT), draws=(draw,)),
    }
    row = rows[kind]
    old = [_without(value) for value in to_table([row], kind).to_pylist()]
    assert from_table(pa.Table.from_pylist(old), kind) == [row]
    assert from_table(to_table([row], kind), kind) == [row]


def _without(value: Any) -> Any:
    if isinstance(value, list):
        return [_without(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {k: _without(v) for k, v in value.items() if not k.endswith("thoughts")}


def scored(**change: Any) -> Scored:
    candidate: dict[str, Any] = {
        "sample": 0, "principle": "Name one.", "critique": "", "refined": "A fig.",
        "finish": "stop", "tokens": 9, "score": 0.9, "unscored": None,
    }  # fmt: skip
    row: dict[str, Any] = {"initial": "A fruit.", "initial_thoughts": "", "initial_finish": "stop"}
    found = ScoredCandidate(**{**candidate, **{k: v for k, v in change.items() if k not in row}})
    row |= {k: v for k, v in change.items() if k in row}
    return Scored(
        **fields(PROMPT), **row, initial_tokens=3, candidates=(found,), initial_score=0.1,
        initial_unscored=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"refined": "", "refined_thoughts": "<think>hm", "finish": "length"},
        {"principle": "", "principle_thoughts": "<think>hm", "finish": "length"},
        {"initial": "", "initial_thoughts": "<think>hm", "initial_finish": "length"},
    ],
)
def test_an_answer_that_was_never_begun_is_not_kept(change: dict[str, Any]) -> None:
    settings = FilterSettings(keep_truncated=True)
    kept, _ = filter_rows([scored(refined_thoughts="<think>hm</think>")], settings, "0/1")
    assert [row.refined_thoughts for row in kept] == ["<think>hm</think>"]
    kept, rejected = filter_rows([scored(**change)], settings, "0/1")
    assert not kept and {row.reason for row in rejected} >= {"truncated"}


@pytest.mark.parametrize("opened", [True, False])
def test_a_refinement_is_trained_with_its_thoughts_a_principle_without(opened: bool) -> None:
    begun = "" if opened else "<think>\n"
    row = labelled(
        initial_thoughts=f"{begun}first\n</think>\n\n",
        principle_thoughts=f"{begun}GOLD.\n</think>\n\n",
        refined_thoughts=f"{begun}short\n</think>\n\n",
    )
    encoder = encoder_of(QWEN35 if opened else QWEN3)
    z, y2 = learned(training_conversation(row, row.label, CHAT, TrainSettings()), encoder)
    assert z[1] == "Name one.<|im_end|>" and z[0].endswith("<think>\n\n</think>\n\n")
    assert y2[1] == f"{begun}short\n</think>\n\nA fig.<|im_end|>"
    assert y2[0].endswith("<|im_start|>assistant\n" + ("<think>\n" if opened else ""))


def test_what_nobody_sampled_follows_an_empty_thought() -> None:
    encoder = encoder_of(QWEN3)
    replaced = training_conversation(
        labelled(label="Be brief."), "Be brief.", CHAT, TrainSettings()
    )
    z, y2 = learned(replaced, encoder)
    assert z[0].endswith("<think>\n\n</think>\n\n") and z[1] == "Be brief.<|im_end|>"
    assert y2[0].endswith("assistant\n") and y2[1] == "A fig.<|im_end|>", "it did not think"
    (shown,) = demonstrations(PROMPT)
    ((context, gold),) = learned(shown, encoder)
    assert context.endswith("<think>\n\n</think>\n\n") and gold == "GOLD.<|im_end|>"


def test_a_model_that_does_not_think_is_trained_as_ever() -> None:
    row = training_conversation(labelled(), "Name one.", CHAT, TrainSettings())
    ((_, said),) = learned(row, encoder_of(CHATML))
    assert said == "Name one.<|im_end|>A fig.<|im_end|>"


def test_the_thoughts_are_part_of_what_is_trained() -> None:
    plain, thinking = (
        training_conversation(labelled(refined_thoughts=text), "Name one.", CHAT, TrainSettings())
        for text in ("", "hm</think>")
    )
    encoder = encoder_of(QWEN35)
    assert encode(plain, encoder).digest != encode(thinking, encoder).digest


def test_sami_tells_responses_apart_without_their_thoughts() -> None:
    """Thoughts quote the constitution: they alone would tell which one it was."""
    draws = [
        Draw(
            identifiers=("pos 1",), principles=(rule,), response=said, finish="stop", tokens=9,
            thoughts=f"The rule is: {rule}\n</think>\n\n",
        )
        for rule, said in (("Be kind.", "Yes."), ("Be rude.", "No."))
    ]  # fmt: skip
    encoder = encoder_of(QWEN35)
    rows = [Sampled(**fields(PROMPT), draws=tuple(draws))]
    (group,) = groups_of(rows, encoder, CHAT_CONSTITUTION, end_token=True).groups
    decode = encoder.chat.tokenizer.decode
    assert [decode(list(ids)) for ids in group.responses] == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert all(
        cast(str, decode(list(p))).endswith("<think>\n\n</think>\n\n") for p in group.prompts
    )


def test_how_the_template_is_used_is_part_of_a_fingerprint() -> None:
    def noted(**more: Any) -> str:
        source = PolicySource(PolicySettings(model="m", **more), "m", "digest")
        at = Slot(cast(Any, None), 1, seed=0)
        return str(sorted(source.noted(at).notes.items()))

    changes: list[dict[str, Any]] = [
        {"template_arguments": {"enable_thinking": False}},
        {"template_arguments": {"enable_thinking": False}, "endpoint": "http://127.0.0.1:1"},
        {"chat_template": "tool_use"},
        {"thought_tags": "none"},
        {"thought_tokens": 9},
    ]
    assert len({noted(), *(noted(**change) for change in changes)}) == 6
