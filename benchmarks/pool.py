"""Mining in Ray's workers: two of them beside one, a thread each, with engines that are open.

The rows must be the same, whoever mined them: that is part of the benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Result, interleaved, timed
from models.policy import PolicySettings, PoolSettings
from models.prompts import TEMPLATES
from tasks.mine import MineSettings, mine
from tasks.policies.opening import PolicySource
from tasks.prompts import PromptSettings, prompt_sets
from tasks.record.work import shards

PROMPTS, PER_SHARD, ROUNDS = 8, 1, 3
MINE = MineSettings(
    samples=16,
    critique=False,
    temperature=1.0,
    max_response_tokens=24,
    max_principle_tokens=12,
)


def ray_two_workers() -> Result:
    """Candidates a second of two workers and of one; this process, without Ray, is beside them."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # as this process has
    from models.pools.ray_cluster import join

    join(PoolSettings(kind="ray"), cpus=3)  # both pools are open at once
    with TemporaryDirectory() as folder:
        model, parameters = _random_model(Path(folder) / "random")
        with (
            _source(model, PoolSettings()).pool() as local,
            _source(model, PoolSettings(kind="ray", workers=1)).pool() as one,
            _source(model, PoolSettings(kind="ray", workers=2)).pool() as two,
        ):
            found: list[Any] = []
            miners = {"local": _miner(local), "one": _miner(one), "two": _miner(two)}
            opening = {name: timed(partial(miner, found)) for name, miner in miners.items()}
            seconds = interleaved({n: partial(m, found) for n, m in miners.items()}, ROUNDS)
    if any(rows != found[0] for rows in found):
        raise AssertionError("the rows depend on the pool")
    candidates = PROMPTS * MINE.samples
    return Result(
        ratio=seconds["one"] / seconds["two"],
        ours=candidates / seconds["two"],
        peer=candidates / seconds["one"],
        unit="samples/s",
        details={
            "local_pool": candidates / seconds["local"],
            "ray_overhead": seconds["one"] / seconds["local"],
            "first_call_seconds": opening["two"],
            "same_rows": "yes",
            "parameters": parameters,
            "prompts": PROMPTS,
            "samples_per_prompt": MINE.samples,
            "prompts_per_shard": PER_SHARD,
            "threads_per_worker": 1,
            "processors": os.cpu_count() or 0,
            "clock": "wall",
        },
    )


def _random_model(directory: Path) -> tuple[Path, int]:
    """A Llama of about 15 million parameters with the planted world's tokenizer."""
    from models.planted.pretrain import Recipe, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    shape = replace(Recipe(), hidden=384, layers=8, heads=6, intermediate=1024)
    model = build_model(shape, tokenizer, seed=0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, sum(p.numel() for p in model.parameters())


def _source(model: Path, pool: PoolSettings) -> PolicySource:
    settings = PolicySettings(
        model=str(model),
        templates="terse",
        quantization="none",
        dtype="float32",
        device="cpu",
        threads=1,
        pool=pool,
    )
    return PolicySource(settings, str(model), "random")


def _miner(pool: Any) -> Callable[[list[Any]], None]:
    """Mines all prompts, and adds the rows to a list."""
    rows = prompt_sets(PromptSettings(sources="planted", first=PROMPTS), 0, 1).rows
    groups = dict(enumerate(shards(rows, PER_SHARD)))
    job = partial(mine, MINE, TEMPLATES["terse"], "0/1")

    def mine_all(found: list[Any]) -> None:
        done = sorted(pool.map(job, groups, lambda _: None))
        found.append([list(finished.rows) for finished in done])

    return mine_all
