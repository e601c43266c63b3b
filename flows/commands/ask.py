"""`staple ask`: a trained policy's y1, z and y2, and the rank of z in the constitution.

A policy that SAMI trained answers twice instead: with a constitution and without one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from constitutions.constitution import Constitution, principle_key
from constitutions.errors import UserError
from constitutions.parse import whole
from constitutions.terminal import console
from flows.commands.tables import panels
from flows.experiment import Experiment, newest, open_experiment
from flows.methods import method_of
from flows.schema import ExperimentSettings
from models.policy import NO_ANSWER, UNFINISHED, Completion, Message, Messages, Request
from models.prompts import under_constitution
from tasks.clustering.wordings import with_wordings
from tasks.policies.answers import Generation
from tasks.rows import Prompt, prompt_id
from tasks.sami.draw import pool_of


@dataclass(frozen=True)
class PolicyReply:
    """What a policy answered: texts by their titles, and a note."""

    texts: Mapping[str, str]
    note: str


def ask_policy(
    settings: ExperimentSettings, prompt: str, iteration: int | None, principles: Sequence[str] = ()
) -> PolicyReply:
    """Ask a policy for its first answer, its principle and its refined answer.

    With SAMI: for its answers with a constitution, and without one.

    Args:
        iteration: 0 is the initial policy; None is the newest trained policy.
        principles: SAMI's constitution. Empty: the first principles of training, as many as a
            training constitution holds.

    Raises:
        UserError: the prompt or a principle is empty; there are principles, but the method is not
            SAMI; no policy is trained yet.
    """
    if not whole(prompt, "the prompt").strip():
        raise UserError("the prompt is empty", expected="something to ask")
    turns = (Message(role="user", content=prompt.strip()),)
    constitutional = method_of(settings).constitutional
    if principles and not constitutional:
        raise UserError(
            f"a policy of method {settings.method} finds its principle itself",
            where=f"--principle, experiment {settings.experiment}",
            expected="an experiment with method: sami",
            fix="leave it out",
        )
    if not all(whole(principle, "--principle").strip() for principle in principles):
        raise UserError("the principle is empty", where="--principle", expected="a text")
    initial = iteration == 0 or not settings.last
    at = 0 if initial else newest(settings, "train", iteration).iteration
    experiment = open_experiment(settings)
    if constitutional:
        return _with_constitution(experiment, at, turns, principles)
    return _refined(experiment, at, turns)


def _refined(experiment: Experiment, at: int, turns: Messages) -> PolicyReply:
    """y1, z and y2; and the principle of the constitution that is most similar to z."""
    settings, source = experiment.settings, experiment.policy(at)
    row = Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source="asked")
    generation = Generation(
        templates=source.templates, settings=settings.evaluate, seed=settings.seed, iteration=at
    )
    (answer,) = generation.ask(source.load(), [row])
    texts = {"first answer": answer.initial, "principle": answer.principle}
    if not answer.principle:
        del texts["principle"]
    if not at:
        note = "the initial policy; it has no constitution yet."
    elif not source.templates.guided:
        note = "this method has no principles."
    elif not answer.principle:
        note = "no principle has a majority: the first answer stands."
    else:
        constitution = with_wordings(experiment.constitution(at))
        note = _rank(constitution, answer.principle)
    return PolicyReply({**texts, "refined answer": answer.refined}, f"Iteration {at}: {note}")


def _rank(constitution: Constitution, principle: str) -> str:
    """Which principle of the constitution a policy's principle is, or is most similar to."""
    wordings = {
        principle_key(text): rank
        for rank, entry in enumerate(constitution.principles)
        for text in (entry.text, *entry.members)
    }
    key = principle_key(principle)
    near = [key] if key in wordings else difflib.get_close_matches(key, wordings, n=1, cutoff=0.5)
    if not near:
        return "no principle of the constitution is similar."
    rank = wordings[near[0]]
    entry = constitution.principles[rank]
    how = "is a wording of" if near[0] == key else "is most similar to"
    return (
        f"the principle {how} no. {rank + 1} of the constitution, "
        f"“{entry.text}” ({entry.support} trajectories)."
    )


def _with_constitution(
    experiment: Experiment, at: int, turns: Messages, principles: Sequence[str]
) -> PolicyReply:
    settings, source = experiment.settings, experiment.policy(at)
    trained = pool_of(experiment.constitution(0)).trained[: settings.sample.principles]
    constitution = [p.strip() for p in principles] or [p.text for p in trained]
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
    given, plain = (_text(samples[0]) for samples in source.load().generate(requests))
    texts = {
        "constitution": "\n".join(f"{n}. {text}" for n, text in enumerate(constitution, start=1)),
        "with constitution": given,
        "without constitution": plain,
    }
    return PolicyReply(texts, f"Iteration {at}{'.' if at else ': the initial policy.'}")


def _text(completion: Completion) -> str:
    if completion.finish in NO_ANSWER:
        return f"(no response: {NO_ANSWER[completion.finish]})"
    if completion.thoughts and not completion.text:
        return f"(no response: {UNFINISHED})"
    return completion.text


def show_reply(reply: PolicyReply) -> None:
    """Print a policy's answers, each in a frame, and the note."""
    panels(reply.texts)
    console.print(Text(reply.note))
