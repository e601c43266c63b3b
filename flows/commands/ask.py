"""`staple ask`: a trained policy's y1, z and y2, and the rank of z in the constitution.

A policy that SAMI trained answers twice instead: with a constitution and without one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from constitutions.constitution import Constitution, Principle, load, principle_key
from constitutions.errors import UserError
from constitutions.parse import whole
from constitutions.terminal import console
from flows.commands.tables import panels
from flows.experiment import Experiment, newest, open_experiment
from flows.methods import method_of
from flows.schema import ExperimentSettings
from models.policy import NO_ANSWER, UNFINISHED, Completion, Message, Messages, Request
from models.prompts import under_constitution
from tasks.policies.answers import Generation
from tasks.rows import Answer, Prompt, prompt_id
from tasks.sami.draw import pool_of


@dataclass(frozen=True)
class PolicyAnswer:
    """The answer, and the entry of the constitution that is most similar to its principle."""

    iteration: int
    answer: Answer
    entry: Principle | None
    rank: int
    exact: bool


@dataclass(frozen=True)
class ConstitutionAnswers:
    """Two responses to one prompt: with a constitution, and without one."""

    iteration: int
    principles: tuple[str, ...]
    with_constitution: str
    without_constitution: str


def ask_policy(settings: ExperimentSettings, prompt: str, iteration: int | None) -> PolicyAnswer:
    """Ask a policy for its first answer, its principle and its refined answer.

    Args:
        iteration: 0 is the initial policy; None is the newest trained policy.

    Raises:
        UserError: the prompt is empty, or no policy is trained yet.
    """
    turns, at = _turns(prompt), _iteration(settings, iteration)
    experiment = open_experiment(settings)
    source = experiment.policy(at)
    row = Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source="asked")
    generation = Generation(
        templates=source.templates, settings=settings.evaluate, seed=settings.seed, iteration=at
    )
    (answered,) = generation.ask(source.load(), [row])
    if not at or not method_of(settings).guided:
        return PolicyAnswer(at, answered, None, 0, False)
    constitution = load(experiment.constitution(at).path("constitution.yaml"))
    return PolicyAnswer(at, answered, *_entry(constitution, answered.principle))


def ask_with_constitution(
    settings: ExperimentSettings, prompt: str, iteration: int | None, principles: Sequence[str]
) -> ConstitutionAnswers:
    """Ask a policy of SAMI for two responses: with a constitution, and without one.

    Args:
        iteration: 0 is the initial policy; None is the newest trained policy.
        principles: the constitution. Empty: the first principles of training, as many as a
            training constitution holds.

    Raises:
        UserError: the method is not SAMI; the prompt or a principle is empty; no policy is trained
            yet.
    """
    if not method_of(settings).constitutional:
        raise UserError(
            f"a policy of method {settings.method} finds its principle itself",
            where=f"--principle, experiment {settings.experiment}",
            expected="an experiment with method: sami",
            fix="leave it out",
        )
    if not all(whole(principle, "--principle").strip() for principle in principles):
        raise UserError("the principle is empty", where="--principle", expected="a text")
    turns, at = _turns(prompt), _iteration(settings, iteration)
    experiment = open_experiment(settings)
    source = experiment.policy(at)
    constitution = tuple(p.strip() for p in principles) or _first_trained(experiment)
    asked: dict[str, Messages] = {
        "principles": under_constitution(source.wording, constitution, turns),
        "plain": turns,
    }
    requests = [
        Request(
            messages=messages,
            key=f"{settings.seed}/evaluate/{prompt_id(turns)}/{arm}",
            temperature=settings.evaluate.temperature,
            max_tokens=settings.evaluate.max_response_tokens,
        )
        for arm, messages in asked.items()
    ]
    answers = (_text(samples[0]) for samples in source.load().generate(requests))
    return ConstitutionAnswers(at, constitution, *answers)


def _first_trained(experiment: Experiment) -> tuple[str, ...]:
    pool = pool_of(experiment.constitution(0))
    return tuple(p.text for p in pool.trained[: experiment.settings.sample.principles])


def _text(completion: Completion) -> str:
    if completion.finish in NO_ANSWER:
        return f"(no response: {NO_ANSWER[completion.finish]})"
    if completion.thoughts and not completion.text:
        return f"(no response: {UNFINISHED})"
    return completion.text


def _turns(prompt: str) -> tuple[Message, ...]:
    if not whole(prompt, "the prompt").strip():
        raise UserError("the prompt is empty", expected="something to ask")
    return (Message(role="user", content=prompt.strip()),)


def _iteration(settings: ExperimentSettings, iteration: int | None) -> int:
    """0 for the initial policy, which is the only one without training; else a trained one."""
    if iteration == 0 or not settings.iterations:
        return 0
    return newest(settings, "train", iteration).iteration


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


def show_asked(reply: PolicyAnswer) -> None:
    """Print y1, z and y2, and the rank of z in the constitution."""
    answer = reply.answer
    principle = {"principle": answer.principle} if answer.principle else {}
    panels({"first answer": answer.initial, **principle, "refined answer": answer.refined})
    if reply.iteration == 0:
        note = "the initial policy; it has no constitution yet."
    elif not answer.principle:
        note = "this method has no principles."
    elif reply.entry is None:
        note = "no principle of the constitution is similar."
    else:
        how = "is a wording of" if reply.exact else "is most similar to"
        note = (
            f"the principle {how} no. {reply.rank} of the constitution, "
            f"“{reply.entry.text}” ({reply.entry.support} trajectories)."
        )
    console.print(Text(f"Iteration {reply.iteration}: {note}"))


def show_with_constitution(reply: ConstitutionAnswers) -> None:
    """Print a constitution, and the responses with and without it."""
    numbered = (f"{n}. {text}" for n, text in enumerate(reply.principles, start=1))
    panels(
        {
            "constitution": "\n".join(numbered),
            "with constitution": reply.with_constitution,
            "without constitution": reply.without_constitution,
        }
    )
    console.print(
        f"Iteration {reply.iteration}{'.' if reply.iteration else ': the initial policy.'}"
    )
