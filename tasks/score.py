"""f(y, yG): how near each response comes to the gold. The validator of STaPLe's E-step.

`score` turns mined rows into scored ones, row by row, so that a shard of prompts is one process's
work. `tasks.filter` reads its scores; `models.judges.base` compares answers with the same
similarity. A text that cannot be scored has no score and a reason, never a silent 0.

Most similarities see the gold and the texts alone (`Similarity`). An LLM judge reads the prompt
too, and is asked about all responses of a shard at once; both are a `Scorer` to the stage.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator
from rapidfuzz.distance import LCSseq

from constitutions.errors import UserError
from models.judges.base import Grade, JudgeSettings
from models.judges.llm import AbsoluteJudge, Graded
from models.judges.opening import judge_pool, located, open_policy
from models.policy import Progress
from models.pools.base import Finished, Shards, Where
from models.settings import Settings
from tasks.judging.judge import noted
from tasks.record.progress import progress
from tasks.record.stage import stage
from tasks.record.store import Attempt, Slot
from tasks.record.work import Metrics, Workspace, shards
from tasks.rows import Mined, Scored, ScoredCandidate, fields
from tasks.similarity import porter

EMPTY = "the text is empty"

Tokenizer = Literal["rouge", "unicode"]
Embedder = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors, shape (texts, dimension)."""


class ScoreSettings(Settings):
    """How a response is compared with the gold."""

    similarity: Literal["rouge_l", "embedding", "judge"] = "rouge_l"
    """ROUGE-L F1 (the paper's default), the cosine of sentence embeddings, or the grade of an LLM
    judge that is shown the gold response."""
    stem: bool = False
    """ROUGE-L compares Porter stems instead of words. English only."""
    tokenizer: Tokenizer = "rouge"
    """"rouge" sees a-z and 0-9 only, as the reference implementation; "unicode" sees the words of
    every script, single characters where a script has no spaces, and emoji."""
    embedding_model: str = Field(default="sentence-transformers/all-MiniLM-L6-v2", min_length=1)
    """Folder or hub name of a sentence-transformers model; used by the embedding similarity."""
    judge: JudgeSettings | None = None
    """The LLM judge of the similarity "judge": kind "absolute". Its `show_gold` is always on."""
    shard_size: int = Field(default=64, ge=1, le=4096)
    """Prompts whose responses are judged and saved together: what a killed run repeats at most."""
    max_unscored: float = Field(default=0.5, ge=0, le=1)
    """Share of failed judgements above which the stage ends with an error."""

    @field_validator("judge")
    @classmethod
    def _grades_beside_the_gold(cls, judge: JudgeSettings | None) -> JudgeSettings | None:
        if judge is None:
            return None
        if judge.kind != "absolute":
            raise ValueError(f"a judge that grades: kind 'absolute', not '{judge.kind}'")
        if judge.chosen_rubric.principle:
            raise ValueError("a rubric without a principle: the first response has none")
        return judge.model_copy(update={"show_gold": True})

    @model_validator(mode="after")
    def _judge_where_it_is_asked(self) -> ScoreSettings:
        if self.similarity == "judge" and self.judge is None:
            raise ValueError("score.judge to be set where score.similarity is 'judge'")
        if self.similarity != "judge" and self.judge is not None:
            raise ValueError("score.similarity to be 'judge', or score.judge to be unset")
        return self


class Score(NamedTuple):
    """f(a, b) in [0, 1], or None with the reason why there is none."""

    value: float | None
    unscored: str | None


Similarity = Callable[[str, Sequence[str]], list[Score]]
"""(gold, texts) to one score for each text."""


Scorer = Callable[[Iterable[Mined], Progress | None], Iterator[tuple[Mined, list[Score]]]]
"""Rows to each row and its scores, of y1 and of every y2, in order; progress counts responses."""


def score(
    rows: Iterable[Mined], scorer: Scorer, advance: Progress | None = None
) -> Iterator[Scored]:
    """Score y1 and every y2 of each row against its gold, in order.

    Args:
        advance: called with the number of responses that were scored.
    """
    for row, (initial, *refined) in scorer(rows, advance):
        candidates = tuple(
            ScoredCandidate(**fields(candidate), score=s.value, unscored=s.unscored)
            for candidate, s in zip(row.candidates, refined, strict=True)
        )
        yield Scored(
            **fields(row) | {"candidates": candidates},
            initial_score=initial.value,
            initial_unscored=initial.unscored,
        )


