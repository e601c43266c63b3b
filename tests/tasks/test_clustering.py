"""Feature blocks: cosines mean what they should, and nothing missing becomes a zero."""

from collections import Counter

import numpy as np
from scipy.sparse import csr_matrix

from tasks.clustering.features import (
    block_features,
    character_features,
    combine,
    effect_features,
)
from tasks.clustering.insertions import inserted_tokens, tokens


def _cosines(block: object) -> np.ndarray:
    vectors = block_features(block).vectors
    return np.asarray(vectors @ vectors.T)


def test_tokens_are_words_marks_and_single_characters_of_unspaced_scripts() -> None:
    assert tokens("Don't panic, 42 日本x!") == ["don", "'", "t", "panic", ",", "42", *"日本x!"]
    assert tokens("") == []


def test_inserted_tokens_are_counted_beyond_what_was_there() -> None:
    assert inserted_tokens(Counter("aab"), Counter("aaabcc")) == {"a": 1, "c": 2}


def test_character_features_see_shared_wording() -> None:
    cosines = _cosines(character_features(["warn against harm", "warning of harm", "be funny"]))
    assert cosines[0, 1] > 0.3 > 0.1 > cosines[0, 2]
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)


def test_effect_features_see_shared_insertions_and_leave_gaps_open() -> None:
    block = effect_features(
        csr_matrix(np.array([[3, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], np.float32))
    )
    cosines = _cosines(block)
    assert cosines[0, 1] > 0.3
    assert cosines[0, 3] == 0
    assert block_features(block).present.tolist() == [True, True, False, True]
    assert block_features(
        effect_features(csr_matrix((2, 1), dtype=np.float32))
    ).present.tolist() == [False, False]


def test_combined_cosines_are_the_mean_of_the_blocks() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 3)), 7 * rng.standard_normal((5, 4))
    both = combine([block_features(left), block_features(right)]).vectors
    np.testing.assert_allclose(both @ both.T, (_cosines(left) + _cosines(right)) / 2, atol=1e-6)


def test_a_row_without_one_block_keeps_full_length_by_the_other() -> None:
    left, right = np.array([[1.0, 0], [0, 0]]), np.array([[0, 2.0], [0, 2.0]])
    features = combine([block_features(left), block_features(right)])
    np.testing.assert_allclose(np.linalg.norm(features.vectors, axis=1), 1, atol=1e-6)
    assert features.present.all()
