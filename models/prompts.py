"""All wordings that prompt a policy; a stage's fingerprint contains those that it uses.

The conversation grows turn by turn, so that the prompts of one row share their prefix:

    user x · assistant y1 · user propose|hint · assistant z
      [· user critique · assistant c] · user refine · assistant y2

or, where no principle stands between the two responses (STaR, Self-Refine):

    user x · assistant y1 · user refine · assistant y2

Only `hint` shows the gold response, so that a refinement cannot copy it (STaPLe, section 3: the
factored proposal p(y2 | x, y1, z) · p(z | x, y1, yG)).

Examples, where there are any, are turns of other conversations. They stand before x, the same in
every prompt of a kind, so that all of these share them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from models.policy import Message, Messages, assistant, user


@dataclass(frozen=True, slots=True)
class Examples:
    """Turns of other conversations before x, by the kind of prompt that they lead."""

    hint: Messages = ()
    """Before the prompt that shows the gold response."""
    propose: Messages = ()
    """Before the prompts of z, c and y2 without it."""
    improve: Messages = ()
    """Before the prompt of y2 where no principle stands between the responses."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The user turns between the policy's own turns.

    `hint` contains {gold}; `critique` and `refine` may contain {principle}.
    """

    version: str
    hint: str
    propose: str
    critique: str
    refine: str
    improve: str
    """Asks for y2 where no principle stands between the responses."""
    examples: Examples = Examples()
    keep: str = "Keep the first response as it is."
    """The principle that keeps y1: where the policy names it, there is no y2."""
    gated: bool = False
    """Whether the policy has learned to name it."""

    def keeps(self, principle: str) -> bool:
        """Whether a principle that the policy named keeps y1: an empty one says nothing else."""
        said = principle.strip()
        return not said or (self.gated and said == self.keep)

    @property
    def guided(self) -> bool:
        """Whether a principle stands between the two responses."""
        return bool(self.propose)

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything on which a prompt depends."""
        turns = (self.hint, self.propose, self.critique, self.refine, self.improve)
        examples = (
            f"{kind.name} {message['role']}: {message['content']}"
            for kind in fields(self.examples)
            for message in getattr(self.examples, kind.name)
        )
        return (self.version, *turns, *examples, *([self.keep] if self.gated else []))

    @property
    def leading(self) -> Messages:
        """The examples before every prompt without the gold."""
        return self.examples.propose if self.guided else self.examples.improve

    def unguided(self) -> Templates:
        """The turns of the same conversation without a principle: y2 ~ p(· | x, y1)."""
        version = f"{self.version}/unguided"
        only = Examples(improve=self.examples.improve)
        turns = {"hint": "", "propose": "", "critique": "", "refine": self.improve}
        return replace(self, version=version, examples=only, gated=False, **turns)


CHAT = Templates(
    version="chat-1",
    hint=(
        "Here is a second response to the same request:\n\n{gold}\n\n"
        "What is it that makes the second response better than your first? State it as one "
        "general principle in a single short sentence. It must be useful for other requests too, "
        "so do not mention this topic or quote either response. Reply with the principle only."
    ),
    propose=(
        "Could your response be better? State the one general principle that would improve it "
        "most, in a single short sentence. It must be useful for other requests too, so do not "
        "mention this topic. Reply with the principle only."
    ),
    critique=(
        "Judge your first response by this principle. In two or three sentences, say where it "
        "falls short and what should change."
    ),
    refine=(
        "Rewrite your first response so that it follows this principle. Keep what was already "
        "good. Reply with the new response only."
    ),
    improve=(
        "Could your first response be better? Rewrite it so that it is. Keep what was already "
        "good. Reply with the new response only."
    ),
)
"""For instruction-tuned chat models."""

TERSE = Templates(
    version="terse-1",
    hint="better: {gold} why?",
    propose="why?",
    critique="where?",
    refine="again.",
    improve="again.",
    keep="keep it.",
)
"""The same turns in a few words: for very small models, such as the planted world's."""

TEMPLATES = {"chat": CHAT, "terse": TERSE}


