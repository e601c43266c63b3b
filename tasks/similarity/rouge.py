"""ROUGE-L F1: the longest common subsequence of two texts' words (Lin 2004, section 3)."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rapidfuzz.distance import LCSseq

from models.pools.base import E, Opener, Pool
from models.pools.processes import ProcessPool
from tasks.similarity import porter
from tasks.similarity.base import EMPTY, Chosen, Score, Similarity

Tokenizer = Literal["rouge", "unicode"]
Words = list[str]
"""The tokens of a text. rapidfuzz compares their 64-bit hashes, which is enough."""


class RougeSettings(Chosen):
    """Settings of the similarity "rouge_l"."""

    stem: bool = False
    """ROUGE-L compares Porter stems instead of words. English only."""
    tokenizer: Tokenizer = "rouge"
    """"rouge" sees a-z and 0-9 only, as the reference implementation; "unicode" sees the words of
    every script, single characters where a script has no spaces, and emoji."""


class RougeL(Similarity[RougeSettings]):
    """ROUGE-L F1, the paper's similarity. A text that the tokenizer cannot read is unscored."""

    def pool(self, opener: Opener[E]) -> Pool[E]:
        """Processes on this machine: it needs no model."""
        return ProcessPool(opener)

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """See `Similarity.compare`."""
        stem, tokenizer = self.settings.stem, self.settings.tokenizer
        reference = tokens(gold, stem, tokenizer)
        if problem := _unreadable(gold, reference, tokenizer):
            return [Score(None, f"gold: {problem}")] * len(texts)
        scores = []
        for text in texts:
            words = tokens(text, stem, tokenizer)
            problem = _unreadable(text, words, tokenizer)
            scores.append(Score(None if problem else _f1(words, reference), problem))
        return scores


def rouge_l(
    candidates: Sequence[str],
    references: Sequence[str],
    stem: bool = False,
    tokenizer: Tokenizer = "rouge",
) -> list[float]:
    """ROUGE-L F1 of each candidate with the reference beside it, in [0, 1].

    With the "rouge" tokenizer equal, bit for bit, to the `rouge_score` package's `fmeasure`; a text
    without tokens scores 0 here, and is reported as unscored by `RougeL`.

    Raises:
        ValueError: there are not as many candidates as references.
    """
    gold = functools.lru_cache(maxsize=256)(lambda text: tokens(text, stem, tokenizer))
    pairs = zip(candidates, references, strict=True)
    return [_f1(tokens(candidate, stem, tokenizer), gold(text)) for candidate, text in pairs]


def tokens(text: str, stem: bool = False, tokenizer: Tokenizer = "rouge") -> Words:
    """The words of a text, or their stems."""
    words = _SPLITTERS[tokenizer](text)
    return list(map(STEMS.__getitem__, words)) if stem else words


def _f1(candidate: Words, reference: Words) -> float:
    """F1 by the operations of `rouge_score` in its order, so that rounding is the same."""
    if not candidate or not reference:
        return 0.0
    common = LCSseq.similarity(reference, candidate)
    precision = common / len(candidate)
    recall = common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _unreadable(text: str, words: Words, tokenizer: Tokenizer) -> str | None:
    """Why a text cannot be scored by its words; None where it can."""
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
