"""Scores: ROUGE-L as `rouge_score` has it, embeddings, and the texts that have no score."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_model import build_chat_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import turns_of

from constitutions.errors import UserError
from models.engine.local import LocalPolicy
from models.judges import llm as llm_judge
from models.judges.absolute import AbsoluteJudge
from models.judges.base import Pair
from models.judges.registry import JudgeSettings
from models.judges.rubrics import PRINCIPLE
from models.judges.similarity import GoldSimilarity
from models.policy import Completion, Message, PolicySettings, Progress, Request, Scoring
from tasks.corpus.prompts import CorpusSettings, load_corpus
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import Candidate, Mined, Scored, Scores, from_table, to_table
from tasks.score import ScoreSettings, score, score_stage
from tasks.similarity import rouge
from tasks.similarity.embedding import Embedding
from tasks.similarity.judge import JudgeGrade
from tasks.similarity.registry import open_similarity
from tasks.similarity.rouge import RougeL, RougeSettings, rouge_l, tokens
from tasks.similarity.sentences import Sentences

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


def scored(rows: Iterable[Mined], settings: ScoreSettings | None = None) -> list[Scores]:
    return score(open_similarity(settings or ScoreSettings()), rows)


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
    monkeypatch.setattr(rouge.STEMS, "limit", 2, raising=False)
    rouge.STEMS.clear()
    assert rouge_l(texts, texts[::-1], stem=True) == expected
    assert len(rouge.STEMS) <= 2


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
    asked = mined("a dog", "the cat sat on the mat", "the mat")
    (row,) = scored([asked])
    assert row.initial_score == 0.0
    assert [c.score for c in row.candidates] == [1.0, 0.5]
    assert from_table(to_table([row], Scores), Scores) == [row]
    joined = Scored.of(asked, row)
    assert [(c.principle, c.score) for c in joined.candidates] == [("z0", 1.0), ("z1", 0.5)]
    for other in (replace(asked, prompt_id="q"), replace(asked, candidates=())):
        with pytest.raises(ValueError, match="are not of"):
            Scored.of(other, row)


def test_stems_count_when_asked_for() -> None:
    row = mined("cats sitting on mats", gold="cat sits on mat")
    plain, stemmed = (scored([row], ScoreSettings(stem=s))[0].initial_score for s in (False, True))
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
    (row,) = scored([mined("the cat", text)])
    assert row.initial_score is not None
    assert row.candidates[0].score is None
    assert reason in (row.candidates[0].unscored or "")


def test_an_unreadable_gold_leaves_the_row_unscored() -> None:
    (row,) = scored([mined("the cat", "a mat", gold="\u732b")])
    assert row.initial_score is None
    assert (row.initial_unscored or "").startswith("gold: ")
    assert [c.score for c in row.candidates] == [None]


def test_accents_do_not_make_a_text_unreadable() -> None:
    (found,) = RougeL(RougeSettings()).compare(
        "le caf\u00e9 est pr\u00eat", ["le caf\u00e9 est pr\u00eat"]
    )
    assert found.value == 1.0


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


def embedded_by(embed: Any) -> Embedding:
    """The similarity "embedding" with another model."""
    found = Embedding(ScoreSettings(similarity="embedding"))
    found.embed = embed
    return found


def test_cosine_of_embeddings_each_text_embedded_once() -> None:
    embed, rows = Letters(), [mined("a", "aab", "b", "a", gold="a")] * 3
    found = score(embedded_by(embed), rows)
    assert found[2].initial_score == 1.0
    assert [c.score for c in found[2].candidates] == [pytest.approx(2 / 5**0.5), 0.0, 1.0]
    assert sorted(embed.seen) == sorted(["a", "aab", "b"] * 3), "once in each row"


def test_opposite_embeddings_score_zero() -> None:
    similarity = embedded_by(lambda texts: np.array([[1.0], [-1.0]])[: len(texts)])
    assert similarity.compare("x", ["y"])[0].value == 0.0


def test_a_failed_embedding_is_reported_not_zero() -> None:
    empty, nan, zero, good = embedded_by(Letters()).compare("a", [" ", "nan", "zero", "ab"])
    assert [s.value for s in (empty, nan, zero)] == [None, None, None]
    assert "empty" in (empty.unscored or "")
    assert "not finite" in (nan.unscored or "")
    assert "zero" in (zero.unscored or "")
    assert good.value == pytest.approx(0.5**0.5)
    (no_gold,) = embedded_by(Letters()).compare("zero", ["a"])
    assert "gold: its embedding is zero" in (no_gold.unscored or "")


def test_a_score_does_not_depend_on_what_was_scored_before_it() -> None:
    """A killed stage goes on in a new process, and batches change a vector's last digits."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(texts) * 1e-3, 1.0, float(t.count("b"))] for t in texts])

    rows = [mined("a", "b", gold="a"), mined("a", "c", "b", gold="a")]
    one, two = score(embedded_by(embed), rows), score(embedded_by(embed), rows[1:])
    assert one[1] == two[0]


