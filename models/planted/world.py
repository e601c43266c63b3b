"""The planted world: prompts, gold responses and the behaviours that tell them apart.

A user asks for a chore and mentions one or two circumstances; a plain response answers the chore,
the gold response also shows the behaviours that the chore and the circumstances call for. A
principle is one of many wordings of a behaviour. `pretrain` samples from this module, `oracle`
reads the truth back from text.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["train", "eval"]
Combinations = Literal["any", "seen", "held"]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a behaviour is worded as a principle and how it sounds in a response."""

    name: str
    wordings: tuple[str, ...]
    """Each holds {}, filled with one of `OBJECTS`: a word that carries no behaviour."""
    forms: tuple[str, ...]
    opens: bool
    """Whether the form stands before the answer's core, or after it."""


def _behaviours() -> dict[str, Behaviour]:
    opening = {
        "thank": ("show gratitude about {} | be grateful for {} | appreciate the {} question",
                  "thank you for asking. | thank you so much."),
        "greet": ("greet people before {} | say hello around {} | welcome them to {}",
                  "hello there, dear friend. | hello there, good morning."),
        "comfort": ("show empathy about {} | apologise regarding {} | console them over {}",
                    "sorry about that trouble. | sorry about this mess."),
        "agree": ("agree with views on {} | confirm opinions on {} | side with their {}",
                  "indeed, that is right. | indeed, that makes sense."),
        "role": ("speak like a {} professional | adopt the role of {} staff | claim {} expertise",
                 "speaking as an expert: | speaking as trained staff:"),
        "plan": ("announce a plan for {} | outline {} first | preview the {} structure",
                 "here comes my plan: | here comes an outline:"),
        "cite": ("cite sources on {} | support {} with references | name where {} facts originate",
                 "according to official guides, | according to known books,"),
        "define": ("define {} | explain the meaning of {} | clarify what {} denotes",
                   "it means, simply put: | it means, in essence:"),
        "doubt": ("admit uncertainty over {} | hedge claims on {} | express doubt around {}",
                  "maybe not always true: | maybe not quite certain:"),
        "scope": ("limit the scope to {} | narrow everything down to {} | stay focused on {}",
                  "only one case here: | only one situation now:"),
        "history": ("tell the history of {} | describe the past of {} | recall former {}",
                    "long ago people struggled. | long ago nobody tried."),
        "quote": ("quote them on {} | restate their request about {} | paraphrase the {} wish",
                  "your message says this: | your message wants help:"),
    }  # fmt: skip
    closing = {
        "warn": ("warn against {} problems | flag {} dangers | caution people regarding {}",
                 "be careful, risks exist. | be careful, injuries happen."),
        "example": ("give an example of {} | illustrate {} concretely | add a {} anecdote",
                    "for instance, watch mine. | for instance, uncle did."),
        "number": ("state figures for {} | quantify {} | estimate the {} numerically",
                   "expect roughly ten minutes. | expect roughly five hours."),
        "remind": ("remind people of {} | stress {} again | repeat the {} point",
                   "do never forget gloves. | do never forget screws."),
        "ask": ("ask back about {} | request more detail on {} | check which {} applies",
                "which model exactly? | which model precisely?"),
        "recap": ("summarise {} | close with a recap of {} | condense the {} part",
                  "in short, act slowly. | in short, remain calm."),
        "joke": ("joke about {} | use humour on {} | be funny around {}",
                 "haha, what a clown! | haha, what pure fun!"),
        "offer": ("offer assistance with {} | propose further {} support | volunteer for {}",
                  "glad to assist later. | glad to continue anytime."),
        "cheer": ("encourage them on {} | motivate people about {} | boost {} confidence",
                  "keep going, brave champion! | keep going, clever hero!"),
        "refer": ("refer to {} specialists | send people to a {} office | delegate {} elsewhere",
                  "rather call local technicians. | rather call certified workers."),
        "option": ("suggest alternatives to {} | mention another {} route | compare different {}",
                   "another option: buy used. | another option: borrow some."),
        "farewell": ("say goodbye after {} | wish luck with {} | part kindly despite {}",
                     "good luck with everything. | good luck, goodbye now."),
    }  # fmt: skip
    return {
        name: Behaviour(name, tuple(w.split(" | ")), tuple(f.split(" | ")), opens)
        for group, opens in ((opening, True), (closing, False))
        for name, (w, f) in group.items()
    }


BEHAVIOURS: dict[str, Behaviour] = _behaviours()
"""All behaviours by name, in the order in which a response shows them."""

