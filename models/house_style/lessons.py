"""Lessons of the two skills, naming and following, on the rules of `skills`.

Their requests, answers and rules are none of those of the world's prompts, and no word of a house
rule stands in them (`rules.PLAIN_WORDS` apart).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from models.house_style import house, skills
from models.house_style.answers import answers
from models.house_style.rules import Rule, content_words, vocabulary
from models.house_style.world import MOST, answered, asked

REMARKS = (
    "I live in a small town.",
    "My name is Robin.",
    "I saw this on television.",
    "A colleague mentioned it to me.",
    "It is for next weekend.",
    "I am writing from Canada.",
    "I am left-handed.",
    "We have a guest.",
)
"""What users of the lessons say of themselves: it calls for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """An example of the two skills under a rule of `skills`; see `base.SkillExample`."""

    prompt: str
    initial: str
    gold: str
    principle: str
    refined: str
    rule: str


def sample_lessons(n: int, seed: int) -> list[Lesson]:
    """`n` lessons; those of a shorter list begin a longer one.

    Every rule is taught as often as any other of its kind (said or form), in a random order.

    Raises:
        ValueError: `n` is more than `MOST`.
    """
    if n > MOST:
        raise ValueError(f"{n:,} lessons were asked for; the world gives up to {MOST:,}")
    rng = random.Random(f"{seed}/lessons")
    found: list[Lesson] = []
    while len(found) < n:
        names = list(skills.RULES)
        rng.shuffle(names)
        found += [_lesson(rng, skills.RULES[name]) for name in names]
    return found[:n]


def _lesson(rng: random.Random, rule: Rule) -> Lesson:
    """One lesson, on an answer that does not obey the rule and can; the gold is an edit of that
    answer, or of another one to the same request where there is one."""
    while True:
        request, own = rng.choice(_taught())
        initial = rng.choice(own)
        refined = rule.edit(initial, rng)
        if rule.check(refined) and not rule.check(initial):
            break
    other = rng.choice([answer for answer in own if answer != initial] or [initial])
    said = [rng.choice(REMARKS)] if rng.random() < 0.5 else []
    return Lesson(
        prompt=asked(request, said, rng),
        initial=initial,
        gold=rule.edit(rng.choice((initial, other)), rng),
        principle=rng.choice(rule.wordings),
        refined=refined,
        rule=rule.name,
    )


@cache
def _taught() -> list[tuple[str, tuple[str, ...]]]:
    """The requests of the lessons with their answers, of those without a word of the house."""
    kept = vocabulary(house.RULES)
    found = []
    for request in answered("skills"):
        free = tuple(a for a in answers()[request.text] if not content_words([a]) & kept)
        if free and not content_words([request.text]) & kept:
            found.append((request.text, free))
    return found
