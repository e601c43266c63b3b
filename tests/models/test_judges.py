"""Verdicts on single pairs, and who is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from constitutions.errors import UserError
from models.judges import GoldSimilarity, Grade, Pair, PlantedOracle, PrincipleJudge, choose_judge
from models.planted.world import sample_examples
from tasks.score import ScoreSettings, similarity_of


def pair(ours: str, theirs: str, prompt: str = "x", gold: str = "a b c d") -> Pair:
    return Pair(prompt=({"role": "user", "content": prompt},), gold=gold, ours=ours, theirs=theirs)


def overlap(gold: str, responses: Sequence[str]) -> list[Grade]:
    """Share of the gold's words in the response; not a number for "nan", no grade for "?"."""
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
        lambda gold, texts: [Grade(0.1 + 0.2 if t == "ours" else 0.3) for t in texts], "n"
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
    foreign, planted = PlantedOracle().compare(
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
    def chosen(choice: str, planted: bool) -> str:
        return choose_judge(choice, planted=planted, similarity=SIMILARITY).name  # type: ignore[arg-type]

    assert chosen("auto", True) == chosen("oracle", True) == "oracle"
    assert chosen("auto", False) == chosen("similarity", True) == "similarity:overlap"
    with pytest.raises(UserError, match=r"evaluate\.judge"):
        chosen("oracle", False)


def test_only_the_oracle_judges_principles() -> None:
    assert isinstance(PlantedOracle(), PrincipleJudge)
    assert not isinstance(SIMILARITY, PrincipleJudge)


def test_rouge_l_is_a_similarity_to_judge_by() -> None:
    judge = GoldSimilarity(similarity_of(ScoreSettings()), "rouge_l")
    near, unreadable = judge.compare(
        [
            pair("the cat sat", "the dog ran", gold="the cat sat down"),
            pair("猫が座った", "the dog ran", gold="the cat sat down"),
        ]
    )
    assert near.outcome == 1.0
    assert unreadable.outcome is None and "tokenizer" in (unreadable.failure or "")
