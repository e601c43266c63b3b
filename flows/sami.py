"""SAMI's stages in order: write once, then in each iteration sample, train and evaluate.

`flows.loop` runs the iterations of every method, on the same record, engine and judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from flows.experiment import Experiment
from tasks.prompts import prompts_stage
from tasks.record.record import Attempt
from tasks.sami.evaluate import evaluate_stage
from tasks.sami.sample import sample_stage
from tasks.sami.train import train_stage
from tasks.sami.write import write_stage
from tasks.teach import teach_stage


def steps(e: Experiment, t: int) -> Iterator[Attempt]:
    """One iteration on fresh queries, stage by stage.

    Iteration 0: the constitution is read or written, and the initial policy answers the held-out
    prompts with it.
    """
    at, settings = e.slot(t), e.settings_at(t)
    mixtures = e.settings_at(0).sample  # all policies are measured on the same constitutions
    measured = partial(evaluate_stage, at, settings.evaluate, settings.score, mixtures)
    yield (prompts := prompts_stage(at, settings.prompts))
    if t == 0:
        if settings.teach.on:
            world = settings.prompts.world
            yield teach_stage(at, settings.teach, settings.train, e.untaught, world)
        yield (written := write_stage(at, settings.write, e.writer(), e.discovered()))
        yield measured(e.policy(0), prompts, written)
        return

    written, policy = e.constitution(t), e.policy(t - 1, t)
    yield (sampled := sample_stage(at, settings.sample, policy, prompts, written))
    yield (trained := train_stage(at, settings.train, policy, sampled))
    tuned, references = policy.trained(trained), e.references(t)
    yield measured(tuned, written=written, **references)
