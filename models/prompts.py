"""Every template that a policy sees, versioned: the wording is part of a stage's fingerprint.

The conversation grows turn by turn, so that the prompts of one row share their prefix:

    user x · assistant y1 · user propose|hint · assistant z
      [· user critique · assistant c] · user refine · assistant y2

or, where no principle stands between the two responses (STaR, Self-Refine):

    user x · assistant y1 · user refine · assistant y2

Only `hint` shows the gold response; `refine` never does, so a refinement cannot copy it (the
factored proposal p(y2 | x, y1, z) · p(z | x, y1, yG) of STaPLe, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.policy import Message, Messages


@dataclass(frozen=True, slots=True)
class Templates:
    """The user turns between the policy's own.

    `hint` holds {gold}; `critique` and `refine` may hold {principle}.
    """

    version: str
    hint: str
    propose: str
    critique: str
    refine: str
    improve: str
    """Asks for y2 where no principle was named."""

    @property
    def guided(self) -> bool:
        """Whether a principle stands between the two responses."""
        return bool(self.propose)

    def unguided(self) -> Templates:
        """The same conversation without a principle: y2 ~ p(· | x, y1)."""
        version = f"{self.version}/unguided"
        return replace(self, version=version, hint="", propose="", critique="", refine=self.improve)


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
)
"""The same turns in a few words: for very small models, such as the planted world's."""

TEMPLATES = {"chat": CHAT, "terse": TERSE}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def after_initial(prompt: Sequence[Message], initial: str) -> Messages:
    """x, y1."""
    return (*prompt, _turn("assistant", initial))


def ask_with_gold(t: Templates, prompt: Sequence[Message], initial: str, gold: str) -> Messages:
    """The prompt of z ~ p(· | x, y1, yG)."""
    return (*after_initial(prompt, initial), _turn("user", t.hint.format(gold=gold)))


def ask(t: Templates, prompt: Sequence[Message], initial: str) -> Messages:
    """The prompt of z ~ p(· | x, y1): inference, and the context that z is trained in."""
    return (*after_initial(prompt, initial), _turn("user", t.propose))


def ask_critique(t: Templates, prompt: Sequence[Message], initial: str, principle: str) -> Messages:
    """The prompt of c ~ p(· | x, y1, z)."""
    return (
        *ask(t, prompt, initial),
        _turn("assistant", principle),
        _turn("user", t.critique.format(principle=principle)),
    )


def ask_refinement(
    t: Templates, prompt: Sequence[Message], initial: str, principle: str = "", critique: str = ""
) -> Messages:
    """The prompt of y2 ~ p(· | x, y1[, z[, c]])."""
    if not t.guided:
        return (*after_initial(prompt, initial), _turn("user", t.refine))
    before = (
        (*ask_critique(t, prompt, initial, principle), _turn("assistant", critique))
        if critique
        else (*ask(t, prompt, initial), _turn("assistant", principle))
    )
    return (*before, _turn("user", t.refine.format(principle=principle)))
