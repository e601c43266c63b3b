"""Ask a trained policy one thing: y1, z, y2, and where the principle stands in the constitution."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from constitutions.constitution import Constitution, Principle, load, principle_key
from constitutions.errors import UserError
from flows.experiment import newest, open_experiment
from flows.settings import ExperimentSettings
from models.policy import Message
from tasks.answers import answer
from tasks.records import Answer, Prompt, prompt_id


@dataclass(frozen=True)
class Asked:
    """The answer, and the entry of the constitution that its principle is or comes nearest to."""

    iteration: int
    answer: Answer
    entry: Principle | None
    rank: int
    exact: bool


def ask_policy(settings: ExperimentSettings, prompt: str, iteration: int | None) -> Asked:
    """Let a policy answer and refine.

    Args:
        iteration: 0 is the initial policy; None the newest that was trained.

    Raises:
        UserError: the prompt is empty, or nothing was trained yet.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty", expected="something to ask")
    initial = iteration == 0 or not settings.iterations
    at = 0 if initial else newest(settings, "train", iteration).iteration
    experiment = open_experiment(settings)
    source = experiment.policy(at)
    turns = (Message(role="user", content=prompt.strip()),)
    row = Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source="asked")
    (answered,) = answer(
        [row],
        source.load(),
        settings.evaluate,
        source.templates,
        seed=settings.seed,
        iteration=at,
    )
    if not at or not settings.guided:
        return Asked(at, answered, None, 0, False)
    constitution = load(experiment.constitution(at).path("constitution.yaml"))
    return Asked(at, answered, *_entry(constitution, answered.principle))


def _entry(constitution: Constitution, principle: str) -> tuple[Principle | None, int, bool]:
    """The entry, its rank from 1, and whether the principle is one of its wordings."""
    wordings = {
        principle_key(text): rank
        for rank, entry in enumerate(constitution.principles)
        for text in (entry.text, *entry.members)
    }
    key = principle_key(principle)
    near = [key] if key in wordings else difflib.get_close_matches(key, wordings, n=1, cutoff=0.5)
    if not near:
        return None, 0, False
    rank = wordings[near[0]]
    return constitution.principles[rank], rank + 1, near[0] == key
