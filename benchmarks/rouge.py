"""ROUGE-L: `rouge_l` beside the `rouge_score` package, one core, the same texts.

Every candidate has a reference of its own, the worst case for us: in the loop N + 1 responses share
one gold, which is tokenised once. Equal scores, to the bit, are part of the benchmark.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from time import process_time

from benchmarks.measure import Result, interleaved, timed
from tasks.corpus.prompts import CorpusSettings, load_corpus
from tasks.similarity.rouge import STEMS, rouge_l, tokens

CORPORA = Path(os.environ.get("STAPLE_TEST_DATA", "../shared/data")) / "corpora"
PAIRS = 100
ROUNDS = 5
CANDIDATES = 16


def rouge_l_plain() -> Result:
    """Words as they are."""
    return _beside_rouge_score(stem=False)


def rouge_l_stem() -> Result:
    """Porter stems."""
    return _beside_rouge_score(stem=True)


def _beside_rouge_score(stem: bool) -> Result:
    from rapidfuzz.distance import LCSseq
    from rouge_score.rouge_scorer import RougeScorer

    texts, source = _texts(2 * PAIRS)
    candidates, references = texts[:PAIRS], texts[PAIRS:]
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    words = [_interned(a, b, stem) for a, b in zip(candidates, references, strict=True)]

    def peer() -> list[float]:
        pairs = zip(candidates, references, strict=True)
        return [scorer.score(r, c)["rougeL"].fmeasure for c, r in pairs]

    shared = [reference for reference in references for _ in range(CANDIDATES)]
    many = [texts[i % len(texts)] for i in range(len(shared))]
    STEMS.clear()
    cold = timed(lambda: rouge_l(candidates, references, stem=stem), process_time)
    if rouge_l(candidates, references, stem=stem) != peer():
        raise AssertionError("rouge_l and rouge_score differ")
    seconds = interleaved(
        {
            "peer": peer,
            "ours": lambda: rouge_l(candidates, references, stem=stem),
            "shared": lambda: rouge_l(many, shared, stem=stem),
            "floor": lambda: [LCSseq.similarity(a, b) for a, b in words],
        },
        ROUNDS,
        process_time,
    )
    return Result(
        ratio=seconds["peer"] / seconds["ours"],
        ours=PAIRS / seconds["ours"],
        peer=PAIRS / seconds["peer"],
        unit="pairs/s",
        details={
            "first_call_ratio": seconds["peer"] / cold,
            "shared_gold_ratio": seconds["peer"] / seconds["shared"] * CANDIDATES,
            "lcs_alone_ratio": seconds["peer"] / seconds["floor"],
            "peer_package": "rouge_score",
            "texts": source,
            "pairs": PAIRS,
            "words_per_text": "150-200",
            "clock": "processor time",
        },
    )


def _interned(a: str, b: str, stem: bool) -> tuple[str, str]:
    """Two texts as strings of one private character a word: the fastest food for the LCS."""
    first, second = tokens(a, stem), tokens(b, stem)
    letter = {word: chr(i) for i, word in enumerate(dict.fromkeys(first + second))}
    return "".join(letter[w] for w in first), "".join(letter[w] for w in second)


def _texts(count: int) -> tuple[list[str], str]:
    """Distinct texts of 150 to 200 words: of the real corpora where they are, else drawn words."""
    draw = random.Random(0)
    if not CORPORA.is_dir():
        return [_drawn_text(draw) for _ in range(count)], "drawn words"
    paths = sorted(p for p in CORPORA.iterdir() if p.name.startswith(("hh_", "tldr_", "ultra")))
    rows = [
        row
        for path in paths
        for row in load_corpus([CorpusSettings(path=str(path), on_bad_row="reject")]).rows
    ]
    words = [f"{row.prompt[-1]['content']} {row.gold}".split() for row in rows]
    long = [text for text in words if len(text) >= 200]
    return [" ".join(t[: draw.randint(150, 200)]) for t in draw.sample(long, count)], "real corpora"


def _drawn_text(draw: random.Random) -> str:
    """Words of 3 to 10 letters with frequencies that fall as in language (Zipf)."""
    ranks = [int(draw.paretovariate(0.8)) % 20_000 for _ in range(draw.randint(150, 200))]
    return " ".join(_word(rank) for rank in ranks)


def _word(rank: int) -> str:
    letters = random.Random(rank)
    ending = letters.choice(["", "", "s", "ing", "ed", "ation", "ness", "ly"])
    return "".join(letters.choices("etaoinshrdlucmy", k=letters.randint(2, 6))) + ending
