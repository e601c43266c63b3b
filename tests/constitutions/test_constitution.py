"""The constitution file: exact round trip, readable, and clear about a bad hand edit."""

import re
from pathlib import Path

import pytest

from constitutions.constitution import (
    Constitution,
    Principle,
    Tail,
    diff,
    load,
    load_draft,
    markdown,
    markdown_text,
    principle_id,
    principle_key,
    save,
)
from constitutions.errors import UserError
from constitutions.review import described

TRICKY = (
    "Be clear: use headings.",
    "yes",
    "# not a comment",
    "日本語 😀",
    "- a\nb",
    '"quoted" | bar',
)


def _constitution() -> Constitution:
    tricky = [Principle(text=text, support=i) for i, text in enumerate(TRICKY)]
    full = Principle(
        text="warn against harm",
        support=40,
        share=1 / 3,
        example="0f3a",
        members=("warn against harm", "mention: risks", "1.5"),
    )
    return Constitution(experiment="on: off", iteration=3, principles=(*tricky, full))


def _refused(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(path)
    return str(caught.value)


def test_a_saved_constitution_loads_exactly(tmp_path: Path) -> None:
    path = tmp_path / "constitution.yaml"
    save(_constitution(), path)
    assert load(path) == _constitution()
    first = path.read_bytes()
    save(load(path), path)
    assert path.read_bytes() == first


def test_the_file_is_plain_block_yaml_by_support(tmp_path: Path) -> None:
    path = tmp_path / "constitution.yaml"
    save(_constitution(), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "  text: warn against harm" in lines
    assert "  - 'mention: risks'" in lines
    assert "日本語 😀" in path.read_text(encoding="utf-8")
    assert not any("{" in line or "[" in line for line in lines)
    supports = [int(line.split()[1]) for line in lines if line.startswith("  support:")]
    assert supports == sorted(supports, reverse=True)


def test_a_person_needs_to_write_the_texts_only(tmp_path: Path) -> None:
    path = tmp_path / "constitution.yaml"
    path.write_text("principles:\n- text: be honest\n- text: Be brief.\n", encoding="utf-8")
    loaded = load(path)
    assert loaded.texts == ("Be brief.", "be honest")
    assert loaded.principles[1].id == principle_id("be honest")


def test_spellings_share_an_id_and_wordings_do_not() -> None:
    assert principle_id("Be  honest.") == principle_id("be honest") != principle_id("be brief")
    assert principle_key("...") == "..."


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "principles:\n- text: a\n- text: b\n  txet: c\n",
            4,
            "unknown key; expected one of id, text",
        ),
        ("principles:\n- text: a\n- support: 3\n", 3, "principle 2, 'text': it is missing"),
        ("principles:\n- text: ' '\n", 2, "the text is empty"),
        ("principles:\n- text: yes\n", 2, "this is not a text"),
        ("principles:\n- text: a\n  support: many\n", 3, "a valid integer"),
        ("principles:\n- text: a\n  share: 2\n", 3, "less than or equal to 1"),
        ("principles:\n- text: a\n  members: b\n", 3, "this is not a list"),
        ("principles:\n- text: a\n- b\n", 3, "this is not a principle"),
        ("principles:\n- text: Be kind.\n- text: be kind\n", 3, "the same text as principle 1"),
        ("principles:\n- id: a\n  text: b\n- id: a\n  text: c\n", 4, "the same id as principle 1"),
        ("principles:\n- text: a\n  text: b\n", 3, "'text' is given twice"),
        ("principles:\n- text: a: b\n", 2, "put a text that holds ': ' or '#' in quotes"),
        ("principles: 3\n", 1, "this is not a list"),
        (
            "principles:\n- text: a\n  antithesis: A.\n",
            3,
            "the same as the text of its own principle; word the opposite",
        ),
        (
            "principles:\n- text: a\n  antithesis: b\n- text: B\n",
            3,
            "principle 1, 'antithesis': the same as the text of principle 2",
        ),
        (
            "principles:\n- text: a\n  antithesis: c\n- text: b\n  antithesis: C\n",
            5,
            "the same as the antithesis of principle 1",
        ),
        ("principles:\n- text: a\n  antithesis: ' '\n", 3, "'antithesis': the text is empty"),
        ("principles:\n- text: a\n  antithesis: no\n", 3, "this is not a text"),
    ],
)
def test_a_bad_edit_is_named_by_line_and_field(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    message = _refused(tmp_path / "edited.yaml", text)
    assert f"edited.yaml, line {line}" in message
    assert said in message


def test_all_bad_entries_are_named_at_once(tmp_path: Path) -> None:
    message = _refused(tmp_path / "c.yaml", "principles:\n- text: 3\n- support: 1\n- text: ''\n")
    assert [f"line {n}" in message for n in (2, 3, 4)] == [True] * 3


def test_all_repetitions_are_named_at_once(tmp_path: Path) -> None:
    text = "principles:\n- {id: x, text: a, antithesis: b}\n- {id: x, text: A, antithesis: B}\n"
    message = _refused(tmp_path / "c.yaml", text)
    assert [f"'{field}'" in message for field in ("text", "antithesis", "id")] == [True] * 3


def test_an_antithesis_stands_after_its_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    kind = Principle(text="be kind", antithesis="be: unkind", support=2)
    pairs = Constitution(principles=(kind, Principle(text="be brief")))
    save(pairs, path)
    lines = path.read_text("utf-8").splitlines()
    assert lines[lines.index("  text: be kind") + 1] == "  antithesis: 'be: unkind'"
    assert any(line.startswith("#   oppose ") for line in lines)
    assert load(path) == pairs
    save(Constitution(principles=(Principle(text="be brief"),)), path)
    assert "oppose" not in path.read_text("utf-8"), "the header says what there is"


def test_the_header_offers_a_merge_where_a_review_can_do_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for support in (0, 1):
        save(Constitution(principles=(Principle(text="be kind", support=support),)), path)
        assert ("#   merge " in path.read_text("utf-8")) == bool(support)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_another_document_is_refused(tmp_path: Path, text: str) -> None:
    assert "this is not a constitution" in _refused(tmp_path / "c.yaml", text)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="this is a directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"principles:\n- text: caf\xe9\n")
    with pytest.raises(UserError, match=r"byte 23: the text is not UTF-8"):
        load(tmp_path / "latin.yaml")


def test_diff_follows_ids() -> None:
    kept, dropped = Principle(text="be kind"), Principle(text="be brief")
    old = Constitution(principles=(kept, dropped))
    reworded = kept.model_copy(update={"text": "be gentle"})
    added = Principle(text="be honest")
    changes = diff(old, Constitution(principles=(reworded, added)))
    assert (changes.added, changes.dropped) == ((added,), (dropped,))
    assert changes.reworded == ((kept, reworded),)


def test_another_antithesis_is_a_change_and_no_rewording() -> None:
    plain = Principle(text="be kind")
    opposed = plain.model_copy(update={"antithesis": "be rude"})
    changes = diff(Constitution(principles=(plain,)), Constitution(principles=(opposed,)))
    assert changes.opposed == ((plain, opposed),)
    assert not (changes.reworded or changes.added or changes.dropped)
    same = diff(Constitution(principles=(opposed,)), Constitution(principles=(opposed,)))
    assert not same.opposed


def test_markdown_shows_antitheses_where_there_are_any() -> None:
    kind = Principle(text="be kind", antithesis="be | rude", support=2)
    head, _, first, second = markdown(
        Constitution(principles=(kind, Principle(text="be brief")))
    ).splitlines()
    assert head.startswith("| # | principle | antithesis | share |")
    assert first.startswith("| 1 | be kind | be \\| rude | 0.0% |")
    assert second.startswith("| 2 | be brief |  | 0.0% |")
    assert "antithesis" not in markdown(_constitution())


def test_markdown_has_one_row_a_principle() -> None:
    table = markdown(_constitution(), wordings=1).splitlines()
    assert len(table) == 2 + len(_constitution().principles)
    assert table[2] == "| 1 | warn against harm | 33.3% | 40 | mention: risks (+1) |"
    assert all(row.replace("\\|", "").count("|") == 6 for row in table)


def _principle(text: str, support: int, *members: str) -> Principle:
    return Principle(text=text, support=support, members=(text, *members))


def test_diff_knows_a_principle_by_its_wordings_where_the_id_has_changed() -> None:
    warn, hush = _principle("warn", 9, "alert", "caution"), _principle("hush", 1)
    ask, query = _principle("ask", 5, "enquire"), _principle("query", 3, "probe")
    joke = _principle("joke", 2)
    alert = _principle("alert", 12, "warn", "shout")  # the same, another representative
    both = _principle("ask", 9, "query", "probe")  # two became one
    pun = _principle("pun", 2)
    changes = diff(
        Constitution(principles=(warn, ask, query, joke, hush)),
        Constitution(principles=(alert, both, pun, hush)),
    )
    assert changes.reworded == ((warn, alert),)
    assert changes.merged == ((query, both),)
    assert (changes.added, changes.dropped) == ((pun,), (joke,))
    assert changes.support_changed == ((warn, alert), (ask, both))


def test_one_stray_wording_is_no_kinship() -> None:
    old = _principle("a", 3, "b", "c", "d")
    new = _principle("x", 3, "d", "y", "z")
    changes = diff(Constitution(principles=(old,)), Constitution(principles=(new,)))
    assert (changes.added, changes.dropped) == ((new,), (old,))
    half = _principle("x", 3, "c", "d", "z")
    assert diff(Constitution(principles=(old,)), Constitution(principles=(half,))).reworded


def test_the_nearest_of_several_heirs() -> None:
    old = _principle("a", 3, "b", "c")
    holds_text, holds_more = _principle("x", 2, "a"), _principle("b", 1, "c")
    changes = diff(
        Constitution(principles=(old,)), Constitution(principles=(holds_text, holds_more))
    )
    assert changes.reworded == ((old, holds_text),)
    assert changes.added == (holds_more,)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b\n# c", r"a \| b \# c"),
        ("<script>[x](javascript:y)", r"\<script\>\[x\]\(javascript:y\)"),
        ("*b* _i_ `c` ~s~ \\", r"\*b\* \_i\_ \`c\` \~s\~ " + "\\\\"),
        ("see https://e.example, www.e.example", r"see https:\//e.example, www\.e.example"),
        ("left\u202eright", "left right"),
        ("warn: be 3.5 times safer", "warn: be 3.5 times safer"),
    ],
)
def test_foreign_text_is_only_text_in_markdown(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


TAIL = Tail(principles=900, support=1000, share=0.09)


def test_a_tail_is_saved_counted_and_named(tmp_path: Path) -> None:
    principle = Principle(text="warn", support=9000, share=0.91)
    bounded = Constitution(principles=(principle,), tail=TAIL)
    save(bounded, tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml") == bounded
    head = (tmp_path / "c.yaml").read_text().splitlines()
    assert head[0] == (
        "# 1 principles label 91.0% of the trajectories. The tail, 9.0%, keeps its own words: "
        "900 principles of 1,000 trajectories. To edit:"
    )
    assert "write 'tail: drop'" in "".join(head[:6])
    save(Constitution(principles=(principle,)), tmp_path / "c.yaml")
    assert "tail" not in (tmp_path / "c.yaml").read_text()


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("drop", "line 2, 'tail': this is not a tail; expected its figures as they were"),
        ("{principles: 1, support: 1, share: 2.0}", "line 2, 'tail'"),
        ("{principles: 1, support: 1, share: 0.5, x: 1}", "one of principles, support, share"),
    ],
)
def test_a_damaged_tail_is_named(tmp_path: Path, tail: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(f"iteration: 1\ntail: {tail}\nprinciples:\n- text: a\n")
    with pytest.raises(UserError, match=re.escape(said)):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (
            "gone",
            "line 2, 'tail': this is not a tail; expected its figures as they were, 'keep' or",
        ),
        ("{principles: 1, support: 1, share: 2.0}", "line 2, 'tail'"),
        ("{principles: 1, support: 1, share: 0.5, x: 1}", "one of principles, support, share"),
    ],
)
def test_an_edited_tail_is_figures_or_a_word(tmp_path: Path, tail: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"iteration: 1\ntail: {tail}\nprinciples:\n- text: a\n")
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        load_draft(file)
    assert len(str(refused.value).splitlines()) == 1, "said once"
    for word in ("keep", "drop"):
        file.write_text(f"tail: {word}\nprinciples:\n- text: a\n")
        assert load_draft(file).tail == word


def test_a_file_lists_some_wordings_and_says_how_many_there_are(tmp_path: Path) -> None:
    many = Principle(text="warn", members=("warn", "alert"), wordings=900)
    few = Principle(text="ask", members=("ask",))
    save(Constitution(principles=(many, few)), tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml") == Constitution(principles=(many, few))
    assert (tmp_path / "c.yaml").read_text().count("wordings") == 1
    table = markdown(Constitution(principles=(many, few)), wordings=3).splitlines()
    assert table[3].endswith("| alert (+898) |") and table[2].endswith("|  |")


def test_a_dropped_tail_is_a_change() -> None:
    principle = Principle(text="warn", support=9000, share=0.91)
    bounded = Constitution(principles=(principle,), tail=TAIL)
    free = Constitution(principles=(principle,))
    assert described(diff(bounded, free)) == [
        "dropped: the tail, 900 principles of 1,000 trajectories"
    ]
    assert described(diff(bounded, bounded)) == described(diff(free, bounded)) == []