def test_an_embedder_that_loses_a_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        embedded_by(lambda texts: np.ones((1, 3))).compare("a", ["b"])


# Sentences


def by_sentences(embed: Any) -> Sentences:
    found = Sentences(ScoreSettings(similarity="sentences"))
    found.embed = embed
    return found


def test_sentences_match_each_other_in_any_order() -> None:
    embed = Letters()
    same, half, more, none = by_sentences(embed).compare("a. b.", ["b. a.", "a.", "a. b. c.", "c."])
    assert same.value == pytest.approx(1.0)
    assert half.value == pytest.approx(2 * 0.5 / 1.5), "recall 1/2, precision 1"
    assert more.value == pytest.approx(2 * (2 / 3) / (1 + 2 / 3)), "recall 1, precision 2/3"
    assert none.value == 0.0
    assert sorted(embed.seen) == ["a.", "b.", "c."]


def test_a_sentence_without_an_embedding_is_left_out() -> None:
    left_out, none, empty = by_sentences(Letters()).compare("a.", ["a.\nzero", "zero", " "])
    assert left_out.value == pytest.approx(1.0)
    assert (none.value, none.unscored) == (None, "its embedding is zero or not finite")
    assert (empty.value, empty.unscored) == (None, "the text is empty")
    (no_gold,) = by_sentences(Letters()).compare(" ", ["a."])
    assert no_gold.unscored == "gold: the text is empty"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two!  Three?\n\n- four\n", ["One.", "Two!", "Three?", "- four"]),
        ("It costs 3.50 euros.", ["It costs 3.50 euros."]),
        ("好。很好！", ["好。", "很好！"]),
    ],
)
def test_what_a_sentence_is(text: str, found: list[str]) -> None:
    assert Sentences.parts(text) == found


# Several golds


def test_the_nearest_of_several_golds_counts() -> None:
    """For each response by itself; a gold that cannot be read is left out where others can be."""
    row = replace(
        mined("the red cat", "a blue dog"), gold="a blue dog", other_golds=("the red cat",)
    )
    (found,) = score(open_similarity(ScoreSettings()), [row])
    assert (found.initial_score, found.candidates[0].score) == (1.0, 1.0)
    (alone,) = score(open_similarity(ScoreSettings()), [replace(row, other_golds=())])
    assert alone.initial_score == 0.0
    (found,) = score(open_similarity(ScoreSettings()), [replace(row, gold="東京に行く")])
    assert (found.initial_score, found.initial_unscored) == (1.0, None)
    (found,) = score(open_similarity(ScoreSettings()), [replace(row, initial=" ")])
    assert (found.initial_score, found.initial_unscored) == (None, "the text is empty")
    similarity = embedded_by(Letters())
    assert [s.value for s in similarity.best(["a", "nan", "b"], ["a", "bb", "c"])] == [1, 1, 0]
    (none,) = similarity.best(["zero", "nan"], ["a"])
    assert none.value is None and (none.unscored or "").startswith("gold: ")


