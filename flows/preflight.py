"""Checks before anything is computed: settings, models, data, benchmarks, disk.

All mistakes are reported together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from constitutions.constitution import Constitution, Principle
from constitutions.errors import UserError, UserErrors
from constitutions.reference import load_pairs, shipped
from flows.experiment import home, open_experiment
from flows.methods import method_of
from flows.schema import ExperimentSettings
from flows.settings import explain, following
from models.embedders import check_embedder
from models.endpoint.client import Limits, open_endpoint
from models.endpoint.probing import check_server
from models.policy import PoolSettings
from models.pools.opening import check_pool
from tasks.corpus.prompts import CorpusSettings, load_corpus
from tasks.evaluate import check_judges
from tasks.judging.judge import check_judge
from tasks.policies.base import open_model
from tasks.prompts import prompt_sets
from tasks.sami.evaluate import check_followed
from tasks.sami.sample import check_mixtures
from tasks.sami.write import split_held_out
from tasks.similarity.registry import open_similarity
from tasks.teach import skill_examples

LEAST_FREE_BYTES = 512 << 20
"""Free disk that an experiment needs at least: database, rows, adapters, figures."""


def check_all(settings: ExperimentSettings) -> dict[str, str]:
    """`check` the experiment, and the one that its setting `then` describes.

    Raises:
        UserErrors: all mistakes.
    """
    found = check(settings)
    if then := following(settings):
        try:
            check(then, follows=True)
        except UserError as error:
            raise UserErrors([error], within="then") from None
    return found


def check(settings: ExperimentSettings, *, follows: bool = False) -> dict[str, str]:
    """Check an experiment; what it runs with, as texts by name.

    Args:
        follows: the experiment that `after` names runs before this one.

    Raises:
        UserErrors: all mistakes.
    """
    problems: list[UserError] = []
    sami = method_of(settings).constitutional

    def attempt(look: Callable[[], str]) -> str:
        try:
            return look()
        except UserError as error:
            problems.append(error)
        return ""

    found = {
        "model": attempt(lambda: _model(settings)),
        "prompts": attempt(lambda: _prompts(settings)),
        **({"teach": attempt(lambda: _skills(settings))} if settings.teach.on else {}),
        **({"write": attempt(lambda: _constitution(settings, follows))} if sami else {}),
        **({} if sami else {"score": attempt(lambda: _similarity(settings))}),
        "evaluate": attempt(lambda: _judges(settings)) + attempt(lambda: _benchmarks(settings)),
        "disk": attempt(_disk),
        **({"pool": attempt(lambda: _pools(settings))} if _by_ray(settings) else {}),
    }
    problems += _beyond_endpoints(settings)
    if problems:
        raise UserErrors(problems)
    return found


def ask_server(settings: ExperimentSettings) -> None:
    """Check that the policy's endpoint answers, and that it loads adapters if any are trained.

    `check` leaves this out, because a run that reuses everything from the record needs no server.

    Raises:
        UserError: the endpoint does not answer, or cannot load adapters.
    """
    if settings.policy.endpoint:
        check_server(settings.policy, adapters=_trains(settings), limits=Limits(start=10))


def _trains(settings: ExperimentSettings) -> bool:
    """Whether there will be adapters."""
    return settings.last > 0 or settings.teach.on


def _model(settings: ExperimentSettings) -> str:
    policy = settings.policy
    found = open_model(policy, "trained" if _trains(settings) else "sampled")
    if not policy.endpoint:
        return found
    open_endpoint(policy)  # its address and key
    return f"{found}; answers come from {policy.served_name} at {policy.endpoint}"


def _beyond_endpoints(settings: ExperimentSettings) -> Iterator[UserError]:
    """Errors about settings that need more than an endpoint offers."""
    clusters = settings.policy.endpoint and method_of(settings).guided and settings.last
    if clusters and "hidden" in settings.cluster.features:
        yield _beyond("features", "hidden states", 'leave "hidden" out')
    if clusters and settings.cluster.logprob_tolerance is not None:
        yield _beyond("logprob_tolerance", "log-probabilities of given responses", "leave it unset")


def _beyond(setting: str, needed: str, instead: str) -> UserError:
    return UserError(
        f"an endpoint gives no {needed}",
        where=f"setting 'cluster.{setting}'",
        fix=f"{instead}, or unset policy.endpoint to run the policy in process",
    )


def check_data(path: str) -> dict[str, str]:
    """Check a data file; its numbers of rows, as texts by name.

    Raises:
        UserErrors: the rows that are not usable.
    """
    try:
        source = CorpusSettings(path=path)
    except ValidationError as error:
        raise UserErrors(explain(error, path)) from None
    corpus = load_corpus((source,), seed=0)
    return {"rows": f"{len(corpus.rows):,} usable", "rejected": f"{len(corpus.rejected):,}"}


def _prompts(settings: ExperimentSettings) -> str:
    last = prompt_sets(settings.prompts, settings.seed, settings.last)
    if settings.prompts.world and settings.last:
        prompt_sets(settings.prompts, settings.seed, 0)  # a corpus needs no second check
    mined = [settings.prompts.first] + [settings.prompts.later] * (settings.last - 1)
    rejected = f"; {len(last.rejected):,} rows rejected" if last.rejected else ""
    counts = " + ".join(f"{size:,}" for size in mined if settings.last) or "none"
    use = "to sample" if method_of(settings).constitutional else "to mine"
    return f"{counts} {use}, {settings.prompts.held_out:,} held out{rejected}"


def _skills(settings: ExperimentSettings) -> str:
    """How many examples teach what."""
    teach = settings.teach
    world = settings.prompts.world
    found = len(skill_examples(teach, world))
    naming = teach.named(found)
    source = teach.file or f"the {world.name} world" if world else teach.file
    return f"{naming:,} examples of naming and {found - naming:,} of following, of {source}"


def _constitution(settings: ExperimentSettings, follows: bool) -> str:
    """Where the principles come from; they are checked to have enough mixtures."""
    write = settings.write
    if settings.after and not follows:
        assert open_experiment(settings).before, "it exists and fits"
    if write.constitution is None:
        if not settings.after:
            pool = [Principle(text=f"{n}", antithesis=f"not {n}") for n in range(write.principles)]
            _check_pool(settings, Constitution(principles=tuple(pool)))
        writer = open_model(write.writer, "sampled") if write.writer else "the policy"
        found = f"discovered by {settings.after}, antitheses" if settings.after else "written"
        return f"{found} by {writer}"
    constitution = load_pairs(write.constitution)
    world, oracle = settings.prompts.world, settings.prompts.oracle
    if world and oracle and not any(map(oracle.known, constitution.texts)):
        raise UserError(
            f"none of these principles is about the {world.name} world",
            where=f"setting 'write.constitution' = {write.constitution}",
            expected=f"principles such as '{world.principle}'",
            fix=f"write.constitution={world.name}" if world.name in shipped() else "",
        )
    trained, held_out = _check_pool(settings, constitution)
    return f"{trained} principles of {write.constitution}, {held_out} more held out"


def _check_pool(settings: ExperimentSettings, constitution: Constitution) -> tuple[int, int]:
    """How many principles are trained on, and how many held out."""
    share = settings.write.held_out
    trained, held_out = split_held_out(constitution, share, settings.seed)
    check_mixtures(settings.sample, [p for p in constitution.principles if p.id in trained])
    return len(trained), len(held_out)


def _similarity(settings: ExperimentSettings) -> str:
    clusters = method_of(settings).guided and settings.last
    if clusters and "sentences" in settings.cluster.features:
        check_embedder(settings.cluster.embedding_model)
    return f"similarity {open_similarity(settings.score).check()}"


def _judges(settings: ExperimentSettings) -> str:
    evaluate = settings.evaluate
    check_them = check_followed if method_of(settings).constitutional else check_judges
    check_them(evaluate, settings.score, settings.prompts.oracle)
    models = [check_judge(judge) for judge in evaluate.all_judges if judge.policy]
    oracle = settings.prompts.oracle
    kinds = ", ".join(judge.on(oracle).title(judge) for judge in evaluate.judges)
    return f"judge {kinds}" + (f" ({'; '.join(dict.fromkeys(models))})" if models else "")


def _by_ray(settings: ExperimentSettings) -> list[PoolSettings]:
    """The policy's and the judges' pools that Ray runs."""
    judges = [settings.score.judge, *settings.evaluate.all_judges]
    policies = [settings.policy, *(judge.policy for judge in judges if judge)]
    return [p.pool for p in policies if p and p.in_ray]


def _pools(settings: ExperimentSettings) -> str:
    return "; ".join(dict.fromkeys(map(check_pool, _by_ray(settings))))


def _benchmarks(settings: ExperimentSettings) -> str:
    chosen = settings.evaluate.benchmarks
    chosen.load(settings.evaluate.judge, guided=method_of(settings).guided)
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
