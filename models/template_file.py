"""The templates of a user's own: the YAML file that `policy.templates` may name, as a type.

`flows.settings` reads the file; what it holds becomes the setting, so that the record has it whole
and no result depends on where the file lies. `models.prompts.templates_of` makes prompts of it.
"""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, Field

from models.settings import Settings

LONGEST = 8_000
"""Characters of the longest turn."""
MOST_EXAMPLES = 64
"""Turns of the longest list of examples."""

Text = Annotated[str, Field(pattern=r"\S", max_length=LONGEST)]


def turn(needed: Collection[str] = (), also: Collection[str] = ()) -> AfterValidator:
    """A text in which each `needed` placeholder stands, and no other than those `also` may."""
    allowed = {*needed, *also}
    said = " and ".join(f"{{{name}}}" for name in sorted(allowed)) or "no placeholder"
    refused = f"{said}; any other brace is doubled: {{{{ or }}}}"

    def check(text: str) -> str:
        try:
            fields = [field for field in Formatter().parse(text) if field[1] is not None]
        except ValueError:
            raise ValueError(refused) from None
        names = {name for _, name, _, _ in fields}
        if "gold" in names - allowed:
            raise ValueError("no {gold}: `hint` alone may show the gold response")
        if names - allowed or any(form or conversion for _, _, form, conversion in fields):
            raise ValueError(refused)
        for name in needed:
            if name not in names:
                raise ValueError(f"a text with {{{name}}}")
        return text

    return AfterValidator(check)


class ExampleTurn(Settings):
    """One turn of an example, as `user: …` or `assistant: …`."""

    user: Text | None = None
    """What the user says."""
    assistant: Text | None = None
    """What the assistant answers."""


def _in_turns(turns: tuple[ExampleTurn, ...]) -> tuple[ExampleTurn, ...]:
    speakers = [sorted(turn.model_dump(exclude_none=True)) for turn in turns]
    if speakers != [["user"], ["assistant"]] * (len(turns) // 2):
        raise ValueError("`- user: …` and `- assistant: …` in turn, the assistant's last")
    return turns


Turns = Annotated[
    tuple[ExampleTurn, ...], Field(max_length=MOST_EXAMPLES), AfterValidator(_in_turns)
]


class ExampleTurns(Settings):
    """Turns of other conversations that stand before x, by the kind of prompt that they lead."""

    hint: Turns = ()
    """Before the prompt that shows the gold response."""
    propose: Turns = ()
    """Before the prompts without it: of z, c and y2, in mining, training and evaluation."""
    improve: Turns = ()
    """Before the prompt of y2 where no principle stands between the responses."""


class ConstitutionTurns(Settings):
    """How a constitution is given and written (SAMI)."""

    given: Annotated[Text, turn(["principles"])]
    """Begins the system turn of a prompt with a constitution."""
    item: Annotated[Text, turn(["principle"], also=["number"])]
    """One of its principles."""
    separator: str = Field(max_length=LONGEST)
    """What stands between two items."""
    write: Annotated[Text, turn(["topic"])]
    """Asks for a principle."""
    oppose: Annotated[Text, turn()]
    """Asks for its antithesis."""


class TemplateFile(Settings):
    """The user's turns between the policy's own, in any language."""

    hint: Annotated[Text, turn(["gold"])]
    """Shows the gold response, and asks what makes it better."""
    propose: Annotated[Text, turn()]
    """Asks for a principle without it."""
    critique: Annotated[Text, turn(also=["principle"])]
    """Asks for a critique of y1."""
    refine: Annotated[Text, turn(also=["principle"])]
    """Asks for y2."""
    improve: Annotated[Text, turn()]
    """Asks for y2 where no principle stands between the responses."""
    keep: Annotated[Text, turn()] = "Keep the first response as it is."
    """The principle by which the policy keeps y1 (`train.gate`)."""
    constitution: ConstitutionTurns
    """How a constitution is given and written (SAMI)."""
    examples: ExampleTurns = ExampleTurns()
    """Few-shot examples."""