@stage("score")
def score_stage(at: Slot, settings: ScoreSettings, mined: Attempt) -> Attempt:
    """mined → scored; shard by shard where an LLM judges.

    Raises:
        UserError: more than `max_unscored` of the judgements failed; the finished shards are kept.
    """

    def compute(work: Workspace) -> Metrics:
        rows = mined.read("mined", Mined)
        with progress(f"score {at.iteration}", _responses(rows), "responses") as tick:
            if settings.judge is not None:
                scored = _judge_shards(work, rows, settings, settings.judge, at.seed, tick)
            else:
                scored = list(score(rows, by_gold(load_similarity(settings)), tick))
                work.write("scored", scored, Scored)
        return _metrics(scored)

    return noted(at, settings.judge).attempt("score", settings, {"mined": mined}, compute)


def load_similarity(settings: ScoreSettings) -> Similarity:
    """The similarity that the settings name, with its embedding model where it has one."""
    return similarity_of(settings, _embedder(settings))


def _embedder(settings: ScoreSettings) -> Embedder | None:
    if settings.similarity != "embedding":
        return None
    from models.embedders import sentence_embedder

    return sentence_embedder(settings.embedding_model)


def _responses(rows: Sequence[Mined]) -> int:
    return sum(1 + len(row.candidates) for row in rows)


def _texts(row: Mined) -> list[str]:
    return [row.initial, *(candidate.refined for candidate in row.candidates)]


def _metrics(scored: Sequence[Scored]) -> Metrics:
    candidates = [c.score for row in scored for c in row.candidates]
    told = [score for score in candidates if score is not None]
    initial = [row.initial_score for row in scored if row.initial_score is not None]
    means = {"initial_similarity": initial, "candidate_similarity": told}
    return {
        "unscored_candidates": float(len(candidates) - len(told)),
        "unscored_prompts": float(len(scored) - len(initial)),
        **{name: sum(values) / len(values) for name, values in means.items() if values},
    }


def by_gold(similarity: Similarity) -> Scorer:
    """Scores that need no more than the gold and the texts; rows are streamed."""

    def scorer(
        rows: Iterable[Mined], advance: Progress | None
    ) -> Iterator[tuple[Mined, list[Score]]]:
        for row in rows:
            texts = _texts(row)
            yield row, similarity(row.gold, texts)
            if advance:
                advance(len(texts))

    return scorer


def similarity_of(settings: ScoreSettings, embedder: Embedder | None = None) -> Similarity:
    """The similarity that the settings name, for what compares a text with the gold alone.

    An LLM judge is none: its grade needs the prompt. What stands here for it refuses when asked
    (an evaluation by another judge loads the similarity and never asks).

    Raises:
        ValueError: the embedding similarity was chosen and no embedder given.
    """
    if settings.similarity == "judge":
        return _needs_the_prompt
    if settings.similarity == "rouge_l":
        return rouge_l_similarity(settings.stem, settings.tokenizer)
    if embedder is None:
        raise ValueError("the embedding similarity needs an embedder")
    return embedding_similarity(embedder)


def _needs_the_prompt(gold: str, texts: Sequence[str]) -> list[Score]:
    raise UserError(
        "the similarity 'judge' needs the prompt, and cannot compare two answers by the gold alone",
        where="settings 'score.similarity' and 'evaluate.judge.kind'",
        expected="a judge of its own for the held-out answers",
        fix="set evaluate.judge to the judge of score.judge, with show_gold: true",
    )


# An LLM judge


def by_grade(judge: AbsoluteJudge) -> Scorer:
    """f(y, yG) = (n - 1) / 4 for the grade n, 1 to 5; all rows are asked about at once.

    The judge's settings must show it the gold: what it says without is no similarity. Equal
    responses to one prompt are judged once; without a gold or a response nothing is asked.
    """

    def scorer(
        rows: Iterable[Mined], advance: Progress | None
    ) -> Iterator[tuple[Mined, list[Score]]]:
        rows = list(rows)
        asked = [(row, text) for row in rows for text in dict.fromkeys(_judged_texts(row))]
        if advance:
            advance(_responses(rows) - len(asked))
        items = [Graded(prompt=row.prompt, gold=row.gold, response=text) for row, text in asked]
        grades = iter(judge.grade(items, advance))
        for row in rows:
            told = {text: next(grades) for text in dict.fromkeys(_judged_texts(row))}
            yield row, [_graded(row, text, told) for text in _texts(row)]

    return scorer