def test_the_judge_by_similarity_takes_the_nearest_gold() -> None:
    judge = GoldSimilarity(open_similarity(ScoreSettings()).best, "rouge_l")
    pair = Pair(prompt=mined("").prompt, gold="a blue dog", ours="the red cat", theirs="a blue hat")
    (verdict,) = judge.compare([pair])
    assert verdict.outcome == 0
    (verdict,) = judge.compare([replace(pair, other_golds=("the red cat",))])
    assert (verdict.outcome, verdict.our_score) == (1, 1.0)


def test_rows_without_further_golds_are_read() -> None:
    """As earlier versions recorded them."""
    row = mined("a")
    table = to_table([row], Mined)
    assert from_table(table.drop_columns(["other_golds"]), Mined) == [row]
    several = replace(row, other_golds=("b", "c"))
    assert from_table(to_table([row, several], Mined), Mined) == [row, several]


PARAPHRASES = (
    ("It also helps the environment.", "It is good for the environment."),
    ("It costs about five dollars.", "The price is around $5."),
    ("Do you want me to go on?", "Shall I continue?"),
    ("Be careful, it can be dangerous.", "There is some risk in it."),
)
"""A gold sentence, and one that obeys the same rule in other words."""
ANSWER = "Bring a map, and start early."
MODEL = "STAPLE_TEST_EMBEDDER"


@pytest.mark.slow
@pytest.mark.skipif(MODEL not in os.environ, reason=f"{MODEL} names no all-MiniLM-L6-v2")
def test_minilm_sees_obedience_in_other_words() -> None:
    """It finds three of four paraphrases nearer than an answer without the sentence, and than those
    that obey another rule; ROUGE-L one, which has the rule's own word."""
    by_minilm = ScoreSettings(similarity="embedding", embedding_model=os.environ[MODEL])
    found: dict[str, list[bool]] = {}
    for name, chosen in (("minilm", by_minilm), ("rouge", ScoreSettings())):
        similarity = open_similarity(chosen)
        for number, (gold, other) in enumerate(PARAPHRASES):
            wrong = [texts[1] for n, texts in enumerate(PARAPHRASES) if n != number]
            texts = [f"{ANSWER} {other}", ANSWER, *(f"{ANSWER} {text}" for text in wrong)]
            obeys, *others = (s.value or 0 for s in similarity.compare(f"{ANSWER} {gold}", texts))
            found.setdefault(name, []).append(obeys > max(others))
            print(f"{name}: {obeys:.2f}, else at most {max(others):.2f}: {other}")
    assert found == {"minilm": [True, True, True, False], "rouge": [True, False, False, False]}


# An LLM judge

ENGINE = PolicySettings(model="owner/judge", device="cpu", dtype="float32", quantization="none")
JUDGE = JudgeSettings(kind="absolute", policy=ENGINE, max_tokens=12)
BY_JUDGE = ScoreSettings(similarity="judge", judge=JUDGE)


class Grading:
    """A policy that ends its judgement of a response with what the test wants said of it."""

    def __init__(self, **said: str) -> None:
        self.said, self.requests, self.calls = said, list[Request](), 0

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls += 1
        self.requests += requests
        if progress:
            progress(len(requests))
        said = [self.said[self.response(request)] for request in requests]
        return [[Completion(text=t, tokens=5, logprob=0.0, finish="stop")] for t in said]

    @staticmethod
    def response(request: Request) -> str:
        text = turns_of(request)[0]["content"]
        return text.split("###Response to evaluate:\n> ")[1].split("\n\n###")[0]

    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        raise AssertionError("a judge is only asked to generate")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("a judge is only asked to generate")


def judged(
    policy: Grading, rows: Iterable[Mined], advance: Progress | None = None, seed: int = 0
) -> list[Scores]:
    similarity = JudgeGrade(BY_JUDGE)
    assert BY_JUDGE.judge is not None
    similarity.judge = AbsoluteJudge(policy, BY_JUDGE.judge, seed=seed)
    return score(similarity, rows, advance)


