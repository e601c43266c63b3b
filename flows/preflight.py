"""What is checked before any compute is spent: settings, models, data, benchmarks, disk.

All mistakes are reported together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from constitutions.errors import UserError, UserErrors
from flows.experiment import home
from flows.settings import ExperimentSettings
from models.policy import PoolSettings
from models.pool import check_pool
from tasks.basemodels import check_model
from tasks.corpus import CorpusSettings, load_corpus
from tasks.evaluate import check_judges
from tasks.judging import check_judge
from tasks.prompts import prompt_sets

LEAST_FREE_BYTES = 512 << 20
"""Free disk that an experiment needs at least: database, rows, adapters, figures."""


def check(settings: ExperimentSettings) -> dict[str, str]:
    """What will be run, by name, as text for people.

    Raises:
        UserErrors: everything that is wrong.
    """
    problems: list[UserError] = []

    def attempt(look: Callable[[], str]) -> str:
        try:
            return look()
        except UserError as error:
            problems.append(error)
        return ""

    found = {
        "model": attempt(lambda: check_model(settings.policy)),
        "prompts": attempt(lambda: _prompts(settings)),
        "score": attempt(lambda: _similarity(settings)),
        "evaluate": attempt(lambda: _judges(settings)) + attempt(lambda: _benchmarks(settings)),
        "disk": attempt(_disk),
        **({"pool": attempt(lambda: _pools(settings))} if _by_ray(settings) else {}),
    }
    if problems:
        raise UserErrors(problems)
    return found


def check_data(path: str) -> dict[str, str]:
    """What a data file holds.

    Raises:
        UserErrors: the rows that cannot be used.
    """
    corpus = load_corpus((CorpusSettings(path=path),), seed=0)
    return {"rows": f"{len(corpus.rows):,} usable", "rejected": f"{len(corpus.rejected):,}"}


def _prompts(settings: ExperimentSettings) -> str:
    last = prompt_sets(settings.prompts, settings.seed, settings.iterations)
    mined = [settings.prompts.first] + [settings.prompts.later] * (settings.iterations - 1)
    rejected = f"; {len(last.rejected):,} rows rejected" if last.rejected else ""
    counts = " + ".join(f"{size:,}" for size in mined if settings.iterations) or "none"
    return f"{counts} to mine, {settings.prompts.held_out:,} held out{rejected}"


def _similarity(settings: ExperimentSettings) -> str:
    judge = settings.score.judge
    graded = f" ({check_judge(judge)})" if judge else ""
    return f"similarity {settings.score.similarity}{graded}"


def _judges(settings: ExperimentSettings) -> str:
    evaluate = settings.evaluate
    check_judges(evaluate, settings.score, planted=settings.prompts.sources == "planted")
    models = [check_judge(judge) for judge in evaluate.all_judges if judge.policy]
    kinds = ", ".join(judge.kind for judge in evaluate.judges)
    return f"judge {kinds}" + (f" ({'; '.join(dict.fromkeys(models))})" if models else "")


def _by_ray(settings: ExperimentSettings) -> list[PoolSettings]:
    """The pools that are not this process: the policy's and the judges'."""
    judges = [settings.score.judge, *settings.evaluate.all_judges]
    policies = [settings.policy, *(j.policy for j in judges if j and not j.endpoint)]
    return [p.pool for p in policies if p and p.pool.kind == "ray"]


def _pools(settings: ExperimentSettings) -> str:
    return "; ".join(dict.fromkeys(map(check_pool, _by_ray(settings))))


def _benchmarks(settings: ExperimentSettings) -> str:
    chosen = settings.evaluate.benchmarks
    chosen.load(settings.evaluate.judge, guided=settings.guided)
    return f"; also {', '.join(chosen.chosen)}" if chosen.chosen else ""


def _disk() -> str:
    place = home().absolute()
    place = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        raise UserError(
            f"only {free >> 20} MiB are free on the disk",
            where=str(home()),
            expected=f"at least {LEAST_FREE_BYTES >> 20} MiB",
            fix="free some space, or set STAPLE_HOME to another disk",
        )
    return f"{free / 2**30:.0f} GiB free"
