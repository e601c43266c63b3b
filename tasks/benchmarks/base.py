"""What every benchmark declares for its run, its plan and its report, and the two steps of a run.

All benchmarks are answered before any is judged: the policy's memory is then the judge's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field

from constitutions.errors import UserError
from models.files import file_sha256
from models.judges.base import Judge
from models.judges.registry import JudgeSettings, kinds_that
from models.settings import Settings
from tasks.benchmarks.rows import HUB
from tasks.judging.panel import Panel
from tasks.policies.answers import Respondent, Which
from tasks.record.work import Metrics


class Column(NamedTuple):
    """A figure of a table."""

    title: str
    metric: str
    form: Literal["percent", "score", "count", "nats"] = "percent"
    """A share in [0, 1] is shown as percent."""


class Benchmark(Protocol):
    """A benchmark whose files are read and checked."""

    def answer(self, respondent: Respondent) -> Sequence[Any]:
        """The policy's answers, kept in shards; they depend on no other benchmark's."""
        ...

    def measure(self, answers: Sequence[Any], panel: Panel) -> Metrics:
        """The benchmark's figures, under flat names; its files are written among the outputs."""
        ...


class RunSettings(Settings):
    """Base of every benchmark's settings: what it declares, and how it is run.

    A benchmark's own settings that are texts name files, by path or as
    "hub:NAME[:SUBSET]:SPLIT[@REVISION]" for the `datasets` library.
    """

    size: ClassVar[int]
    """Prompts of the published file."""
    turns: ClassVar[int] = 1
    """Turns of the policy for each prompt."""
    columns: ClassVar[tuple[Column, ...]] = ()
    """The figures that the report's table shows."""
    needs_judge: ClassVar[bool] = False
    """There are no figures without a judge."""
    about_principles: ClassVar[bool] = False
    """Its judge is asked about the principle that the policy names."""

    answer: Which = "refined"
    """Which of the policy's answers is measured: y2 or y1."""
    limit: int | None = Field(default=None, ge=1)
    """Use so many of the benchmark's prompts, evenly spaced; all when empty."""
    judge: JudgeSettings | None = None
    """Its own judge; when empty it is evaluate's, where that is an LLM."""

    @abstractmethod
    def load(self, judge: JudgeSettings | None) -> Benchmark:
        """The benchmark, its files read and checked.

        Args:
            judge: the judge; None where it is not judged.

        Raises:
            UserError: a file is missing, or its rows are wrong.
        """

    @classmethod
    def can_judge(cls, judge: type[Judge]) -> bool:
        """Whether this kind of judge can judge the benchmark."""
        return False

    def judged_by(self, default: JudgeSettings, name: str) -> JudgeSettings | None:
        """Its own judge, or the default if that is an LLM that can judge it; None: no judge.

        Raises:
            ValueError: it needs a judge and has none, or has one that cannot judge it.
        """
        kind = default.judge_type
        judge = self.judge or (default if kind.generates and self.can_judge(kind) else None)
        if judge is None and not self.needs_judge:
            return None
        if judge is None or not self.can_judge(judge.judge_type):
            able = kinds_that(self.can_judge)
            needs = f"needs a judge of kind {able}" if able else "is judged by a program"
            raise ValueError(
                f"benchmarks.{name} {needs}: set benchmarks.{name}.judge to that "
                f"(it has '{(judge or default).kind}')"
            )
        return judge.about_principles() if self.about_principles else judge

    def judge_questions(self, judge: JudgeSettings) -> tuple[int, int]:
        """How many questions the judge is asked for each turn, and how many answers each shows."""
        return 2, 2 if judge.judge_type.both_orders else 1

    @property
    def sources(self) -> list[str]:
        """The files that it reads."""
        own = type(self).model_fields.keys() - RunSettings.model_fields.keys()
        return sorted(value for name in own if isinstance(value := getattr(self, name), str))

    @property
    def turns_asked(self) -> int:
        """Turns that the policy is asked for."""
        return self.turns * min(self.limit or self.size, self.size)


def require(packages: Iterable[str], what: str, where: str) -> None:
    """Check that optional packages are installed.

    Args:
        what: what needs them, in the plural: the subject of the message.

    Raises:
        UserError: a package is not installed.
    """
    if lacking := sorted({name for name in packages if find_spec(name) is None}):
        raise UserError(
            f"{what} need {' and '.join(lacking)}, not installed",
            where=where,
            fix="from the checkout: pip install -e '.[benchmarks]'",
        )


def source_digest(source: str) -> str:
    """A source as a fingerprint identifies it: a file's sha256, a data set's name, or "missing"."""
    path = Path(source).expanduser()
    if source.startswith(HUB):
        return source
    return file_sha256(path) if path.is_file() else "missing"
