"""The panel of an evaluation: judges, opened when needed, and their judgements kept in shards.

A pair goes from `Panel.compare` through the shards that are not judged yet (`Workspace.sharded`)
and a pool (`Pool.map`) to `judge_pairs`, which asks the judge (`Judge.compare`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any

from models.judges.base import Judge, Similarity
from models.judges.registry import JudgeSettings, judge_pool, located, open_policy
from models.policy import Policy, PolicySettings, Progress
from models.pools.base import Compute, Finished, Pool, Row, Shards, Where
from models.worlds.base import Oracle
from tasks.judging.pairs import AnswerPair, as_judged, comparison, without_judge
from tasks.judging.rates import rate_of
from tasks.judging.winrate import WinRate
from tasks.record.progress import progress
from tasks.record.work import Workspace, shards
from tasks.rows import Comparison
from tasks.similarity.registry import SimilaritySettings, open_similarity

OpenPolicy = Callable[[JudgeSettings], Policy]
"""Opens the model of an LLM judge."""


@dataclass
class Judges:
    """Opens judges by their settings, in one process; only the last one's model stays in memory.

    It is what `models.judges.base.Resources` describes.
    """

    where: Where
    """Where a model's folder is on this machine."""
    _: KW_ONLY
    oracle: Oracle | None
    """The judge that knows the truth of the prompts' world; None where there is none."""
    scoring: SimilaritySettings
    seed: int
    open_policy: OpenPolicy
    _judge: tuple[JudgeSettings, Judge] | None = field(default=None, init=False)
    _model: tuple[PolicySettings | None, Policy] | None = field(default=None, init=False)

    def judge(self, settings: JudgeSettings) -> Judge:
        """The judge, with its model in memory; asked for twice in a row, it is opened once."""
        if self._judge is None or self._judge[0] != settings:
            here = located(settings, self.where)
            if settings.judge_type.needs_model:
                self._free(keep=here.policy if settings.judge_type.generates else None)
            self._judge = settings, settings.on(self.oracle).open(here, self)
        return self._judge[1]

    def model(self, settings: JudgeSettings) -> Policy:
        """The model of an LLM judge; judges that differ only in their rubric share it.

        Raises:
            UserError: it cannot be loaded, or its endpoint cannot be used.
        """
        here = located(settings, self.where)
        if self._model is None or self._model[0] != here.policy:
            self._free(keep=None)
            self._model = here.policy, self.open_policy(here)
        return self._model[1]

    def _free(self, keep: PolicySettings | None) -> None:
        """Free the memory of judges' models before another is opened; a model may have cycles."""
        self._judge = None
        if self._model is not None and self._model[0] != keep:
            self._model = None
        gc.collect()

    @property
    def similarity(self) -> tuple[Similarity, str]:
        """The similarity of `score`, and its name; its model is loaded when it is first asked."""
        return open_similarity(self.scoring).best, self.scoring.similarity


