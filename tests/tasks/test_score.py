"""Scores: ROUGE-L as `rouge_score` has it, embeddings, and the texts that have no score."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import score as module
from tasks.corpus import CorpusSettings, load_corpus
from tasks.records import Candidate, Mined, Scored, from_table, to_table
from tasks.score import (
    ScoreSettings,
    embedding_similarity,
    rouge_l,
    rouge_l_similarity,
    score,
    tokens,
)

NAMES = [
    "hh_harmless_base_test.jsonl.gz",
    "ultrafeedback_eval_clean.jsonl",
    "tldr_first300.csv",
    "hotpotqa_train_100.json",
]


def reference_scores(
    candidates: Sequence[str], references: Sequence[str], stem: bool
) -> list[float]:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rougeL"], use_stemmer=stem
    )
    pairs = zip(candidates, references, strict=True)
    return [scorer.score(reference, candidate)["rougeL"].fmeasure for candidate, reference in pairs]


def mined(initial: str, *refined: str, gold: str = "the cat sat on the mat") -> Mined:
    return Mined(
        prompt_id="p",
        prompt=({"role": "user", "content": "Where was the cat?"},),
        gold=gold,
        source="a:1",
        initial=initial,
        initial_finish="stop",
        initial_tokens=3,
        candidates=tuple(
            Candidate(
                sample=i, principle=f"z{i}", critique="", refined=text, finish="stop", tokens=4
            )
            for i, text in enumerate(refined)
        ),
    )


# ROUGE-L beside the reference implementation


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_real_texts_score_as_in_rouge_score(corpora: Path, name: str, stem: bool) -> None:
    rows = load_corpus([CorpusSettings(path=str(corpora / name), on_bad_row="reject")]).rows
    draw = random.Random(name)
    texts = [t for row in rows for t in (row.gold, row.prompt[-1]["content"][:600])]
    candidates, references = draw.choices(texts, k=160), draw.choices(texts, k=160)
    expected = reference_scores(candidates, references, stem)
    assert rouge_l(candidates, references, stem=stem) == expected
    assert any(expected)


ODD = [
    "",
    " \n\t",
    "!?",
    "a",
    "The cats' \u212aelvin \u0130stanbul caf\u00e9s",
    "\u2018Don\u2019t\u2019 \u2014 it\u2019s 1,000.5 snake_case",
    "\u6771\u4eac\u306b\u884c\u304f 2023",
    "\U0001f600 ok",
    "a\x00b\u2028c\xa0d",
    "\ud83d broken",
    "running runs ran news proceed agreed generically",
    "word " * 3000,
]


@pytest.mark.parametrize("stem", [False, True])
def test_odd_texts_score_as_in_rouge_score(stem: bool) -> None:
    pairs = [(a, b) for a in ODD[:-1] for b in ODD[:-1]] + [(ODD[-1], "a word"), ("", ODD[-1])]
    candidates, references = zip(*pairs, strict=True)
    assert rouge_l(candidates, references, stem=stem) == reference_scores(
        candidates, references, stem
    )


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text("abe s.yI\u0130\u00e9", max_size=60), st.booleans())
def test_any_texts_score_as_in_rouge_score(a: str, b: str, stem: bool) -> None:
    assert rouge_l([a, b], [b, b], stem=stem) == reference_scores([a, b], [b, b], stem)


def test_scores_by_hand() -> None:
    assert rouge_l(["the cat sat", "x"], ["the cat sat down", "y"]) == [2 * 1.0 * 0.75 / 1.75, 0.0]


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rouge_l(["a", "b"], ["a"])


def test_stems_stay_right_when_their_memo_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["running dogs barked loudly", "relational databases generalize"] * 3
    expected = rouge_l(texts, texts[::-1], stem=True)
    monkeypatch.setattr(module.STEMS, "limit", 2, raising=False)
    module.STEMS.clear()
    assert rouge_l(texts, texts[::-1], stem=True) == expected
    assert len(module.STEMS) <= 2


# The unicode tokenizer


def test_the_unicode_tokenizer_reads_every_script() -> None:
    assert tokens("Tokyo\u306f\u6771\u4eac", tokenizer="unicode") == [
        "tokyo",
        "\u306f",
        "\u6771",
        "\u4eac",
    ]
    assert tokens(
        "\u0928\u092e\u0938\u094d\u0924\u0947 caf\u00e9, \U0001f600!", tokenizer="unicode"
    ) == [
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "caf\u00e9",
        "\U0001f600",
    ]


def test_japanese_is_scored_by_the_unicode_tokenizer() -> None:
    same, near, far = rouge_l(
        ["\u732b\u304c\u5ea7\u3063\u305f", "\u732b\u304c\u5bdd\u305f", "\u72ac"],
        ["\u732b\u304c\u5ea7\u3063\u305f"] * 3,
        tokenizer="unicode",
    )
    assert same == 1.0
    assert 0 < near < 1
    assert far == 0.0


# Rows


def test_every_response_of_a_row_is_scored() -> None:
    (row,) = score([mined("a dog", "the cat sat on the mat", "the mat")], ScoreSettings())
    assert row.initial_score == 0.0
    assert [c.score for c in row.candidates] == [1.0, 0.5]
    assert [c.principle for c in row.candidates] == ["z0", "z1"]
    assert from_table(to_table([row], Scored), Scored) == [row]


def test_stems_count_when_asked_for() -> None:
    row = mined("cats sitting on mats", gold="cat sits on mat")
    plain, stemmed = (
        next(score([row], ScoreSettings(stem=s))).initial_score for s in (False, True)
    )
    assert (plain, stemmed) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("\u6771\u4eac\u306b\u884c\u304f", "drops 100% of its letters"),
        ("2023\u5e74\u306b\u6771\u4eac\u306b\u884c\u304d\u307e\u3057\u305f", "drops"),
        ("\U0001f600\U0001f389", "no word"),
        ("...", "no word"),
    ],
)
def test_what_the_tokenizer_empties_is_reported_not_zero(text: str, reason: str) -> None:
    (row,) = score([mined("the cat", text)], ScoreSettings())
    assert row.initial_score is not None
    assert row.candidates[0].score is None
    assert reason in (row.candidates[0].unscored or "")


def test_an_unreadable_gold_leaves_the_row_unscored() -> None:
    (row,) = score([mined("the cat", "a mat", gold="\u732b")], ScoreSettings())
    assert row.initial_score is None
    assert (row.initial_unscored or "").startswith("gold: ")
    assert [c.score for c in row.candidates] == [None]


def test_accents_do_not_make_a_text_unreadable() -> None:
    (found,) = rouge_l_similarity()("le caf\u00e9 est pr\u00eat", ["le caf\u00e9 est pr\u00eat"])
    assert found.value == 1.0


def test_rows_are_streamed() -> None:
    def rows() -> Iterator[Mined]:
        yield mined("the cat")
        raise AssertionError("the second row was read too early")

    assert next(score(rows(), ScoreSettings())).initial_score is not None


# Embeddings


class Letters:
    """Embeds a text by its counts of a, b and c; "nan" and "zero" cannot be embedded."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.seen += texts
        rows = np.array([[t.count(c) for c in "abc"] for t in texts], dtype=float)
        rows[[i for i, t in enumerate(texts) if t == "nan"]] = np.nan
        return rows


