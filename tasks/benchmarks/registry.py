"""The benchmarks that `evaluate` may run: a new one is a folder, its import and its line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from models.judges.registry import JudgeSettings
from models.settings import Settings
from tasks.benchmarks.alpaca_eval.run import AlpacaEvalSettings
from tasks.benchmarks.base import Benchmark, Column, RunSettings, source_digest
from tasks.benchmarks.ifeval.run import IFEvalSettings
from tasks.benchmarks.mt_bench.run import MTBenchSettings


class BenchmarkSettings(Settings):
    """Public benchmarks, from their standard files; none unless its files are named."""

    mt_bench: MTBenchSettings | None = None
    """MT-Bench."""
    alpaca_eval: AlpacaEvalSettings | None = None
    """AlpacaEval 2."""
    ifeval: IFEvalSettings | None = None
    """IFEval."""

    @property
    def chosen(self) -> dict[str, RunSettings]:
        """Those that are run, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: run for name, run in named.items() if run is not None}

    def judges(
        self, default: JudgeSettings, *, guided: bool = True
    ) -> Iterator[tuple[str, JudgeSettings]]:
        """The judge of each benchmark that is judged: see `RunSettings.judged_by`.

        Args:
            guided: whether the policy names principles; otherwise no principle is judged.

        Raises:
            ValueError: a benchmark needs a judge and has none, or one that cannot judge it.
        """
        for name, run in self.chosen.items():
            judge = run.judged_by(default, name)
            if judge and (guided or not run.about_principles):
                yield name, judge

    def load(self, default: JudgeSettings, *, guided: bool) -> dict[str, Benchmark]:
        """Every chosen benchmark, its files read and checked; `guided` as in `judges`.

        Raises:
            UserError: a file is missing, or its rows are wrong.
        """
        judges = dict(self.judges(default, guided=guided))
        return {name: run.load(judges.get(name)) for name, run in self.chosen.items()}

    @property
    def uses(self) -> list[str]:
        """The modules whose code decides the figures of those that are run."""
        return [type(run).__module__ for run in self.chosen.values()]

    def notes(self) -> dict[str, str]:
        """What the files hold, for a fingerprint."""
        sources = {source for run in self.chosen.values() for source in run.sources}
        return {f"file {source}": source_digest(source) for source in sorted(sources)}


def columns() -> list[Column]:
    """The figures of all benchmarks that the report's table shows."""
    fields = BenchmarkSettings.model_fields.values()
    return [column for field in fields for column in get_args(field.annotation)[0].columns]