def test_grades_become_scores_in_the_order_of_the_responses() -> None:
    policy = Grading(**{name: f"Fine. [RESULT] {n}" for n, name in enumerate("abcde", start=1)})
    rows = [mined("c", "a", "e", "b"), mined("d", "d", "a")]
    first, second = judged(policy, rows)
    assert (first.initial_score, [c.score for c in first.candidates]) == (0.5, [0.0, 1.0, 0.25])
    assert (second.initial_score, [c.score for c in second.candidates]) == (0.75, [0.75, 0.0])
    assert [c.sample for c in first.candidates] == [0, 1, 2]


def test_the_judge_reads_the_prompt_and_the_gold_of_every_response() -> None:
    policy = Grading(a="[RESULT] 1", b="[RESULT] 2")
    judged(policy, [mined("a", "b", gold="on the mat"), mined("b", gold="in the hat")])
    texts = [turns_of(request)[0]["content"] for request in policy.requests]
    assert all("###The instruction to evaluate:\n> Where was the cat?" in text for text in texts)
    golds = [text.split("###Reference Answer (Score 5):\n> ")[1].split("\n")[0] for text in texts]
    assert golds == ["on the mat", "on the mat", "in the hat"]


def test_a_shard_is_asked_at_once_and_equal_responses_once() -> None:
    policy, counts = Grading(a="[RESULT] 1", b="[RESULT] 2"), list[int]()
    rows = judged(policy, [mined("a", "b", "a", "b"), mined("a", "", "b")], counts.append)
    assert [c.score for c in rows[0].candidates] == [0.25, 0.0, 0.25]
    assert policy.calls == 1 and len(policy.requests) == 4
    assert sum(counts) == 7, "progress counts every response"


def test_a_failed_grade_is_an_unscored_response_with_its_reason() -> None:
    policy = Grading(a="[RESULT] 4", b="I would rather not say.")
    (row,) = judged(policy, [mined("a", "b", " ", "a")])
    assert [c.score for c in row.candidates] == [None, None, 0.75]
    failed, empty, _ = (c.unscored or "" for c in row.candidates)
    assert "no result at the end" in failed and "rather not say" in failed
    assert empty == "the text is empty"
    assert len(policy.requests) == 2 + JUDGE.retries, "b is asked again, what is empty never"
    (nothing,) = judged(policy, [mined("a", "b", gold=" ")])
    assert nothing.initial_score is None and nothing.initial_unscored == "gold: the text is empty"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"similarity": "judge"}, "score.judge to be set"),
        ({"similarity": "rouge_l", "judge": JUDGE}, "score.similarity to be 'judge'"),
        ({"similarity": "judge", "judge": {"kind": "pairwise", "policy": ENGINE}}, "'absolute'"),
        ({"similarity": "judge", "judge": JudgeSettings()}, "'absolute', not 'auto'"),
        (
            {"similarity": "judge", "judge": JUDGE.model_copy(update={"rubric": PRINCIPLE})},
            "without a principle",
        ),
        ({"max_unscored": 1.5}, "max_unscored"),
        ({"similarity": "python"}, "score.function to be set"),
        ({"function": "a.py:b"}, "score.function to be set"),
        ({"similarity": "python", "function": "os:system"}, "function"),
    ],
)
def test_settings_of_a_judge_that_cannot_score_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ScoreSettings(**given)


def test_the_settings_say_that_the_gold_is_shown() -> None:
    assert BY_JUDGE.judge == JUDGE.model_copy(update={"show_gold": True})
    assert ScoreSettings.model_validate_json(BY_JUDGE.model_dump_json()) == BY_JUDGE


def test_the_judge_compares_no_answers_by_the_gold_alone() -> None:
    judge = GoldSimilarity(open_similarity(BY_JUDGE).best, "judge")
    pair = Pair(prompt=mined("").prompt, gold="g", ours="a", theirs="b")
    with pytest.raises(UserError, match=r"cannot compare two answers.*set evaluate\.judge"):
        judge.compare([pair])


# A function of the user's