def test_cosine_of_embeddings_each_text_embedded_once() -> None:
    embed, rows = Letters(), [mined("a", "aab", "b", "a", gold="a")] * 3
    scored = list(score(rows, ScoreSettings(similarity="embedding"), embed))
    assert scored[2].initial_score == 1.0
    assert [c.score for c in scored[2].candidates] == [pytest.approx(2 / 5**0.5), 0.0, 1.0]
    assert sorted(embed.seen) == ["a", "aab", "b"]


def test_opposite_embeddings_score_zero() -> None:
    similarity = embedding_similarity(lambda texts: np.array([[1.0], [-1.0]])[: len(texts)])
    assert similarity("x", ["y"])[0].value == 0.0


def test_a_failed_embedding_is_reported_not_zero() -> None:
    empty, nan, zero, good = embedding_similarity(Letters())("a", [" ", "nan", "zero", "ab"])
    assert [s.value for s in (empty, nan, zero)] == [None, None, None]
    assert "empty" in (empty.unscored or "")
    assert "not finite" in (nan.unscored or "")
    assert "zero" in (zero.unscored or "")
    assert good.value == pytest.approx(0.5**0.5)
    assert "gold: " in (embedding_similarity(Letters())("zero", ["a"])[0].unscored or "")


def test_remembered_embeddings_are_bounded_and_stay_right() -> None:
    similarity = embedding_similarity(Letters(), remembered=1)
    for _ in range(3):
        assert [s.value for s in similarity("a", ["a", "b", "c"])] == [1.0, 0.0, 0.0]


def test_an_embedder_that_loses_a_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        embedding_similarity(lambda texts: np.ones((1, 3)))("a", ["b"])


def test_the_embedding_similarity_needs_an_embedder() -> None:
    with pytest.raises(ValueError, match="embedder"):
        next(score([mined("a")], ScoreSettings(similarity="embedding")))
