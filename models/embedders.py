"""Loads a sentence-transformers model as a function from texts to vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from constitutions.errors import UserError
from models.checkpoints.architecture import first_line
from models.checkpoints.headers import check_listing, read_object, read_tensors
from models.engine.threads import pinned
from models.packaged import fetched

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of length 1, shape (texts, dimensions), float32; zeros where there is none."""

BATCH = 64
"""Texts that are embedded together."""


def sentence_embedder(model: str) -> Embed:
    """The function of a sentence-transformers model: a directory, a packaged model or a hub name.

    Raises:
        UserError: the directory is missing or holds no model, or the name cannot be loaded.
    """
    check_embedder(model)
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            str(embedder_directory(model) or model),
            device="cpu",
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},  # nothing is unpickled
        )
    except MemoryError:
        raise
    except Exception as error:  # each library raises its own kinds for a file that is malformed
        raise UserError(
            f"the embedding model cannot be loaded ({first_line(error)})",
            where=f"embedding_model '{model}'",
            expected="a sentence-transformers directory, or a hub name that can be downloaded",
        ) from error

    def embed(texts: Sequence[str]) -> np.ndarray:
        with pinned(None):
            vectors = encoder.encode(list(texts), batch_size=BATCH, show_progress_bar=False)
        return unit_rows(np.asarray(vectors, dtype=np.float32))

    return embed


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """The rows scaled to length 1; zeros where a row is zero or not finite."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 0)
    scaled: np.ndarray = np.where(usable, vectors, 0) / np.where(usable, norms, 1)
    return scaled


def embedder_directory(model: str) -> Path | None:
    """The directory of an embedding model on this machine; None for a name of the hub.

    Raises:
        UserError: a packaged model is not fetched yet.
    """
    path = fetched(model) or Path(model).expanduser()
    return path if path.is_dir() else None


def check_embedder(model: str) -> None:
    """Check that a directory holds a whole embedding model; a hub's "owner/name" passes.

    Raises:
        UserError: there is no such directory, its configuration or weights are malformed, or a
            packaged model is not fetched yet.
    """
    path = embedder_directory(model)
    if path is None:
        if model.startswith((".", "~", os.sep)) or model.count(os.sep) > 1:
            raise UserError("there is no such directory", where=f"embedding_model '{model}'")
    elif not any((path / name).is_file() for name in ("modules.json", "config.json")):
        raise UserError(
            "the directory holds no model",
            where=f"embedding_model '{model}'",
            expected="modules.json (sentence-transformers) or config.json (transformers)",
        )
    elif (path / "config.json").exists():
        read_object(path / "config.json")
        check_listing(path)
        read_tensors(path)
