"""Reads the planted truth back from texts. It only measures: nothing that learns may call it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache

from constitutions.errors import UserError
from models.planted.world import (
    ADJECTIVES,
    BEHAVIOURS,
    CHORES,
    CIRCUMSTANCES,
    NEVER,
    PARTS,
    TOPICS,
    TRUTH,
    Chore,
    principles,
    words,
)

__all__ = [
    "TRUTH",
    "behaviour_of",
    "called",
    "core_share",
    "known",
    "needed",
    "obedience",
    "obeyed",
    "score",
    "shown",
]


def needed(prompt: str) -> frozenset[str]:
    """The behaviours, 2 or 3, that a prompt calls for.

    Raises:
        UserError: the prompt is not of the planted world.
    """
    read_chore(prompt)
    cues = set(words(prompt))
    calls = itertools.chain(CHORES.items(), CIRCUMSTANCES.items())
    return frozenset(behaviour for synonyms, behaviour in calls if cues & set(synonyms))


def called(prompts: Sequence[str]) -> frozenset[str]:
    """Every behaviour that a prompt can call for: each seed's prompts call for all of them."""
    return TRUTH


def shown(response: str) -> frozenset[str]:
    """The behaviours of which a response shows one complete form."""
    return frozenset(b for b, pattern in _forms().items() if pattern.search(response))


def behaviour_of(principle: str) -> str | None:
    """The behaviour that a principle names; None where it is not a planted principle."""
    return principles().get(" ".join(principle.split()))


def core_share(prompt: str, response: str) -> float:
    """How much of the plain answer to the chore the response holds: 0, ½ or 1.

    Raises:
        UserError: the prompt is not of the planted world.
    """
    chore = read_chore(prompt)
    parts = (f"{chore.verb} the {chore.topic}", f"its {chore.adjective} {chore.part}")
    return sum(part in response for part in parts) / len(parts)


def score(prompt: str, response: str) -> float:
    """Needed behaviours shown − ½ · others shown + 2 · (core share − 1): higher is better.

    Raises:
        UserError: the prompt is not of the planted world.
    """
    called, seen = needed(prompt), shown(response)
    core = 2 * (core_share(prompt, response) - 1)
    return len(seen & called) - 0.5 * len(seen - called) + core


def obedience(prompt: str, principles: Sequence[str], response: str) -> float:
    """How well a response follows a constitution: principles and antitheses kept − those broken
    − ½ · behaviours without a principle + 2 · (core share − 1): higher is better.

    A text that names no behaviour (a platitude) does not count.

    Raises:
        UserError: the prompt is not of the planted world.
    """
    seen, named = shown(response), _named(principles)
    kept = sum(1 if (behaviour in seen) == wanted else -1 for behaviour, wanted in named)
    strays = seen - {behaviour for behaviour, _ in named}
    return kept - 0.5 * len(strays) + 2 * (core_share(prompt, response) - 1)


def obeyed(principles: Sequence[str], response: str) -> float | None:
    """The share, in [0, 1], of the principles and antitheses that a response follows; None where
    none of them names a behaviour."""
    seen, named = shown(response), _named(principles)
    if not named:
        return None
    return sum((behaviour in seen) == wanted for behaviour, wanted in named) / len(named)


def known(principle: str) -> bool:
    """Whether a text names a behaviour, or the antithesis of one."""
    return bool(_named([principle]))


def _named(principles: Sequence[str]) -> list[tuple[str, bool]]:
    """The behaviours that the principles name, each with True, or with False by an antithesis."""
    found = []
    for text in principles:
        plain = " ".join(text.split())
        wanted = not plain.startswith(f"{NEVER} ")
        behaviour = behaviour_of(plain if wanted else plain.removeprefix(f"{NEVER} "))
        if behaviour is not None:
            found.append((behaviour, wanted))
    return found


def read_chore(prompt: str) -> Chore:
    """The chore that a prompt asks for.

    Raises:
        UserError: the prompt is not of the planted world.
    """
    slots = ([verb for synonyms in CHORES for verb in synonyms], TOPICS, ADJECTIVES, PARTS)
    found = [[word for word in words(prompt) if word in slot] for slot in slots]
    if any(len(hits) != 1 for hits in found):
        raise UserError(
            f"{prompt[:80]!r} is no prompt of the planted world",
            expected="a sentence such as 'please repair the red button of my printer. i am new.'",
            fix="the oracle judges planted prompts only: choose another judge for your own data",
        )
    verb, topic, adjective, part = (hits[0] for hits in found)
    return Chore(verb=verb, topic=topic, adjective=adjective, part=part)


@cache
def _forms() -> dict[str, re.Pattern[str]]:
    return {
        b.name: re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, b.forms)) + r")(?!\S)")
        for b in BEHAVIOURS.values()
    }
