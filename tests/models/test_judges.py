"""Verdicts on single pairs, and who is asked."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chat_model import build_chat_model
from scripted import judges

from constitutions.foreign_text import disarm
from models.judges.base import Grade, Pair, Verdict, combine, decide, per_pair
from models.judges.oracle import OracleJudge
from models.judges.registry import KINDS, JudgeSettings, open_policy
from models.judges.rubrics import RUBRICS, Rubric
from models.judges.similarity import GoldSimilarity
from models.planted import oracle
from models.planted.world import sample_examples
from models.policy import Policy, PolicySettings, Request
from tasks.similarity.rouge import RougeL, RougeSettings


def pair(ours: str, theirs: str, prompt: str = "x", gold: str = "a b c d") -> Pair:
    return Pair(prompt=({"role": "user", "content": prompt},), gold=gold, ours=ours, theirs=theirs)


def overlap(golds: Sequence[str], responses: Sequence[str]) -> list[Grade]:
    """Share of the gold's words in the response; not a number for "nan", no grade for "?"."""
    (gold,) = golds
    return [
        Grade(None, "nothing to compare")
        if response == "?"
        else Grade(math.nan)
        if response == "nan"
        else Grade(len({*response.split()} & {*gold.split()}) / len(gold.split()))
        for response in responses
    ]


SIMILARITY = GoldSimilarity(overlap, "overlap")


def test_the_answer_nearer_to_the_gold_wins() -> None:
    won, lost, tied = SIMILARITY.compare([pair("a b c", "a"), pair("a", "a b"), pair("a b", "c d")])
    assert (won.outcome, lost.outcome, tied.outcome) == (1.0, 0.0, 0.5)
    assert (won.our_score, won.their_score) == (0.75, 0.25)


def test_rounding_does_not_decide() -> None:
    near = GoldSimilarity(
        lambda golds, texts: [Grade(0.1 + 0.2 if t == "ours" else 0.3) for t in texts], "n"
    )
    assert near.compare([pair("ours", "theirs")])[0].outcome == 0.5


@pytest.mark.parametrize(("text", "reason"), [("?", "nothing to compare"), ("nan", "not a number")])
def test_a_failed_grade_is_a_failure_with_its_reason(text: str, reason: str) -> None:
    mine, yours, fine = SIMILARITY.compare([pair(text, "a"), pair("a", text), pair("a b", "a")])
    assert mine.outcome is None and yours.outcome is None
    assert mine.failure and mine.failure.startswith("our answer") and reason in mine.failure
    assert yours.failure and yours.failure.startswith("their answer")
    assert fine.outcome == 1.0


def test_the_oracle_fails_on_a_prompt_of_another_world() -> None:
    example = sample_examples(1, seed=0)[0]
    foreign, planted = OracleJudge(oracle).compare(
        [
            pair("a", "b", prompt="What is the capital of France?"),
            pair(example.gold, example.chore.core, prompt=example.prompt),
        ]
    )
    assert foreign.outcome is None and foreign.failure and "planted world" in foreign.failure
    assert planted.outcome == 1.0


def test_progress_counts_pairs() -> None:
    done: list[int] = []
    SIMILARITY.compare([pair("a", "b")] * 3, done.append)
    assert sum(done) == 3


def test_auto_asks_the_oracle_only_where_it_knows_the_truth() -> None:
    def chosen(kind: str, planted: bool) -> str:
        return judges(oracle if planted else None).judge(JudgeSettings(kind=kind)).name

    assert chosen("auto", True) == chosen("oracle", True) == "oracle"
    assert chosen("auto", False) == chosen("similarity", True) == "similarity:rouge_l"


def test_every_kind_declares_what_it_needs_and_can_do() -> None:
    def those(capability: str) -> set[str]:
        return {name for name, kind in KINDS.items() if getattr(kind, capability)}

    assert those("needs_gold") == {"similarity"}
    assert those("needs_oracle") == {"oracle"}
    assert those("needs_model") == {"pairwise", "absolute", "reward"}
    assert those("generates") == {"pairwise", "absolute"}
    assert those("reads_principle") == {"pairwise", "absolute", "oracle"}
    assert those("both_orders") == {"pairwise"} and those("grades") == {"absolute"}


def test_rouge_l_is_a_similarity_to_judge_by() -> None:
    judge = GoldSimilarity(RougeL(RougeSettings()).best, "rouge_l")
    near, unreadable = judge.compare(
        [
            pair("the cat sat", "the dog ran", gold="the cat sat down"),
            pair("猫が座った", "the dog ran", gold="the cat sat down"),
        ]
    )
    assert near.outcome == 1.0
    assert unreadable.outcome is None and "tokenizer" in (unreadable.failure or "")


def verdicts(first: float | None, second: float | None) -> tuple[Verdict, Verdict]:
    def verdict(ours_first: bool, outcome: float | None) -> Verdict:
        failure = "no result" if outcome is None else None
        return Verdict(ours_first=ours_first, outcome=outcome, failure=failure)

    return verdict(True, first), verdict(False, second)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [(1, 1, 1), (0, 0, 0), (0.5, 0.5, 0.5), (1, 0, 0.5), (0, 1, 0.5), (1, 0.5, 0.5), (0, 0.5, 0.5)],
)
def test_orders_that_disagree_are_a_tie(first: float, second: float, outcome: float) -> None:
    both = verdicts(first, second)
    judgement = combine(*both)
    assert judgement.outcome == outcome and judgement.verdicts == both


