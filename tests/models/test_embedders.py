"""A sentence-transformers model: unit vectors, or an error that names the text or the folder."""

from pathlib import Path

import numpy as np
import pytest

from constitutions.errors import UserError
from models.embedders import sentence_embedder, unit_rows


def test_a_text_without_a_vector_has_zeros() -> None:
    rows = np.array([[3.0, 4.0], [0, 0], [np.nan, 1], [np.inf, 1]])
    np.testing.assert_array_equal(unit_rows(rows), [[0.6, 0.8], [0, 0], [0, 0], [0, 0]])


def test_a_directory_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the directory holds no model"):
        sentence_embedder(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        sentence_embedder(str(tmp_path / "missing"))


def test_a_sentence_model_directory_gives_unit_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setenv("HOME", str(tmp_path))
    embed = sentence_embedder("~/model")
    vectors = embed(["warn against harm", "be kind", "warn against harm"])
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
