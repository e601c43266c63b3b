"""An EM iteration of STaPLe and its baselines, on one screen.

`steps` is the one wiring of the stages: `flows.loop` runs all of them, `flows.stages` one of them,
and `flows.states` none: it asks for their states. A stage reuses its result from the record if
nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterator

from flows import sami
from flows.experiment import Experiment
from flows.methods import method_of
from tasks.cluster import cluster_stage
from tasks.evaluate import evaluate_stage
from tasks.filter import filter_stage
from tasks.mine import mine_stage
from tasks.prompts import prompts_stage
from tasks.record.record import Attempt
from tasks.review import review_stage
from tasks.score import score_stage
from tasks.teach import teach_stage
from tasks.train import train_stage


def steps(e: Experiment, t: int) -> Iterator[Attempt]:
    """One EM iteration, stage by stage; it ends early if a person has to review first.

    E-step (mine, score, filter), constitution (cluster, review), M-step (train), evaluation: each
    method has some of them (`flows.methods`). In iteration 0 the initial policy, which may be
    taught first, answers the held-out prompts.
    """
    method = method_of(e.settings)
    if method.constitutional:
        yield from sami.steps(e, t)
        return
    at, settings = e.slot(t), e.settings_at(t)
    yield (prompts := prompts_stage(at, settings.prompts))
    if t == 0:
        if settings.teach.on:
            world = settings.prompts.world
            yield teach_stage(at, settings.teach, settings.train, e.untaught, world)
        yield evaluate_stage(at, settings.evaluate, settings.score, e.policy(0), prompts)
        return

    policy = e.policy(t - 1, t)
    examples, mined_from, kept = prompts, {}, {}
    if method.mines:
        yield (mined := mine_stage(at, settings.mine, policy, prompts))
        yield (scored := score_stage(at, settings.score, mined))
        mined = scored.source("mined", mined)  # whose scores they are, should it be mined again
        yield (filtered := filter_stage(at, settings.filter, mined, scored, method.guided))
        examples = filtered

    if method.guided:
        earlier = e.earlier_constitutions(t)
        yield (examples := cluster_stage(at, settings.cluster, policy, examples, mined, earlier))
        if settings.review.enabled:
            verdict = e.verdict(t, examples)
            if verdict is None:
                return
            yield (examples := review_stage(at, settings.review, examples, verdict))
        mined_from = {"mined": mined, "labelled": examples}
        kept = {"mined": mined, "filtered": filtered} if settings.train.gate else {}

    yield (trained := train_stage(at, settings.train, policy, examples, **kept))
    tuned = policy.trained(trained, gated=settings.train.gate)
    references = e.references(t)
    yield evaluate_stage(at, settings.evaluate, settings.score, tuned, **references, **mined_from)