def _graded(row: Mined, text: str, told: Mapping[str, Grade]) -> Score:
    if text in told:
        grade, failure = told[text]
        return Score(None if grade is None else (grade - 1) / 4, failure)
    return Score(None, EMPTY if row.gold.strip() else f"gold: {EMPTY}")


def _judged_texts(row: Mined) -> list[str]:
    """The responses that a judge can be asked about."""
    return [text for text in _texts(row) if text.strip()] if row.gold.strip() else []


def _judge_shards(
    work: Workspace,
    rows: Sequence[Mined],
    settings: ScoreSettings,
    judge: JudgeSettings,
    seed: int,
    tick: Progress,
) -> list[Scored]:
    """Score shard by shard. A judge that has failed too often is not asked about a further one."""
    asked = sum(len(_judged_texts(row)) for row in rows)
    failures: list[str] = []

    def compute(missing: Shards) -> Iterator[Finished]:
        for done in pool.map(_score_shard, missing, tick):
            yield done
            failures.extend(_failures(done.rows))
            _check_budget(failures, asked, settings.max_unscored)

    groups = shards(rows, settings.shard_size)
    with judge_pool(judge, functools.partial(_open_scorer, judge, seed)) as pool:
        found = work.sharded(
            "scored", Scored, groups, compute, lambda shard: tick(_responses(shard))
        )
    _check_budget(list(_failures(found)), asked, settings.max_unscored)
    return found


def _open_scorer(judge: JudgeSettings, seed: int, where: Where) -> Scorer:
    judge = located(judge, where)
    return by_grade(AbsoluteJudge(open_policy(judge), judge, seed=seed))


def _score_shard(scorer: Scorer, rows: Sequence[Mined], advance: Progress) -> list[Scored]:
    return list(score(rows, scorer, advance))


def _failures(scored: Iterable[Scored]) -> Iterator[str]:
    """Why a judge that was asked gave no grade, for each response without one."""
    for row in scored:
        reasons = [row.initial_unscored, *(c.unscored for c in row.candidates)]
        judged = {*_judged_texts(row)}
        pairs = zip(_texts(row), reasons, strict=True)
        yield from (reason for text, reason in pairs if reason and text in judged)


def _check_budget(failures: Sequence[str], asked: int, share: float) -> None:
    if len(failures) <= share * asked:
        return
    kinds = Counter(map(_kind, failures))
    (kind, count), *_ = kinds.most_common(1)
    example = next(reason for reason in failures if _kind(reason) == kind)
    raise UserError(
        f"{len(failures):,} judgements failed, of {asked:,} in all; {count:,} of them like this: "
        f"{example}",
        where="setting 'score.judge'",
        expected=f"a judge that fails on at most {share:.0%} (score.max_unscored)",
        fix="change its model, max_tokens, retries or rubric",
    )


def _kind(reason: str) -> str:
    """What failures of one kind have in common: after the colon the judge's own words stand."""
    return reason.partition(":")[0]


# ROUGE-L

Words = list[str]
"""The tokens of a text. Equal hashes count as equal words to rapidfuzz: 64 bits are enough."""


def rouge_l(
    candidates: Sequence[str],
    references: Sequence[str],
    stem: bool = False,
    tokenizer: Tokenizer = "rouge",
) -> list[float]:
    """ROUGE-L F1 of each candidate with the reference beside it, in [0, 1] (Lin 2004, section 3).

    With the "rouge" tokenizer equal, bit for bit, to the `rouge_score` package's `fmeasure`; there
    as here a text without tokens scores 0, which `rouge_l_similarity` reports instead.

    Raises:
        ValueError: there are not as many candidates as references.
    """
    gold = functools.lru_cache(maxsize=256)(lambda text: tokens(text, stem, tokenizer))
    pairs = zip(candidates, references, strict=True)
    return [_f1(tokens(candidate, stem, tokenizer), gold(text)) for candidate, text in pairs]


def rouge_l_similarity(stem: bool = False, tokenizer: Tokenizer = "rouge") -> Similarity:
    """ROUGE-L F1 that reports the texts its tokenizer cannot read."""

    def similarity(gold: str, texts: Sequence[str]) -> list[Score]:
        reference = tokens(gold, stem, tokenizer)
        if problem := _unreadable(gold, reference, tokenizer):
            return [Score(None, f"gold: {problem}")] * len(texts)
        return [compare(text, reference) for text in texts]

    def compare(text: str, reference: Words) -> Score:
        words = tokens(text, stem, tokenizer)
        problem = _unreadable(text, words, tokenizer)
        return Score(None, problem) if problem else Score(_f1(words, reference), None)

    return similarity