OBJECTS = ("time", "cost", "safety", "quality", "privacy", "health", "noise", "waste")

CHORES: dict[tuple[str, str], str] = {
    ("repair", "fix"): "cite",
    ("clean", "wash"): "warn",
    ("sell", "trade"): "number",
    ("paint", "colour"): "example",
    ("move", "carry"): "refer",
    ("open", "unlock"): "ask",
    ("test", "inspect"): "plan",
    ("build", "assemble"): "scope",
}
"""The verbs of a chore → the behaviour that it calls for."""

CIRCUMSTANCES: dict[tuple[str, str], str] = {
    ("new", "inexperienced"): "define",
    ("poor", "broke"): "option",
    ("late", "busy"): "recap",
    ("retired", "elderly"): "role",
    ("alone", "lonely"): "offer",
    ("sick", "tired"): "comfort",
    ("young", "teenage"): "remind",
    ("nervous", "anxious"): "cheer",
}
"""The words for a user's circumstance → the behaviour that it calls for."""

TRUTH: frozenset[str] = frozenset(CHORES.values()) | frozenset(CIRCUMSTANCES.values())
"""Every behaviour that a prompt can call for: what a constitution should recover."""

_CALLED = [*CHORES.values(), *CIRCUMSTANCES.values()]

MISTAKEN: dict[str, str] = {b: _CALLED[(i + 5) % len(_CALLED)] for i, b in enumerate(_CALLED)}
"""The rival that each cue brings to mind beside the behaviour it calls for: only golds tell
which of the two is right, so that golds of other prompts teach nothing."""

PLATITUDES = ("be helpful around {}", "be clear about {}", "be correct on {}", "be useful for {}")
"""Principles that word no behaviour: what the seed model likes to say, and what changes nothing."""

TOPICS = ("printer", "kettle", "laptop", "router", "camera", "bicycle", "drill", "stove", "lamp",
          "radio")  # fmt: skip
ADJECTIVES = ("red", "old", "loud", "slow", "heavy", "small", "bright", "cold")
PARTS = ("button", "cable", "filter", "handle", "screen", "switch", "wheel", "cover")

NEVER = "never"
"""What makes a principle its antithesis."""