@dataclass(kw_only=True)
class Panel:
    """Judges, where their judgements are kept, and how outcomes become rates.

    Leaving its `with` block frees the judges' memory.
    """

    oracle: Oracle | None
    """The judge that knows the truth of the prompts' world; None where there is none."""
    scoring: SimilaritySettings
    """The similarity of the judge "similarity"."""
    model: str
    """What published formats call the policy that is judged."""
    work: Workspace
    iteration: int
    seed: int
    resamples: int
    max_failed: float
    open_policy: OpenPolicy = open_policy
    _pool: tuple[PolicySettings | None, Pool[Judges]] | None = field(default=None, init=False)

    def __enter__(self) -> Panel:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool[1].close()
            self._pool = None

    def compare(
        self, name: str, pairs: Sequence[AnswerPair], judges: Sequence[JudgeSettings]
    ) -> list[list[Comparison]]:
        """For each judge its rows on every pair, all kept together as `<name>.parquet`.

        The second of two judges with the same name has the name "…-2".
        """
        titles = [judge.on(self.oracle).title(judge) for judge in judges]
        times = [titles[:n].count(title) for n, title in enumerate(titles)]
        jobs = [
            (judge, partial(judge_pairs, judge, f"-{before + 1}" if before else ""))
            for judge, before in zip(judges, times, strict=True)
        ]
        parts = shards(pairs, self.work.shard_size)
        what, total = f"judge {self.iteration}: {name}", len(judges) * len(pairs)
        with progress(what, total, "judgements") as tick:

            def compute(missing: Shards) -> Iterable[Finished]:
                """Judge after judge: only one's model is in memory."""
                return chain.from_iterable(
                    self._pool_of(jobs[number][0]).map(jobs[number][1], dict(own), tick)
                    for number, own in groupby(missing.items(), lambda item: item[0] // len(parts))
                )

            found = self.work.sharded(
                name, Comparison, parts * len(judges), compute, lambda part: tick(len(part))
            )
        rows = list(self.work.table(found))
        return [rows[n * len(pairs) : (n + 1) * len(pairs)] for n in range(len(judges))]

    def in_shards(
        self,
        name: str,
        row_type: type[Row],
        items: Sequence[Any],
        settings: JudgeSettings,
        compute: Compute[Judges, Row],
        each: int,
    ) -> list[Row]:
        """The rows of `compute` over shards of items, kept together as `<name>.parquet`.

        Args:
            settings: the judge that `compute` asks; its pool is opened where a shard is missing.
            each: judgements an item.
        """
        parts = shards(items, self.work.shard_size)
        with progress(f"judge {self.iteration}: {name}", each * len(items), "judgements") as tick:

            def judged(missing: Shards) -> Iterable[Finished]:
                return self._pool_of(settings).map(compute, missing, tick) if missing else ()

            found = self.work.sharded(
                name, row_type, parts, judged, lambda part: tick(each * len(part))
            )
        return list(self.work.table(found))

    def _pool_of(self, settings: JudgeSettings) -> Pool[Judges]:
        """The pool of a judge: judges in this process share one, as do those of a cluster with the
        same model. The pool before it is closed."""
        policy = settings.policy
        own = policy if policy and policy.in_ray else None
        if self._pool is None or self._pool[0] != own:
            self.__exit__()
            opener = partial(
                Judges,
                oracle=self.oracle,
                scoring=self.scoring,
                seed=self.seed,
                open_policy=self.open_policy,
            )
            self._pool = own, judge_pool(settings, opener)
        return self._pool[1]

    def rate(self, rows: Sequence[Comparison], what: str) -> WinRate:
        """The win rate of comparisons of one kind; see `rates.rate_of`.

        Raises:
            UserError: every judgement failed, or more than the share `max_failed`.
        """
        return rate_of(
            rows, what, seed=self.seed, resamples=self.resamples, max_failed=self.max_failed
        )


def judge_pairs(
    settings: JudgeSettings,
    suffix: str,
    judges: Judges,
    pairs: Sequence[AnswerPair],
    advance: Progress,
) -> list[Comparison]:
    """A row for every pair, in their order; `advance` counts pairs.

    A missing answer or a failed judgement is a row without an outcome. A pair that needs no judge
    is decided without one (`without_judge`).

    Args:
        suffix: ends the judge's name in the rows.

    Raises:
        UserError: the judge cannot be opened.
        ValueError: the judge gave fewer or more judgements than it was asked for.
    """
    judge = judges.judge(settings)
    known = [without_judge(pair) for pair in pairs]
    asked = [as_judged(p) for p, verdict in zip(pairs, known, strict=True) if verdict is None]
    advance(len(pairs) - len(asked))
    judged = judge.compare(asked, advance) if asked else []
    if len(judged) != len(asked):
        raise ValueError(f"the judge gave {len(judged)} judgements on {len(asked)} pairs")
    verdicts = iter(judged)
    return [
        comparison(p, judge.name + suffix, verdict or next(verdicts), asked=verdict is None)
        for p, verdict in zip(pairs, known, strict=True)
    ]
