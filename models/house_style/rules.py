"""What a rule is: how a principle words it, how an answer obeys it, and how that is seen.

`house.RULES` are what golds obey and what is to be discovered; `skills.RULES` are what the lessons
teach. The two share no word but those of `PLAIN_WORDS`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Edit = Callable[[str, random.Random], str]
"""Answer, source of choices → the answer that obeys the rule."""
Check = Callable[[str], bool]
"""Whether a response obeys the rule."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of style."""

    name: str
    wordings: tuple[str, ...]
    """Principles that word it."""
    edit: Edit
    check: Check
    said: tuple[str, ...] = ()
    """The sentences that it inserts, each with slots: "{this/that}"."""
    form: bool = False
    """Whether it changes the form of the whole answer, and not what is said."""
    opens: bool = False
    """Whether what it inserts stands before the answer."""
    cues: tuple[str, ...] = ()
    """What a user says of themselves where the rule is called for."""
    means: str = ""
    """A principle that matches this regular expression means the rule."""

    @cached_property
    def _means(self) -> re.Pattern[str]:
        return re.compile(self.means, re.IGNORECASE)

    def meant_by(self, principle: str) -> bool:
        """Whether a principle has one of the words by which it is read as this rule."""
        return bool(self.means and self._means.search(principle))


def parts(text: str) -> tuple[str, ...]:
    """The alternatives of a text in which " | " stands between them."""
    return tuple(part.strip() for part in text.split(" | "))


def fill(sentence: str, rng: random.Random) -> str:
    """A sentence with each slot "{this/that}" filled by one of its choices."""
    return re.sub(r"{([^}]*)}", lambda slot: rng.choice(slot[1].split("/")), sentence)


def adding(sentences: tuple[str, ...], opens: bool = False) -> Edit:
    """The edit that adds one of the sentences, after the answer or before it."""

    def edit(answer: str, rng: random.Random) -> str:
        added = fill(rng.choice(sentences), rng)
        return f"{added} {answer}" if opens else f"{answer} {added}"

    return edit


def seen(signs: str) -> Check:
    """The check that looks for a regular expression, whatever the case of its letters."""
    pattern = re.compile(signs, re.IGNORECASE | re.MULTILINE)
    return lambda response: bool(pattern.search(response))


_END = re.compile(r"(?<=[a-z)\"'’][.!?])\s+(?=[A-Z])")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its mark."""
    return [part.strip() for part in _END.split(text.strip()) if part.strip()]


# Words ------------------------------------------------------------------------------------------

_FUNCTION_WORDS = """
a an the this that these those it its i me my myself you your yourself he she they them their we us
our one ones two three four five six seven eight nine ten fifteen twenty thirty fifty hundred first
second last some any all every each both either another other others else no none nothing something
anything everything someone anyone everyone much many more most few little several half enough
of in on at to for from with without by about around above below under over after before between
into onto through during until since than as like per and or but if so because while when where
which what who whom whose why how whether not never yes up down out off away back
be am is are was were been being have has had having do does did done doing can could may might must
shall should will would need needs cannot dont go goes
also even just only very too then there here now again already ever still once rather quite
"""
_PRINCIPLE_WORDS = """
say says mention add name give tell write put use make takes take start begin beginning end close
finish refer speak word words answer reader sentence
"""
PLAIN_WORDS = frozenset((_FUNCTION_WORDS + _PRINCIPLE_WORDS).split())
"""Function words, and the words with which a principle of any kind is made. They may stand in house
rules and in lessons; every other word of the house rules stands in no lesson."""

_SUFFIXES = ("ings", "ing", "edly", "ed", "ies", "es", "ly", "s", "e", "y", "i")


def stem(word: str) -> str:
    """A word without its ending, coarsely: costs, costly, costing → cost."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


_PLAIN_STEMS = frozenset(map(stem, PLAIN_WORDS))


def content_words(texts: Iterable[str]) -> frozenset[str]:
    """The stems of all words but `PLAIN_WORDS` in some texts."""
    found: set[str] = set()
    for text in texts:
        lower = text.lower().replace("’", "'").replace("'", "")
        found |= {stem(word) for word in re.findall(r"[a-z]+", lower) if word not in PLAIN_WORDS}
    return frozenset(found - _PLAIN_STEMS)


def vocabulary(rules: Mapping[str, Rule]) -> frozenset[str]:
    """The stems of all that rules say: wordings, insertions and cues."""
    return content_words(
        re.sub(r"[{}/]", " ", text)
        for rule in rules.values()
        for text in (*rule.wordings, *rule.said, *rule.cues)
    )
