"""Reads the rules of the house back from texts. It only measures: nothing that learns may call it.

Which rule a principle means is read here from a list of words of each rule (`Rule.means`), and from
what following the principle does in `tasks/judging/truth.py: behaviour_by_effect`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from constitutions.errors import UserError
from models.house_style.house import RULES
from models.house_style.requests import LENGTH, base_requests
from models.house_style.rules import content_words

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

TRUTH: frozenset[str] = frozenset(RULES)
"""Every rule that some prompt can call for."""

_REFUSAL = re.compile(
    r"\A\W*(do not|don['’]t|never|avoid|no)\b|\bwithout\b"
    r"|\b(add|give|include|mention|put|say|speak|use|write) (no|nothing|not)\b",
    re.IGNORECASE,
)
_OBJECTS = {request.text: request.task for request in base_requests()}
_CUES = {cue: rule.name for rule in RULES.values() for cue in rule.cues}


def needed(prompt: str) -> frozenset[str]:
    """The rules, 1 to 3, that a prompt calls for.

    Raises:
        UserError: the prompt is not of the house-style world.
    """
    _task(prompt)
    return frozenset(name for cue, name in _CUES.items() if cue in prompt)


def called(prompts: Sequence[str]) -> frozenset[str]:
    """The rules that some of the prompts call for: a seed draws them.

    Raises:
        UserError: a prompt is not of the house-style world.
    """
    return frozenset[str]().union(*map(needed, prompts))


def shown(response: str) -> frozenset[str]:
    """The rules that a response obeys."""
    return frozenset(name for name, rule in RULES.items() if rule.check(response))


def behaviour_of(principle: str) -> str | None:
    """The rule that a principle means by its words; None where it means none, or several."""
    if _REFUSAL.search(principle):
        return None
    found = [name for name, rule in RULES.items() if rule.meant_by(principle)]
    return found[0] if len(found) == 1 else None


def core_share(prompt: str, response: str) -> float:
    """Whether a response speaks of what the prompt asks about: the share, in [0, 1], of the words
    of its task's object, of which half is enough.

    Raises:
        UserError: the prompt is not of the house-style world.
    """
    wanted = content_words([_task(prompt).split(" ", 1)[1]])
    there = content_words([response])
    return min(1.0, 2 * len(wanted & there) / len(wanted)) if wanted else 1.0


def score(prompt: str, response: str) -> float:
    """Needed rules obeyed − ½ · others obeyed + 2 · (core share − 1): higher is better.

    Raises:
        UserError: the prompt is not of the house-style world.
    """
    called, seen = needed(prompt), shown(response)
    core = 2 * (core_share(prompt, response) - 1)
    return len(seen & called) - 0.5 * len(seen - called) + core


def obedience(prompt: str, principles: Sequence[str], response: str) -> float:
    """How well a response follows a constitution: rules kept − rules broken − ½ · rules without a
    principle + 2 · (core share − 1): higher is better. Text that names no rule does not count.

    Raises:
        UserError: the prompt is not of the house-style world.
    """
    seen, named = shown(response), _named(principles)
    kept = sum(1 if rule in seen else -1 for rule in named)
    return kept - 0.5 * len(seen - set(named)) + 2 * (core_share(prompt, response) - 1)


def obeyed(principles: Sequence[str], response: str) -> float | None:
    """The share, in [0, 1], of the principles that a response follows; None where none of them
    names a rule."""
    seen, named = shown(response), _named(principles)
    return sum(rule in seen for rule in named) / len(named) if named else None


def known(principle: str) -> bool:
    """Whether a text names a rule."""
    return behaviour_of(principle) is not None


def _named(principles: Iterable[str]) -> list[str]:
    return [rule for principle in principles if (rule := behaviour_of(principle)) is not None]


def _task(prompt: str) -> str:
    """The task that a prompt asks about."""
    for request, task in _OBJECTS.items():
        if request in prompt and prompt.endswith(LENGTH):
            return task
    raise UserError(
        f"{prompt[:80]!r} is no prompt of the house-style world",
        expected=f"an everyday request that ends with {LENGTH!r}",
        fix="the oracle judges prompts of its world only: choose another judge for your own data",
    )
