"""Every principle has one line through the iterations, and every change is on it."""

from __future__ import annotations

from constitutions.constitution import Constitution, Principle, diff
from tasks.report.movement import Event, movement

FIRST = Constitution(
    iteration=1,
    principles=(
        Principle(text="warn of risks", support=9, members=("warn of risks", "caution people")),
        Principle(text="ask back", support=5, members=("ask back",)),
        Principle(text="inquire", support=2, members=("inquire",)),
        Principle(text="tell a joke", support=1, members=("tell a joke",)),
        Principle(text="be brief", support=4),
    ),
)
SECOND = Constitution(
    iteration=2,
    principles=(
        Principle(text="caution people", support=12, members=("caution people", "warn of risks")),
        Principle(text="ask back", support=3, members=("ask back", "inquire")),
        Principle(text="be brief", support=4),
        Principle(text="cite sources", support=6),
    ),
)
THIRD = Constitution(iteration=3, principles=(Principle(text="cite sources", support=7),))


def test_what_became_of_every_principle() -> None:
    lines, (step,) = movement({1: FIRST, 2: SECOND})
    histories = {
        line.newest.text: ([*line.principles], line.earlier, line.events) for line in lines
    }
    assert histories == {
        "caution people": ([1, 2], [(1, "warn of risks")], [Event(2, "reworded")]),
        "cite sources": ([2], [], [Event(2, "added")]),
        "be brief": ([1, 2], [], []),
        "ask back": ([1, 2], [], []),
        "inquire": ([1], [], [Event(2, "merged", "ask back")]),
        "tell a joke": ([1], [], [Event(2, "dropped")]),
    }
    assert list(histories) == [
        "caution people", "cite sources", "be brief", "ask back", "inquire", "tell a joke",
    ], "by support at the end, then what ended"  # fmt: skip
    assert step._asdict() == {
        "before": 1, "after": 2, "kept": 3, "reworded": 1, "more": 1, "fewer": 1,
        "merged": 1, "dropped": 1, "added": 1,
    }  # fmt: skip
    assert step.kept + step.added == len(SECOND.principles)
    assert step.kept + step.merged + step.dropped == len(FIRST.principles)


def test_a_line_goes_on_over_several_iterations() -> None:
    lines, steps = movement({1: FIRST, 2: SECOND, 3: THIRD})
    by_text = {line.newest.text: line for line in lines}
    assert [p.support for p in by_text["cite sources"].principles.values()] == [6, 7]
    assert by_text["caution people"].events == [Event(2, "reworded"), Event(3, "dropped")]
    assert [s.dropped for s in steps] == [1, 3]
    ended = [max(line.principles) for line in lines]
    assert ended == sorted(ended, reverse=True)


def test_a_person_s_wording_is_followed_by_its_id() -> None:
    asked = next(p for p in FIRST.principles if p.text == "ask back")
    reviewed = Constitution(iteration=2, principles=(Principle(id=asked.id, text="ask first", support=5),))  # fmt: skip
    line = movement({1: FIRST, 2: reviewed})[0][0]
    assert (line.earlier, line.newest.text) == ([(1, "ask back")], "ask first")
    assert len(diff(FIRST, reviewed).dropped) == 4


def test_one_constitution_or_none() -> None:
    lines, steps = movement({1: FIRST})
    assert [line.newest for line in lines] == list(FIRST.principles) and not steps
    assert movement({}) == ([], [])
