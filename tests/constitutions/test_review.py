"""Decisions on a constitution: what they make of it, which are refused, what an edited file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from constitutions.constitution import Constitution, Principle, diff, load, load_draft, save
from constitutions.errors import UserErrors
from constitutions.review import Decision, apply, decisions_between, described, effective

WARN = Principle(id="w", text="warn", support=4, share=0.4, example="1", members=("warn", "alert"))
ASK = Principle(id="a", text="ask", support=3, share=0.3, example="2", members=("ask",))
JOKE = Principle(id="j", text="joke", support=2, share=0.2, example="3", members=("joke", "pun"))
OLD = Constitution(experiment="e", iteration=2, principles=(WARN, ASK, JOKE))


def _drop(id: str) -> Decision:
    return Decision(id=id, action="drop")


def _merge(id: str, into: str) -> Decision:
    return Decision(id=id, action="merge", into=into)


def _reword(id: str, text: str) -> Decision:
    return Decision(id=id, action="reword", text=text)


def test_no_decision_approves() -> None:
    assert apply(OLD, []) == (OLD, {"w": "w", "a": "a", "j": "j"})
    assert apply(OLD, [Decision(id="w")])[0] == OLD


def test_a_merged_principle_gives_all_it_has_to_its_target() -> None:
    new, places = apply(OLD, [_merge("j", "a")])
    assert places == {"w": "w", "a": "a", "j": "a"}
    whole = new.principles[0]
    assert (whole.id, whole.text, whole.support, whole.share) == ("a", "ask", 5, 0.5)
    assert whole.members == ("ask", "joke", "pun")
    assert new.texts == ("ask", "warn")  # by support, as ever


def test_a_reworded_principle_keeps_its_id_and_its_old_wording_as_a_member() -> None:
    new, _ = apply(OLD, [_reword("a", " ask\n back "), _drop("w")], added=["be brief"])
    assert [(p.id, p.text) for p in new.principles[:2]] == [("a", "ask back"), ("j", "joke")]
    assert new.principles[0].members == ("ask",)
    assert (new.principles[2].text, new.principles[2].support) == ("be brief", 0)


@pytest.mark.parametrize(
    ("decisions", "added", "said"),
    [
        ([_drop("x")], [], "decision on 'x': there is no such principle; expected one of w, a, j"),
        ([_drop("a"), _reword("a", "b")], [], "“ask” (a): decided more than once"),
        ([_merge("a", "a")], [], "“ask” (a): merged into itself"),
        ([_merge("a", "x")], [], "“ask” (a): merged into 'x', which is not there"),
        ([_merge("a", "w"), _drop("w")], [], "“ask” (a): merged into “warn”, which is dropped"),
        ([_merge("a", "w"), _merge("w", "j")], [], "itself merged; expected a principle that stays; merge both into “joke”"),
        ([_merge("a", "w"), _merge("w", "a")], [], "“warn” (w): merged into “ask”, which is itself merged"),
        ([_reword("a", " ")], [], "“ask” (a): the wording is empty"),
        ([_reword("a", "Warn.")], [], "“ask” (a): the same wording, “Warn.”, as “warn” (w)"),
        ([], ["b", "B."], "an added principle: the same wording"),
        ([_drop("w"), _drop("a"), _drop("j")], [], "every principle is dropped"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(
    decisions: list[Decision], added: list[str], said: str
) -> None:
    with pytest.raises(UserErrors) as caught:
        apply(OLD, decisions, added)
    assert said in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        apply(OLD, [_drop("x"), _merge("w", "w"), _reword("a", "")], ["", "c", "c"])
    assert len(caught.value.errors) == 5


def test_a_changed_principle_cannot_be_added_again() -> None:
    kind = Principle(text="be kind", support=1)
    old = Constitution(principles=(kind, WARN))
    with pytest.raises(UserErrors, match="changed and added again"):
        apply(old, [_reword(kind.id, "be gentle")], ["Be kind"])


def test_the_same_decisions_are_the_same_whatever_else_was_filled_in() -> None:
    one = [_drop("w"), Decision(id="a", text="left over"), _merge("j", "a")]
    two = [Decision(id="j", action="merge", into="a", text="joke"), _drop("w")]
    assert effective(one) == effective(two) == [_merge("j", "a"), _drop("w")]


def _edit(tmp_path: Path, text: str, shown: Constitution | None = None) -> object:
    path = tmp_path / "edited.yaml"
    path.write_text(text, encoding="utf-8")
    return decisions_between(OLD, load_draft(path), shown)


def test_an_edited_file_says_what_was_done(tmp_path: Path) -> None:
    reworded = "principles:\n- {id: w, text: warn of risks}\n- {id: a, text: ask}\n- {id: j, text: joke, into: w}\n"
    assert _edit(tmp_path, reworded) == ([_reword("w", "warn of risks"), _merge("j", "w")], [])
    dropped = "principles:\n- {id: a, text: ask}\n- text: be brief\n"
    assert _edit(tmp_path, dropped) == ([_drop("w"), _drop("j")], ["be brief"])


def test_a_file_that_nobody_touched_says_nothing(tmp_path: Path) -> None:
    save(OLD, tmp_path / "c.yaml")
    assert decisions_between(OLD, load_draft(tmp_path / "c.yaml")) == ([], [])


def test_a_reviewed_file_repeats_its_review(tmp_path: Path) -> None:
    """The second edit starts from what the first one left, and is held against the original."""
    decisions = [_reword("w", "warn of risks"), _merge("j", "a")]
    reviewed, _ = apply(OLD, decisions, ["be brief"])
    save(reviewed, tmp_path / "c.yaml")
    again = decisions_between(OLD, load_draft(tmp_path / "c.yaml"), reviewed)
    assert again == ([_reword("w", "warn of risks"), _merge("j", "a")], ["be brief"])
    text = (tmp_path / "c.yaml").read_text("utf-8").replace("text: be brief", "text: be short")
    assert _edit(tmp_path, text, reviewed) == (again[0], ["be short"])
    undone = text + "- id: j\n  text: joke\n"
    assert _edit(tmp_path, undone, reviewed) == ([_reword("w", "warn of risks")], ["be short"])


def test_a_mistyped_id_is_no_new_principle(tmp_path: Path) -> None:
    with pytest.raises(UserErrors, match="the id 'ww' belongs to no principle"):
        _edit(tmp_path, "principles:\n- {id: ww, text: warn}\n- {id: a, text: ask}\n")


def test_only_a_draft_may_merge(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("principles:\n- {text: a, into: b}\n")
    with pytest.raises(UserErrors, match="unknown key"):
        load(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("principles:\n- {text: a, onto: b}\n")
    with pytest.raises(UserErrors, match=r"one of .*into"):
        load_draft(tmp_path / "d.yaml")


def test_the_diff_of_a_review_tells_what_was_decided() -> None:
    new, _ = apply(OLD, [_reword("w", "warn of risks"), _merge("j", "a")], ["be brief"])
    changes = diff(OLD, new)
    assert described(changes) == [
        "added: be brief",
        "reworded: warn → warn of risks",
        "merged: joke → ask",
    ]
    assert [(was.id, was.support, now.support) for was, now in changes.support_changed] == [
        ("a", 3, 5)
    ]


PAIRS = Constitution(
    principles=(
        WARN.model_copy(update={"antithesis": "never warn"}),
        ASK.model_copy(update={"antithesis": "never ask"}),
        JOKE,
    )
)


def _antitheses(constitution: Constitution) -> dict[str, str]:
    return {p.id: p.antithesis for p in constitution.principles}


def test_an_antithesis_stays_with_its_text() -> None:
    new, _ = apply(PAIRS, [_merge("j", "a"), _reword("w", "warn of risks")])
    assert _antitheses(new) == {"a": "never ask", "w": ""}, "nobody has opposed the new wording"
    same, _ = apply(PAIRS, [_reword("w", "warn")])
    assert same == PAIRS
    both = Decision(id="w", action="reword", text="warn of risks", antithesis=" hide\nrisks ")
    assert _antitheses(apply(PAIRS, [both])[0])["w"] == "hide risks"


def test_another_antithesis_leaves_the_rest_as_it_was() -> None:
    other = Decision(id="w", action="reword", text="warn", antithesis="play risks down")
    new, _ = apply(PAIRS, [other])
    assert new.principles[0] == WARN.model_copy(update={"antithesis": "play risks down"})
    assert effective([other]) == [other]
    assert described(diff(PAIRS, new)) == ["antithesis of warn: never warn → play risks down"]


def test_an_antithesis_that_is_there_already_is_refused() -> None:
    with pytest.raises(UserErrors) as caught:
        apply(PAIRS, [_reword("j", "Never ask.")], ["never warn"])
    said = str(caught.value)
    assert "the antithesis of “ask” (a): the same wording, “never ask”, as “joke” (j)" in said
    assert "the antithesis of “warn” (w): the same wording" in said
    assert not apply(PAIRS, [_drop("a"), _reword("j", "never ask")])[0].principles[1].antithesis


def test_an_edited_file_says_which_antitheses_hold(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    save(PAIRS, path)
    assert decisions_between(PAIRS, load_draft(path)) == ([], [])
    original = path.read_text("utf-8")
    for edit, expected in (
        (("antithesis: never warn", "antithesis: hush"), ("warn", "hush")),
        (("  antithesis: never warn\n", ""), ("warn", "")),
        (("text: warn", "text: warn of risks"), ("warn of risks", "never warn")),
        (("text: warn\n  antithesis: never warn", "text: alarm"), ("alarm", "")),
    ):
        path.write_text(original.replace(*edit), encoding="utf-8")
        decisions, _ = decisions_between(PAIRS, load_draft(path))
        (kept,) = (p for p in apply(PAIRS, decisions)[0].principles if p.id == "w")
        assert (kept.text, kept.antithesis) == expected


def test_the_antithesis_of_an_added_principle_is_not_lost_silently(tmp_path: Path) -> None:
    save(PAIRS, tmp_path / "pairs.yaml")
    text = (tmp_path / "pairs.yaml").read_text("utf-8")
    (tmp_path / "pairs.yaml").write_text(text + "- {text: be brief, antithesis: be long}\n")
    with pytest.raises(UserErrors, match="“be brief”: a review does not keep the antithesis"):
        decisions_between(PAIRS, load_draft(tmp_path / "pairs.yaml"))
