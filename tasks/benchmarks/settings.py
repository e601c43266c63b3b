"""Which benchmarks `evaluate` runs, and by whom they are judged."""

from __future__ import annotations

from collections.abc import Iterator

from models.judges.base import JudgeSettings
from models.settings import Settings
from tasks.benchmarks.alpaca_eval.run import AlpacaEvalSettings, load_alpaca_eval
from tasks.benchmarks.base import LLM, Benchmark, RunSettings, source_digest
from tasks.benchmarks.ifeval.run import IFEvalSettings, load_ifeval
from tasks.benchmarks.mt_bench.run import MTBenchSettings, load_mt_bench


class BenchmarkSettings(Settings):
    """Public benchmarks, from their standard files; none unless its files are named."""

    alpaca_eval: AlpacaEvalSettings | None = None
    """AlpacaEval 2."""
    mt_bench: MTBenchSettings | None = None
    """MT-Bench."""
    ifeval: IFEvalSettings | None = None
    """IFEval."""

    @property
    def chosen(self) -> dict[str, RunSettings]:
        """Those that are run, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: run for name, run in named.items() if run is not None}

    def judges(self, default: JudgeSettings) -> Iterator[tuple[str, JudgeSettings]]:
        """Who judges each benchmark: its own judge, or the default where that is an LLM.

        IFEval's judge is asked about principles, so its rubric is one about principles.

        Raises:
            ValueError: a benchmark needs a judge and has none, or one that cannot judge it.
        """
        for name, run in self.chosen.items():
            able = (*LLM, "reward") if name == "alpaca_eval" else LLM
            if run.judge is None and name == "ifeval" and default.kind not in LLM:
                continue  # a program checks it
            judge = run.judge or default
            if judge.kind not in able or (run.judge is None and judge.kind not in LLM):
                raise ValueError(
                    f"benchmarks.{name} needs a judge of kind {' or '.join(able)}: set "
                    f"benchmarks.{name}.judge (it has '{judge.kind}')"
                )
            yield name, about_principles(judge) if name == "ifeval" else judge

    def load(self, default: JudgeSettings, *, guided: bool) -> dict[str, Benchmark]:
        """Every chosen benchmark, its files read and checked.

        Args:
            guided: whether the policy names principles; of one that does not, none are judged.

        Raises:
            UserError: a file is missing, or its rows are wrong.
        """
        judges = dict(self.judges(default))
        found: dict[str, Benchmark] = {}
        if self.alpaca_eval:
            found["alpaca_eval"] = load_alpaca_eval(self.alpaca_eval, judges["alpaca_eval"])
        if self.mt_bench:
            found["mt_bench"] = load_mt_bench(self.mt_bench, judges["mt_bench"])
        if self.ifeval:
            found["ifeval"] = load_ifeval(self.ifeval, judges.get("ifeval") if guided else None)
        return found

    def notes(self) -> dict[str, str]:
        """What the files hold, for a fingerprint."""
        sources = {source for run in self.chosen.values() for source in run.sources}
        return {f"file {source}": source_digest(source) for source in sorted(sources)}


def about_principles(judge: JudgeSettings) -> JudgeSettings:
    """The same judge with a rubric that shows the principle."""
    if judge.chosen_rubric.principle:
        return judge
    return judge.model_copy(update={"rubric": "principle"})
