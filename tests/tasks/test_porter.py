"""The stemmer beside NLTK's, which ROUGE's reference implementation uses."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.similarity.porter import stem

nltk_porter = pytest.importorskip("nltk.stem.porter", reason="NLTK comes with rouge-score")
NLTK = nltk_porter.PorterStemmer()

# fmt: off
ENDINGS = [
    "s", "ies", "sses", "ss", "ed", "ied", "eed", "ing", "y", "ational", "tional", "enci",
    "anci", "izer", "bli", "alli", "entli", "eli", "ousli", "ization", "ation", "ator", "alism",
    "iveness", "fulness", "ousness", "aliti", "iviti", "biliti", "fulli", "logi", "icate",
    "ative", "alize", "iciti", "ical", "ful", "ness", "al", "ance", "ence", "er", "ic", "able",
    "ible", "ant", "ement", "ment", "ent", "sion", "tion", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize", "e", "ll", "ly",
]
# fmt: on
BEGINNINGS = st.text("aeiouybdlstzwx1", max_size=6)


@settings(max_examples=3000, deadline=None)
@given(BEGINNINGS, st.lists(st.sampled_from(ENDINGS), max_size=3))
def test_made_up_words(beginning: str, endings: list[str]) -> None:
    word = beginning + "".join(endings)
    assert stem(word) == (NLTK.stem(word) if word else "")


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1))
@example("yyyy")
def test_any_letters(word: str) -> None:
    assert stem(word) == NLTK.stem(word)


def test_irregular_words() -> None:
    assert [w for w in NLTK.pool if stem(w) != NLTK.stem(w)] == []


def test_a_long_run_of_y_takes_no_quadratic_time() -> None:
    assert len(stem("y" * 200_000)) == 200_000