def after_initial(examples: Messages, prompt: Sequence[Message], initial: str) -> Messages:
    """The conversation x, y1; the examples stand after x's own system turn, if it has one."""
    own = prompt[0]["role"] == "system"
    return (*prompt[:own], *examples, *prompt[own:], assistant(initial))


def ask_with_gold(t: Templates, prompt: Sequence[Message], initial: str, gold: str) -> Messages:
    """The prompt of z ~ p(· | x, y1, yG)."""
    before = after_initial(t.examples.hint, prompt, initial)
    return (*before, user(t.hint.format(gold=gold)))


def ask(t: Templates, prompt: Sequence[Message], initial: str) -> Messages:
    """The prompt of z ~ p(· | x, y1), at inference and in training."""
    return (*after_initial(t.leading, prompt, initial), user(t.propose))


def ask_critique(t: Templates, prompt: Sequence[Message], initial: str, principle: str) -> Messages:
    """The prompt of c ~ p(· | x, y1, z)."""
    return (
        *ask(t, prompt, initial),
        assistant(principle),
        user(t.critique.format(principle=principle)),
    )


def ask_refinement(
    t: Templates, prompt: Sequence[Message], initial: str, principle: str = "", critique: str = ""
) -> Messages:
    """The prompt of y2 ~ p(· | x, y1[, z[, c]])."""
    if not t.guided:
        return (*after_initial(t.leading, prompt, initial), user(t.refine))
    before = (
        (*ask_critique(t, prompt, initial, principle), assistant(critique))
        if critique
        else (*ask(t, prompt, initial), assistant(principle))
    )
    return (*before, user(t.refine.format(principle=principle)))


# Constitutions (SAMI) --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConstitutionWording:
    """The wording that gives a policy a constitution, and that asks it to write one (SAMI).

    `given` contains {principles}, `item` {number} and {principle}, `write` {topic}.
    """

    version: str
    given: str
    item: str
    separator: str
    write: str
    oppose: str

    @property
    def said(self) -> str:
        """All words of the wording as one text, without the placeholders."""
        parts = " ".join((self.given, self.item, self.separator, self.write, self.oppose))
        return re.sub(r"{\w*}", " ", parts)


CHAT_CONSTITUTION = ConstitutionWording(
    version="chat-constitution-1",
    given="Write your response so that it follows each of these principles:\n\n{principles}",
    item="{number}. {principle}",
    separator="\n",
    write=(
        "State one principle that a response about this topic can follow or go against: {topic}. "
        "It must be general, and short: a single sentence. Reply with the principle only."
    ),
    oppose=(
        "State its antithesis: the principle of a response that does the very opposite, in a "
        "single sentence of the same form. Reply with the antithesis only."
    ),
)
TERSE_CONSTITUTION = ConstitutionWording(
    version="terse-constitution-1",
    given="{principles}",
    item="{principle}.",
    separator=" ",
    write="{topic}: name one.",
    oppose="opposite?",
)
CONSTITUTION_WORDINGS = {"chat": CHAT_CONSTITUTION, "terse": TERSE_CONSTITUTION}


def under_constitution(
    w: ConstitutionWording, principles: Sequence[str], prompt: Sequence[Message]
) -> Messages:
    """The prompt of y ~ p(· | x, c): the principles, in order, begin the system turn."""
    items = [w.item.format(number=n, principle=p) for n, p in enumerate(principles, start=1)]
    text = w.given.format(principles=w.separator.join(items))
    own = prompt[0]["role"] == "system"
    text = f"{text}\n\n{prompt[0]['content']}" if own else text
    return ({"role": "system", "content": text}, *prompt[own:])


def ask_principle(w: ConstitutionWording, topic: str) -> Messages:
    """The prompt that asks the writer for a principle."""
    return (user(w.write.format(topic=topic)),)


def ask_antithesis(w: ConstitutionWording, topic: str, principle: str) -> Messages:
    """The prompt that asks the writer for the antithesis of a principle."""
    return (*ask_principle(w, topic), assistant(principle), user(w.oppose))