SHARED_WORDS = """
def shared(gold, text):
    if text == "fail":
        raise RuntimeError("no idea")
    words = set(gold.split())
    return len(words & set(text.split())) / len(words) if text != "odd" else 2
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STAPLE_RUN_CODE", "1")
    (tmp_path / "mine.py").write_text(SHARED_WORDS)
    return f"{tmp_path / 'mine.py'}:shared"


def by_function(function: str, **more: Any) -> ScoreSettings:
    return ScoreSettings.model_validate({"similarity": "python", "function": function, **more})


def test_a_function_of_the_user_scores(function: str) -> None:
    (row,) = scored([mined("a b", "a", "fail", "odd", " ", gold="a b")], by_function(function))
    assert row.initial_score == 1.0
    assert [c.score for c in row.candidates] == [0.5, None, None, None]
    reasons = [c.unscored or "" for c in row.candidates]
    assert "RuntimeError: no idea" in reasons[1] and "from 0 to 1: 2" in reasons[2]
    assert reasons[3] == "the text is empty"


def test_a_function_is_run_where_the_environment_allows_it_only(
    function: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert function in open_similarity(by_function(function)).check()
    monkeypatch.delenv("STAPLE_RUN_CODE")
    similarity = open_similarity(by_function(function))
    for use in (lambda: similarity.check(), lambda: similarity.compare("a", ["b"])):
        with pytest.raises(UserError, match="set STAPLE_RUN_CODE=1"):
            use()


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (None, "shared", "no such file"),
        ("1 / 0", "shared", "ZeroDivisionError"),
        (SHARED_WORDS, "another", "defines no function 'another'"),
    ],
)
def test_a_function_that_is_not_there_is_named(
    function: str, content: str | None, name: str, reason: str
) -> None:
    file = Path(function.rpartition(":")[0])
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=reason):
        open_similarity(by_function(f"{file}:{name}")).compare("a", ["b"])


def test_the_stage_follows_the_function_and_its_failures(
    function: str, slot: Slot, tmp_path: Path
) -> None:
    def compute(work: Workspace) -> Metrics:
        work.write("mined", [mined("a b", "a", "fail", gold="a b")], Mined)
        return {}

    rows = slot.attempt("mine", ScoreSettings(), {}, compute)
    done = score_stage(slot, by_function(function), rows)
    assert done.metrics["candidate_similarity"] == 0.5
    assert score_stage(slot, by_function(function), rows).reused
    file = Path(function.rpartition(":")[0])
    file.write_text(SHARED_WORDS + "\nother = 1\n")
    assert not score_stage(slot, by_function(function), rows).reused
    with pytest.raises(UserError, match=r"1 scores failed, of 3 .*no idea.*correct the function"):
        score_stage(slot, by_function(function, max_unscored=0.1), rows)


# The stage, with a real (random) judge: none of its judgements has a result


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("judge"), "llama")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the real policy is asked each question, by its key."""
    counts: Counter[str] = Counter()
    generate = LocalPolicy.generate

    def counted(self: LocalPolicy, requests: Sequence[Request], *rest: Any) -> Any:
        answers = generate(self, requests, *rest)
        counts.update(request.key for request in requests)
        return answers

    monkeypatch.setattr(LocalPolicy, "generate", counted)
    return counts


def by_model(model: Path, **more: Any) -> ScoreSettings:
    policy = ENGINE.model_copy(update={"model": str(model), "threads": 1})
    judge = JUDGE.model_copy(update={"policy": policy, "retries": 0, "temperature": 0.8})
    return ScoreSettings(**{"similarity": "judge", "judge": judge, "max_unscored": 1.0} | more)


@pytest.fixture
def slot(workplace: Path) -> Slot:
    return Slot(Record("an-experiment", workplace / "home"), 1, seed=7, shard_size=2)


@pytest.fixture
def rows(slot: Slot) -> Attempt:
    """Five prompts, two responses each."""

    def compute(work: Workspace) -> Metrics:
        found = [replace(mined(f"a{i}", f"b{i}"), prompt_id=f"p{i}") for i in range(5)]
        work.write("mined", found, Mined)
        return {}

    return slot.attempt("mine", ScoreSettings(), {}, compute)


