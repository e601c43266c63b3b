"""All similarities by name. To add one: its file, an import, a line in SIMILARITIES, and its
settings (if it has any) among the bases of `SimilaritySettings`. See docs/extend.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from models.pools.base import Where
from tasks.similarity.base import Similarity
from tasks.similarity.embedding import Embedding, EmbeddingSettings
from tasks.similarity.judge import GradeSettings, JudgeGrade
from tasks.similarity.python import Function, FunctionSettings
from tasks.similarity.rouge import RougeL, RougeSettings
from tasks.similarity.sentences import Sentences

SIMILARITIES: dict[str, type[Similarity[Any]]] = {
    "rouge_l": RougeL,
    "sentences": Sentences,
    "embedding": Embedding,
    "judge": JudgeGrade,
    "python": Function,
}
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(SIMILARITIES)]


class SimilaritySettings(FunctionSettings, GradeSettings, EmbeddingSettings, RougeSettings):
    """Which similarity, and the settings of each."""

    similarity: Name = "rouge_l"
    """How a response is compared with the gold: ROUGE-L F1 (the paper's), the cosine of sentence
    embeddings, of each sentence alone (sentences), the grade of an LLM judge that is shown the
    gold, or a Python function of yours."""


def open_similarity(
    settings: SimilaritySettings, seed: int = 0, where: Where = str
) -> Similarity[Any]:
    """The similarity that the settings choose; its model is loaded when it is first asked."""
    return SIMILARITIES[settings.similarity](settings, seed, where)