def tokens(text: str, stem: bool = False, tokenizer: Tokenizer = "rouge") -> Words:
    """The words of a text, or their stems."""
    words = _SPLITTERS[tokenizer](text)
    return list(map(STEMS.__getitem__, words)) if stem else words


def _f1(candidate: Words, reference: Words) -> float:
    """The operations of `rouge_score`, in its order: floating point knows the difference."""
    if not candidate or not reference:
        return 0.0
    common = LCSseq.similarity(reference, candidate)
    precision = common / len(candidate)
    recall = common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _unreadable(text: str, words: Words, tokenizer: Tokenizer) -> str | None:
    """Why a text cannot be scored by its words, if so."""
    if not text.strip():
        return EMPTY
    if tokenizer == "rouge" and not text.isascii():
        lost, kept = len(_FOREIGN.findall(text)), len(_KNOWN.findall(text))
        if lost > kept:
            share = lost / (lost + kept)
            return f"the rouge tokenizer drops {share:.0%} of its letters (it reads only a-z, 0-9)"
    return None if words else f"the {tokenizer} tokenizer finds no word in it"


_KNOWN = re.compile("[A-Za-z0-9]")
_FOREIGN = re.compile(r"[^\W\x00-\x7f]")
"""A letter or digit outside ASCII."""

_ROUGE = bytes(c if chr(c).isalnum() and c < 128 else ord(" ") for c in range(256))


def _split_rouge(text: str) -> Words:
    """Runs of [a-z0-9] in the lower-cased text, in half the time of a regular expression."""
    return text.lower().encode("utf-8", "replace").translate(_ROUGE).decode("ascii").split()


def _split_unicode(text: str) -> Words:
    found: Words = _unicode_word().findall(unicodedata.normalize("NFKC", text).casefold())
    return found


@functools.cache
def _unicode_word() -> Any:
    import regex  # The standard library's `re` knows no scripts.

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    character = rf"[{unspaced}]\p{{M}}*"
    word = rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{unspaced}]]+"
    return regex.compile(rf"{character}|\p{{Extended_Pictographic}}|{word}", regex.VERSION1)


_SPLITTERS: dict[Tokenizer, Callable[[str], Words]] = {
    "rouge": _split_rouge,
    "unicode": _split_unicode,
}


class _Stems(dict[str, str]):
    limit = 1 << 17

    def __missing__(self, word: str) -> str:
        if len(self) >= self.limit:
            self.clear()
        # As in `rouge_score`, words of up to three letters are their own stems.
        changes = len(word) > 3 and word.isascii()
        self[word] = stem = porter.stem(word) if changes else word
        return stem


STEMS = _Stems()
"""A memo from words to their stems; it empties itself when it is full, at about 25 MB."""


# Embeddings


def embedding_similarity(embedder: Embedder, remembered: int = 4096) -> Similarity:
    """Cosine of the two texts' embeddings, negative ones counted as 0.

    Each distinct text is embedded once while it is among the last `remembered` or so.
    """
    vectors: dict[str, np.ndarray | None] = {}

    def similarity(gold: str, texts: Sequence[str]) -> list[Score]:
        if len(vectors) > remembered:
            vectors.clear()
        new = [t for t in dict.fromkeys((gold, *texts)) if t.strip() and t not in vectors]
        if new:
            vectors.update(zip(new, _unit_vectors(embedder(new), len(new)), strict=True))
        reference, problem = vectors.get(gold), _unembedded(gold, vectors)
        if problem or reference is None:
            return [Score(None, f"gold: {problem}")] * len(texts)
        return [cosine(reference, text) for text in texts]

    def cosine(reference: np.ndarray, text: str) -> Score:
        vector = vectors.get(text)
        if vector is None:
            return Score(None, _unembedded(text, vectors))
        return Score(float(np.clip(vector @ reference, 0.0, 1.0)), None)

    return similarity


def _unit_vectors(embedded: np.ndarray, texts: int) -> list[np.ndarray | None]:
    """Rows scaled to length 1, None where that is not possible."""
    rows = np.asarray(embedded, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != texts:
        raise ValueError(f"the embedder gave shape {rows.shape} for {texts} texts")
    norms = np.linalg.norm(rows, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    return [row / norm if ok else None for row, norm, ok in zip(rows, norms, usable, strict=True)]


def _unembedded(text: str, vectors: dict[str, np.ndarray | None]) -> str | None:
    if not text.strip():
        return EMPTY
    return "its embedding is zero or not finite" if vectors[text] is None else None