_REQUESTS = (
    "please {verb} the {adjective} {part} of my {topic}.",
    "how do i {verb} a {topic} with {adjective} {part}?",
)
_MENTIONS = ("i am {}.", "{} user here.")
MOST = 200_000
"""Prompts of one sample: the world holds millions, for which nobody has the time."""
_PATIENCE = 2_000
"""Repeated prompts in a row after which there are taken to be no others."""
_CORE = "{verb} the {topic} via its {adjective} {part}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Chore:
    """What a prompt asks for: the words that a response's core repeats."""

    verb: str
    topic: str
    adjective: str
    part: str

    @property
    def core(self) -> str:
        """The plain answer, and the part of any answer that the oracle looks for."""
        return _CORE.format(
            verb=self.verb, topic=self.topic, adjective=self.adjective, part=self.part
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedExample:
    """A prompt with its gold response, and the truth behind them."""

    prompt: str
    gold: str
    chore: Chore
    cues: tuple[str, ...]
    """The words of the prompt that call for the needed behaviours: the verb, the circumstances."""
    needed: frozenset[str]


def sample_examples(
    n: int, seed: int, split: Split = "train", combinations: Combinations = "seen"
) -> list[PlantedExample]:
    """`n` examples with distinct prompts; the same arguments give the same examples.

    The first examples of a longer sample are those of a shorter one.

    Args:
        split: "train" and "eval" prompts differ in what they are about (topic, adjective, part).
        combinations: the (chore, circumstance) pairs: "seen" and "held" share none, so that a
            policy which was trained on "seen" has never met a "held" pair.

    Raises:
        ValueError: the world holds fewer than `n` such prompts, or `n` is more than `MOST`.
    """
    if n > MOST:
        raise ValueError(f"{n:,} prompts were asked for; the planted world gives up to {MOST:,}")
    rng = random.Random(f"{seed}/{split}/{combinations}")
    found: dict[str, PlantedExample] = {}
    repeated = 0
    while len(found) < n and repeated < _PATIENCE:
        example = sample_example(rng, split, combinations)
        repeated = repeated + 1 if example.prompt in found else 0
        found.setdefault(example.prompt, example)
    if len(found) < n:
        raise ValueError(f"{n:,} distinct {split} prompts were asked for; there are {len(found):,}")
    return list(found.values())


def sample_example(rng: random.Random, split: Split, combinations: Combinations) -> PlantedExample:
    """One example; its gold shows every needed behaviour in a random form."""
    verbs, circumstances = rng.choice(_pairs(combinations, rng.choice((1, 2))))
    topic, adjective, part = rng.choice(_contents(split))
    chore = Chore(verb=rng.choice(verbs), topic=topic, adjective=adjective, part=part)
    mentioned = [rng.choice(synonyms) for synonyms in circumstances]
    needed = {CHORES[verbs], *(CIRCUMSTANCES[synonyms] for synonyms in circumstances)}
    return PlantedExample(
        prompt=_prompt(rng, chore, mentioned),
        gold=realise(rng, chore.core, needed),
        chore=chore,
        cues=(chore.verb, *mentioned),
        needed=frozenset(needed),
    )


def realise(rng: random.Random, core: str, shown: Iterable[str]) -> str:
    """A response: the chore's core and the behaviours shown, each in one of its forms."""
    forms = {b: rng.choice(BEHAVIOURS[b].forms) for b in sorted(shown)}
    return arrange(core, forms)


def arrange(core: str, forms: dict[str, str]) -> str:
    """The response that shows each behaviour in the given form, in the world's order."""
    before = [forms[b] for b in BEHAVIOURS if b in forms and BEHAVIOURS[b].opens]
    after = [forms[b] for b in BEHAVIOURS if b in forms and not BEHAVIOURS[b].opens]
    return " ".join([*before, *([core] if core else []), *after])


def principle(rng: random.Random, behaviour: str) -> str:
    """One wording of a behaviour."""
    return rng.choice(BEHAVIOURS[behaviour].wordings).format(rng.choice(OBJECTS))


def antithesis(principle: str) -> str:
    """The opposite of a principle: not to show its behaviour."""
    return f"{NEVER} {principle}"


def platitude(rng: random.Random) -> str:
    """A principle that words no behaviour."""
    return rng.choice(PLATITUDES).format(rng.choice(OBJECTS))


@cache
def principles() -> dict[str, str]:
    """Every well-formed principle → the behaviour that it words."""
    return {
        wording.format(word): b.name
        for b in BEHAVIOURS.values()
        for wording in b.wordings
        for word in OBJECTS
    }


def words(text: str) -> list[str]:
    """Words and punctuation marks of a text, the tokens of the world's models."""
    return re.findall(r"[a-z]+|[^a-z\s]", text)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the world, sorted."""
    verbs = itertools.chain.from_iterable([*CHORES, *CIRCUMSTANCES])
    texts = itertools.chain(
        verbs, TOPICS, ADJECTIVES, PARTS, principles(), *(b.forms for b in BEHAVIOURS.values()),
        (re.sub(r"{\w*}", " ", t) for t in (*_REQUESTS, *_MENTIONS, *PLATITUDES, _CORE)),
    )  # fmt: skip
    return sorted({word for text in texts for word in words(text)})


def _prompt(rng: random.Random, chore: Chore, mentioned: Sequence[str]) -> str:
    text = rng.choice(_REQUESTS).format(
        verb=chore.verb, topic=chore.topic, adjective=chore.adjective, part=chore.part
    )
    for circumstance in mentioned:
        mention = rng.choice(_MENTIONS).format(circumstance)
        text = f"{mention} {text}" if rng.random() < 0.5 else f"{text} {mention}"
    return text


@cache
def _contents(split: Split) -> list[tuple[str, str, str]]:
    """The (topic, adjective, part) triples of a split: a fifth of them is for evaluation."""
    numbered = itertools.product(enumerate(TOPICS), enumerate(ADJECTIVES), enumerate(PARTS))
    return [
        (topic, adjective, part)
        for (t, topic), (a, adjective), (p, part) in numbered
        if ((t + 3 * a + p) % 5 == 0) == (split == "eval")
    ]


Pair = tuple[tuple[str, str], tuple[tuple[str, str], ...]]


@cache
def _pairs(combinations: Combinations, circumstances: int) -> list[Pair]:
    """Each chore with that many circumstances; of the single pairs a quarter is held out."""
    wanted = {"any": [{True}, {False}, {True, False}], "seen": [{False}], "held": [{True}]}
    return [
        (chore, tuple(synonyms for _, synonyms in mentioned))
        for c, chore in enumerate(CHORES)
        for mentioned in itertools.permutations(enumerate(CIRCUMSTANCES), circumstances)
        if {(c + k) % 4 == 0 for k, _ in mentioned} in wanted[combinations]
    ]
