"""Differences between texts are marked, examples are chosen by rule, dots stand on the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.report.exhibits import (
    MAP_HEIGHT,
    MAP_POINTS,
    MAP_WIDTH,
    best_examples,
    change,
    examples,
    principle_map,
    word_diff,
)
from tasks.rows import Answer, ClusterRow, Comparison, Labelled, Prompt

words = st.lists(st.sampled_from(["a", "b", "c,", "é", "(d)", "e\n"]), max_size=12).map(" ".join)


def plain(pieces: Sequence[tuple[str, str]]) -> list[str]:
    return "".join(text for _, text in pieces).split()


@given(words, words)
def test_both_texts_can_be_read_off_their_pieces(before: str, after: str) -> None:
    changed = change(before, after)
    assert plain(changed.before) == before.split()
    assert plain(changed.after) == after.split()
    assert {kind for kind, _ in changed.before} <= {"same", "removed"}
    assert {kind for kind, _ in changed.after} <= {"same", "added"}


def test_what_was_inserted_is_marked_and_nothing_else() -> None:
    assert word_diff("open the lamp.", "open the lamp. which model?") == [
        ("same", "open the lamp. "),
        ("added", "which model?"),
    ]
    assert word_diff("open the old lamp", "open the lamp") == [
        ("same", "open the "),
        ("removed", "old "),
        ("same", "lamp"),
    ]


def test_what_stayed_is_shortened_around_the_change() -> None:
    before = " ".join(f"w{i}" for i in range(40))
    after = before.replace("w20", "new")
    assert word_diff(before, after, context=2) == [
        ("gap", " … "),
        ("same", "w18 w19 "),
        ("removed", "w20 "),
        ("added", "new "),
        ("same", "w21 w22 "),
        ("gap", " … "),
    ]


PROMPTS = [
    Prompt(prompt_id=f"{i:03}", prompt=({"role": "user", "content": f"prompt {i}"},), gold="g", source=f"rows:{i}")
    for i in range(25)
]  # fmt: skip


def answer(prompt: Prompt) -> Answer:
    return Answer(
        prompt_id=prompt.prompt_id,
        iteration=2,
        initial="no",
        principle="be kind",
        refined=f"no {prompt.source}",
        finish="stop",
        tokens=3,
    )


def judged(prompt: Prompt, against: int, outcome: float | None) -> Comparison:
    return Comparison(
        prompt_id=prompt.prompt_id,
        iteration=2,
        answer="refined",
        against=against,
        reference="initial",
        judge="oracle",
        ours="",
        theirs="",
        our_score=None,
        their_score=None,
        outcome=outcome,
        failure=None if outcome is not None else "it timed out",
    )


def test_examples_are_evenly_spaced_whatever_the_outcome() -> None:
    outcomes = {0: 0.0, 2: 0.5, 5: None, 7: 1.0}
    rows = [judged(p, 0, outcomes.get(i, 1.0)) for i, p in enumerate(PROMPTS)]
    rows += [judged(p, 2, 1.0) for p in PROMPTS]  # against its own first answer: not shown
    chosen = examples([answer(p) for p in reversed(PROMPTS)], rows, PROMPTS)
    assert [x.number for x in chosen] == [1, 3, 6, 8, 11, 13, 16, 18, 21, 23]
    assert [x.outcome for x in chosen[:4]] == ["loss", "tie", "not judged", "win"]
    assert chosen[2].failure == "it timed out"
    assert chosen[1].prompt == PROMPTS[2].prompt
    assert chosen[1].change.after == [("same", "no "), ("added", "rows:2")]
    better = [judged(p, 0, 1.0) for p in PROMPTS]
    again = examples([answer(p) for p in PROMPTS], better, PROMPTS)
    assert [x.source for x in again] == [x.source for x in chosen]


def test_of_a_tuned_policy_the_first_answer_is_shown_against_the_initial_one() -> None:
    row = replace(judged(PROMPTS[0], 0, 1.0), answer="initial", theirs="old", ours="new")
    other = replace(row, judge="another", outcome=0.0)
    (shown,) = examples([answer(PROMPTS[0])], [row, other], PROMPTS, final="initial")
    assert shown.change == ([("removed", "old")], [("added", "new")])
    assert (shown.principle, shown.outcome) == ("", "win"), "as the first judge said"


def test_few_answers_are_all_shown() -> None:
    few = PROMPTS[:3]
    assert [x.number for x in examples([answer(p) for p in few], [], few)] == [1, 2, 3]
    assert examples([], [], PROMPTS) == []


def clustered(principle: str, x: float | None, y: float | None, cluster: int = 0, support: int = 1) -> ClusterRow:  # fmt: skip
    return ClusterRow(
        principle=principle,
        cluster=cluster,
        representative=f"p{cluster}",
        support=support,
        inserted=0,
        x=x,
        y=y,
        note="",
    )


def kept(principle: str, gain: float, prompt_id: str = "0") -> Labelled:
    return Labelled(
        prompt_id=prompt_id,
        prompt=({"role": "user", "content": "x"},),
        gold="",
        source="rows:0",
        sample=0,
        initial="one",
        principle=principle,
        refined=f"one {prompt_id}",
        initial_score=0.2,
        score=0.2 + gain,
        weight=1.0,
        label="p0",
        cluster=0,
        replaced=True,
    )


def test_dots_stand_as_on_the_clusters_map() -> None:
    rows = [
        clustered("p0", -5, 2, support=4),
        clustered("left", -1, 2),
        clustered("p1", 3, 8, cluster=1),
        clustered("nowhere", None, None, cluster=1),
    ]
    drawn = principle_map(2, rows, [kept("Left.", 0.1, "7"), kept("left", 0.4, "3")], 2)
    at = {dot.row.principle: dot for dot in drawn.dots}
    assert set(at) == {"p0", "left", "p1"} and drawn.distinct == 4
    assert at["p0"].x < at["left"].x < at["p1"].x
    assert at["p1"].y < at["p0"].y, "upwards is up"
    assert at["p0"].radius > at["left"].radius
    for dot in drawn.dots:
        assert dot.radius <= dot.x <= MAP_WIDTH - dot.radius
        assert dot.radius <= dot.y <= MAP_HEIGHT - dot.radius
    assert [mark.number for mark in drawn.marks] == [1, 2]
    assert drawn.clusters == [(1, "p0", 5), (2, "p1", 2)]
    assert drawn.examples == {"left": [("same", "one "), ("added", "3")]}, "the largest gain"


def test_the_tail_has_no_number_and_is_no_cluster_of_the_constitution() -> None:
    rows = [
        clustered("p0", 0, 0, support=4),
        clustered("p1", 1, 1, cluster=1, support=3),
        clustered("p2", 2, 2, cluster=2),
        clustered("also", 3, 3, cluster=2),
    ]
    drawn = principle_map(1, rows, [], 1)
    assert [mark.number for mark in drawn.marks] == [1]
    assert drawn.clusters == [(1, "p0", 4)]
    assert drawn.tail == (3, 5)
    assert [dot.row.principle for dot in drawn.dots if not dot.in_tail] == ["p0"]
    assert principle_map(1, rows, [], 3).tail == (0, 0)


@pytest.mark.parametrize("rows", [[], [clustered("p0", None, None)]])
def test_a_map_without_places(rows: list[ClusterRow]) -> None:
    assert principle_map(1, rows, [], 1).dots == []


def test_only_the_best_supported_are_drawn() -> None:
    rows = [clustered(f"p{i}", i, i % 7, support=1 + i) for i in range(MAP_POINTS + 50)]
    drawn = principle_map(1, rows, [], 1)
    assert len(drawn.dots) == MAP_POINTS and drawn.distinct == MAP_POINTS + 50
    assert min(dot.row.support for dot in drawn.dots) == 51


def test_of_equal_gains_the_first_prompt_is_the_example() -> None:
    rows = [kept("z", 0.25, "b"), kept("z", 0.25, "a"), kept("z", 0.125, "0")]
    assert best_examples(rows)["z"].prompt_id == "a"
    assert best_examples(reversed(rows))["z"].prompt_id == "a"
