"""What every benchmark is to `evaluate`: its settings, and two steps, answering and measuring.

All benchmarks are answered before any is judged: then the policy's memory is the judge's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from models.files import file_sha256
from models.judges.base import JudgeSettings
from models.settings import Settings
from tasks.benchmarks.rows import HUB
from tasks.judging.panel import Panel
from tasks.policies.answers import Respondent, Which
from tasks.record.work import Metrics

LLM = ("pairwise", "absolute")
"""The kinds of judges that an LLM is."""


class RunSettings(Settings):
    """What all benchmarks have in common.

    Files are given by path, or as "hub:NAME[:SUBSET]:SPLIT[@REVISION]" for the `datasets` library.
    """

    answer: Which = "refined"
    """Which of the policy's answers is measured: y2 or y1."""
    limit: int | None = Field(default=None, ge=1)
    """Use so many of the benchmark's prompts, evenly spaced; all when empty."""
    judge: JudgeSettings | None = None
    """Its own judge; when empty it is evaluate's, where that is an LLM."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The files that it reads."""


class Benchmark(Protocol):
    """A benchmark whose files were read and found to be right."""

    def answer(self, respondent: Respondent) -> Sequence[Any]:
        """The policy's answers, kept in shards; they depend on no other benchmark's."""
        ...

    def measure(self, answers: Sequence[Any], panel: Panel) -> Metrics:
        """The benchmark's figures, under flat names; its files are written among the outputs."""
        ...


def source_digest(source: str) -> str:
    """What a file holds, for a fingerprint: its sha256; of a data set its name tells."""
    path = Path(source).expanduser()
    if source.startswith(HUB):
        return source
    return file_sha256(path) if path.is_file() else "missing"