def test_unscored_responses_of_a_real_judge_are_counted(
    slot: Slot, rows: Attempt, judge_model: Path, asked: Counter[str]
) -> None:
    done = score_stage(slot, by_model(judge_model), rows)
    found = done.read("scored", Scores)
    reasons = {row.initial_unscored for row in found}
    assert [row.prompt_id for row in found] == [f"p{i}" for i in range(5)]
    assert all(row.initial_score is None for row in found) and len(reasons) > 1
    assert done.metrics["unscored_prompts"] == done.metrics["unscored_candidates"] == 5.0
    assert len(asked) == asked.total() == 10
    assert score_stage(slot, by_model(judge_model), rows).reused and asked.total() == 10


def kill_after_eight(
    slot: Slot,
    settings: ScoreSettings,
    rows: Attempt,
    asked: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Score until the judge has been asked eight times, then interrupt it."""
    counted = LocalPolicy.generate

    def killed(self: LocalPolicy, requests: Sequence[Request], *rest: Any) -> Any:
        if asked.total() == 8:
            raise KeyboardInterrupt
        return counted(self, requests, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPolicy, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            score_stage(slot, settings, rows)


def test_a_killed_scoring_goes_on_at_the_first_missing_shard(
    slot: Slot,
    rows: Attempt,
    judge_model: Path,
    asked: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = by_model(judge_model)
    kill_after_eight(slot, settings, rows, asked, monkeypatch)
    assert asked.total() == 8
    resumed = score_stage(slot, settings, rows)
    assert len(asked) == asked.total() == 10, "nothing was asked twice"
    whole = score_stage(replace(slot, mode=lambda _: "force"), settings, rows)
    assert asked.total() == 20 and not whole.reused
    assert resumed.digest == whole.digest


def test_scores_do_not_depend_on_the_shard_but_on_the_seed(
    slot: Slot, rows: Attempt, judge_model: Path
) -> None:
    settings = by_model(judge_model)
    two = score_stage(slot, settings, rows)
    five = replace(slot, shard_size=5)
    assert score_stage(five, settings, rows).reused, "another size makes nothing stale"
    again = score_stage(replace(five, mode=lambda _: "force"), settings, rows)
    assert not again.reused and again.digest == two.digest
    assert score_stage(replace(five, seed=8), settings, rows).digest != two.digest


def test_a_scoring_goes_on_in_shards_of_another_size(
    slot: Slot,
    rows: Attempt,
    judge_model: Path,
    asked: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = by_model(judge_model)
    kill_after_eight(slot, settings, rows, asked, monkeypatch)
    resumed = score_stage(replace(slot, shard_size=3), settings, rows)
    assert [row.prompt_id for row in resumed.read("scored", Scores)] == [f"p{i}" for i in range(5)]
    whole = score_stage(replace(slot, mode=lambda _: "force"), settings, rows)
    assert resumed.digest == whole.digest


def test_a_judge_that_fails_too_often_ends_the_stage(
    slot: Slot, rows: Attempt, judge_model: Path, asked: Counter[str]
) -> None:
    settings = by_model(judge_model, max_unscored=0.5)
    with pytest.raises(UserError, match=r"8 scores failed, of 10 in all; \d of them .* cut at"):
        score_stage(slot, settings, rows)
    assert asked.total() == 8, "no more are asked for once too many have failed"
    assert slot.record.current("score", 1) is None
    with pytest.raises(UserError, match=r"10 scores failed"):
        score_stage(slot, settings, rows)
    assert len(asked) == asked.total() == 10, "what was judged is kept"


def test_the_fingerprint_follows_the_judge(
    slot: Slot, rows: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_chat_model(tmp_path / "changing", "llama")

    def reused(**judge: Any) -> bool:
        settings = by_model(model)
        assert settings.judge is not None
        given = settings.judge.model_copy(update=judge)
        return score_stage(slot, settings.model_copy(update={"judge": given}), rows).reused

    assert [reused(), reused()] == [False, True]
    weights = model / "model.safetensors"
    weights.touch()
    assert reused(), "touched files are the same files"
    assert not reused(max_tokens=13)
    build_chat_model(model, "llama", seed=1)
    assert [reused(), reused()] == [False, True]
    monkeypatch.setattr(llm_judge, "WORDING", "another")
    assert not reused()