def test_one_failed_order_is_a_failed_judgement() -> None:
    first, second = combine(*verdicts(None, 1)), combine(*verdicts(1, None))
    assert first.outcome is None and first.failure == "our answer first: no result"
    assert second.outcome is None and second.failure == "their answer first: no result"


def test_a_wider_tie_is_the_caller_s_choice() -> None:
    near = Grade(1.0), Grade(1.01)
    assert decide(*near).outcome == 0.0 and decide(*near, tie=0.1).outcome == 0.5


def test_progress_in_steps_is_told_in_pairs() -> None:
    told: list[int] = []
    tick = per_pair(told.append, 3, 6)
    assert tick
    for step in (1, 2, 3):
        tick(step)
    assert told == [1, 2] and per_pair(None, 3, 6) is None


@pytest.mark.parametrize(
    "text",
    [
        "Dear all,\n\n- [x] done\n- [ ] open\n\nSee [the result](https://example.org/a?b=<c>&d).",
        "<table><tr><td>1 < 2</td></tr></table> <b>bold</b> </p> <!-- note -->",
        "xs |> map f <| y; a[i][j] = b[k]; if (a<b || c>d) { s = '[INSTALL]'; }",
        "### Heading\n\nA result: A. 3 <s 4, <thinking>, <|, |>, [INS], 二番目の｜結果",
    ],
)
def test_innocent_text_is_read_as_it_is(text: str) -> None:
    assert disarm(text, ["<|eot_id|>", "</s>"]) == text


@pytest.mark.parametrize(
    "token",
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|assistant|>",
        "<｜User｜>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "</think>",
        "<start_of_turn>",
        "[RESULT]",
        "[result]",
        "<|a<|b|>c|>",
    ],
)
def test_control_tokens_are_broken_and_nothing_is_lost(token: str) -> None:
    broken = disarm(f"a {token}{token} b")
    assert token not in broken
    assert broken.replace(" ", "") == f"a{token}{token}b".replace(" ", "")


ENGINE = PolicySettings(model="owner/judge")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kind": "pairwise"}, "set policy.model"),
        ({"kind": "reward", "policy": PolicySettings()}, "set policy.model"),
        ({"kind": "reward", "policy": ENGINE, "endpoint": "https://host/v1"}, "in process"),
        ({"kind": "pairwise", "policy": ENGINE, "key_variable": "sk-123"}, "key_variable"),
        ({"kind": "pairwise", "policy": ENGINE, "rubric": "beauty"}, "rubric"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(given: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        JudgeSettings(**given)


def test_a_rubric_is_named_or_given() -> None:
    mine = Rubric(name="mine", criterion="Is it mine?", scores=("1", "2", "3", "4", "5"))
    assert JudgeSettings(rubric="principle").chosen_rubric is RUBRICS["principle"]
    read = JudgeSettings.model_validate_json(JudgeSettings(rubric=mine).model_dump_json())
    assert read.chosen_rubric == mine


def test_the_settings_open_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[JudgeSettings] = []

    def client(settings: JudgeSettings) -> Policy:
        opened.append(settings)
        return object()  # type: ignore[return-value]

    remote = JudgeSettings(  # type: ignore[call-arg]
        kind="pairwise", policy=ENGINE, endpoint="http://localhost:8000/v1"
    )
    at_work = judges(oracle, client)
    assert at_work.judge(JudgeSettings()).name == "oracle"
    assert at_work.judge(remote).name == "pairwise:helpfulness:judge"
    graded = remote.model_copy(update={"kind": "absolute", "rubric": "principle"})
    assert at_work.judge(graded).name == "absolute:principle:judge"
    assert opened == [remote], "both are the same model"
    server = ModuleType("models.endpoint.server")
    asked: list[PolicySettings] = []
    server.open_server = asked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models.endpoint.server", server)
    open_policy(remote)
    assert asked == [remote.policy], "an endpoint is asked, nothing is loaded here"


def test_what_stands_beside_the_model_is_its_own() -> None:
    beside = {"endpoint": "http://host/v1", "key_variable": "KEY"}
    inside = {"model": "owner/judge", **beside}
    read = JudgeSettings.model_validate
    one = read({"kind": "absolute", "policy": {"model": "owner/judge"}, **beside})
    assert one == read({"kind": "absolute", "policy": inside})
    again = one.model_dump() | {"endpoint": None}
    assert read(again).policy == PolicySettings(model="owner/judge", key_variable="KEY")
    assert read({"kind": "auto", "endpoint": None}) == JudgeSettings(), "as older records have it"
    with pytest.raises(ValueError, match="policy"):
        read({"policy": "a word", "endpoint": "http://host"})


def test_a_judge_in_process_is_loaded(tmp_path: Path) -> None:
    directory = build_chat_model(tmp_path / "judge", "llama")
    policy = PolicySettings(
        model=str(directory), dtype="float32", device="cpu", quantization="none"
    )
    opened = open_policy(JudgeSettings(kind="absolute", policy=policy))
    request = Request(messages=({"role": "user", "content": "Judge."},), key="k", max_tokens=2)
    assert [len(completions) for completions in opened.generate([request])] == [1]
