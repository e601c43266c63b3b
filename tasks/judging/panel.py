"""The judges of an evaluation at work: opened when needed, their judgements kept in shards.

`tasks.evaluate` makes one `Panel`; the held-out comparisons and the benchmarks put their pairs
to it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from models.judges.base import GoldSimilarity, Judge, JudgeSettings
from models.judges.opening import judge_pool, load_judge, located
from models.policy import Policy, PolicySettings, Progress
from models.pools.base import Compute, Finished, Pool, Shards, Where
from models.worlds.base import Oracle
from tasks.judging.comparisons import AnswerPair, decide_all, rate_of
from tasks.judging.winrate import WinRate
from tasks.record.progress import progress
from tasks.record.work import Workspace, shards
from tasks.rows import Comparison
from tasks.similarity.registry import SimilaritySettings, open_similarity

Row = TypeVar("Row")
OpenPolicy = Callable[[JudgeSettings], Policy]
"""Opens the model of an LLM judge."""


@dataclass(kw_only=True)
class Judges:
    """Opens judges by their settings; only the last one's model stays in memory."""

    oracle: Oracle | None
    scoring: SimilaritySettings
    """The judge "similarity"."""
    seed: int
    open_policy: OpenPolicy
    where: Where
    """Where a model's folder is on this machine."""
    _judge: tuple[JudgeSettings, Judge] | None = field(default=None, init=False)
    _model: tuple[Any, Policy] | None = field(default=None, init=False)

    def judge(self, settings: JudgeSettings) -> Judge:
        """The judge, with its model in memory; asked for twice in a row, it is opened once."""
        if self._judge is None or self._judge[0] != settings:
            self._judge = None
            if settings.kind == "reward":  # it brings a model of its own
                self._model = None
                gc.collect()
            compare = open_similarity(self.scoring).compare
            similarity = GoldSimilarity(compare, self.scoring.similarity)
            opened = load_judge(
                located(settings, self.where),
                oracle=self.oracle,
                similarity=similarity,
                seed=self.seed,
                open_policy=self.model,
            )
            self._judge = settings, opened
        return self._judge[1]

    def label(self, settings: JudgeSettings) -> tuple[str, str, str]:
        """What a judge's name in the record is made of: kind, rubric, model."""
        kind, model = settings.kind, settings.policy.model if settings.policy else ""
        if kind == "auto":
            kind = "oracle" if self.oracle else "similarity"
        return kind, settings.chosen_rubric.name, model.rstrip("/").rsplit("/", 1)[-1]

    def model(self, settings: JudgeSettings) -> Policy:
        """The model of an LLM judge: judges that differ in their rubric alone share it."""
        if self._model is None or self._model[0] != settings.policy:
            self._judge = self._model = None
            gc.collect()  # the memory of the last one is needed
            self._model = settings.policy, self.open_policy(located(settings, self.where))
        return self._model[1]


@dataclass(kw_only=True)
class Benches:
    """Judges in the pools that their settings ask for; only the last one's stays open."""

    open: Callable[[Where], Judges]
    _pool: tuple[PolicySettings | None, Pool[Judges]] | None = field(default=None, init=False)

    def of(self, settings: JudgeSettings) -> Pool[Judges]:
        """The pool of a judge. All judges of this process share one; of a cluster's workers, those
        with the same model."""
        own = _own_model(settings)
        if self._pool is None or self._pool[0] != own:
            self.close()
            self._pool = own, judge_pool(settings, self.open)
        return self._pool[1]

    def close(self) -> None:
        """Free the judges' memory."""
        if self._pool is not None:
            self._pool[1].close()
            self._pool = None


def _own_model(settings: JudgeSettings) -> PolicySettings | None:
    """What a judge's workers were opened for; None in this process."""
    policy = settings.policy
    return policy if policy and policy.pool.kind == "ray" and not policy.endpoint else None


class _Put(NamedTuple):
    """A pair, and the number of the judge to whom it is put."""

    judge: int
    pair: AnswerPair


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Judges, where their judgements are kept, and how outcomes become rates."""

    benches: Benches
    model: str
    """What published formats call the policy that is judged."""
    work: Workspace
    iteration: int
    seed: int
    resamples: int
    max_failed: float

    def compare(
        self, name: str, met: Sequence[AnswerPair], judges: Sequence[JudgeSettings]
    ) -> list[list[Comparison]]:
        """Every judge's rows on every pair, kept together as `<name>.parquet`.

        Judges of the same name are told apart by a number: "…-2".
        """
        put = [[_Put(number, pair) for pair in met] for number in range(len(judges))]
        rows = self.in_shards(
            name,
            Comparison,
            [shard for part in put for shard in shards(part, self.work.shard_size)],
            partial(_decide, judges),
            lambda shard: judges[shard[0].judge],
        )
        return [rows[n * len(met) : (n + 1) * len(met)] for n in range(len(judges))]

    def in_shards(
        self,
        name: str,
        row_type: type[Row],
        parts: Sequence[Sequence[Any]],
        compute: Compute[Judges, Row],
        judge: Callable[[Sequence[Any]], JudgeSettings],
        each: int = 1,
    ) -> list[Row]:
        """`compute` over parts, each kept when finished; an item takes `each` judgements.

        Args:
            judge: whose a part is; the parts of one follow each other.
        """
        total = each * sum(map(len, parts))

        def map_all(missing: Shards) -> Iterator[Finished]:
            for settings, group in groupby(missing.items(), lambda item: judge(item[1])):
                yield from self.benches.of(settings).map(compute, dict(group), tick)

        with progress(f"judge {self.iteration}: {name}", total, "judgements") as tick:
            return self.work.sharded(
                name,
                row_type,
                parts,
                map_all,
                found=lambda part: tick(each * len(part)),
            )

    def rate(self, rows: Sequence[Comparison], what: str) -> WinRate:
        """The win rate of comparisons of one kind; see `comparisons.rate_of`."""
        return rate_of(
            rows, what, seed=self.seed, resamples=self.resamples, max_failed=self.max_failed
        )


def _decide(
    settings: Sequence[JudgeSettings], judges: Judges, shard: Sequence[_Put], tick: Progress
) -> list[Comparison]:
    number = shard[0].judge
    rows = decide_all([put.pair for put in shard], judges.judge(settings[number]), tick)
    labels = list(map(judges.label, settings))
    same = labels[:number].count(labels[number])
    return [replace(row, judge=f"{row.judge}-{same + 1}") for row in rows] if same else rows
