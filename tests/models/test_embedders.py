"""Feature blocks: cosines mean what they should, and nothing missing turns into a silent zero."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from constitutions.errors import UserError
from models.embedders import (
    character_features,
    combine,
    effect_features,
    inserted_tokens,
    sentence_embedder,
    tokens,
    unit_rows,
)


def _cosines(block: object) -> np.ndarray:
    vectors = combine([block]).vectors
    return np.asarray(vectors @ vectors.T)


def test_tokens_are_words_marks_and_single_characters_of_unspaced_scripts() -> None:
    assert tokens("Don't panic, 42 日本x!") == ["don", "'", "t", "panic", ",", "42", *"日本x!"]
    assert tokens("") == []


def test_inserted_tokens_are_counted_beyond_what_was_there() -> None:
    assert inserted_tokens(list("aab"), list("aaabcc")) == Counter({"a": 1, "c": 2})


def test_character_features_see_shared_wording() -> None:
    cosines = _cosines(character_features(["warn against harm", "warning of harm", "be funny"]))
    assert cosines[0, 1] > 0.3 > 0.1 > cosines[0, 2]
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)


def test_effect_features_see_shared_insertions_and_leave_gaps_open() -> None:
    block = effect_features(
        [Counter(careful=3, x=1), Counter(careful=1, y=1), Counter(), Counter(haha=1)]
    )
    cosines = _cosines(block)
    assert cosines[0, 1] > 0.3
    assert cosines[0, 3] == 0
    assert combine([block]).present.tolist() == [True, True, False, True]
    assert combine([effect_features([Counter(), Counter()])]).present.tolist() == [False, False]


def test_combined_cosines_are_the_mean_of_the_blocks() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 3)), 7 * rng.standard_normal((5, 4))
    both = combine([left, right]).vectors
    np.testing.assert_allclose(both @ both.T, (_cosines(left) + _cosines(right)) / 2, atol=1e-6)


def test_a_row_without_one_block_keeps_full_length_by_the_other() -> None:
    left, right = np.array([[1.0, 0], [0, 0]]), np.array([[0, 2.0], [0, 2.0]])
    features = combine([left, right])
    np.testing.assert_allclose(np.linalg.norm(features.vectors, axis=1), 1, atol=1e-6)
    assert features.present.all()


def test_a_text_without_embedding_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 texts have no embedding: 'b'"):
        unit_rows(np.array([[1.0, 0], [0, 0]]), ["a", "b"])
    with pytest.raises(ValueError, match="no embedding"):
        unit_rows(np.array([[np.nan, 0.0]]), ["a"])


def test_a_directory_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the directory holds no model"):
        sentence_embedder(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        sentence_embedder(str(tmp_path / "missing"))


def test_a_sentence_model_directory_gives_unit_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "warn", "against", "harm", "be", "kind"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    encoder = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu").save(str(tmp_path / "model"))
    embed = sentence_embedder(str(tmp_path / "model"))
    vectors = embed(["warn against harm", "be kind", "warn against harm"])
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
