"""The templates that a setting means: by name, of an embedded world, or of a user's file."""

from __future__ import annotations

from collections.abc import Sequence

from constitutions.errors import UserError
from models.policy import Messages, assistant, user
from models.prompts import (
    CHAT_CONSTITUTION,
    CONSTITUTION_WORDINGS,
    TEMPLATES,
    ConstitutionWording,
    Examples,
    Templates,
)
from models.template_file import ExampleTurn, TemplateFile
from models.worlds.registry import WORLDS

VERSION = "file"
"""Of templates from a file: their words are what counts."""


def template_names() -> list[str]:
    """The names that `policy.templates` may have."""
    return [*TEMPLATES, *(world.name for world in WORLDS.values() if world.templates)]


def templates_of(chosen: str | TemplateFile) -> Templates:
    """The turns that a setting means.

    Raises:
        UserError: there are none of this name.
    """
    if isinstance(chosen, TemplateFile):
        kinds = {name: _messages(getattr(chosen.examples, name)) for name in EXAMPLES}
        return Templates(
            version=VERSION,
            hint=chosen.hint,
            propose=chosen.propose.format(),
            critique=chosen.critique,
            refine=chosen.refine,
            improve=chosen.improve.format(),
            keep=chosen.keep.format(),
            examples=Examples(**kinds),
        )
    world = WORLDS.get(chosen)
    found = TEMPLATES.get(chosen) or (world.templates if world else None)
    if found is None:
        raise unknown(chosen)
    return found


def constitution_wording_of(chosen: str | TemplateFile) -> ConstitutionWording:
    """The wording of constitutions that a setting means.

    Raises:
        UserError: there are no templates of this name.
    """
    if isinstance(chosen, TemplateFile):
        said = chosen.constitution
        return ConstitutionWording(
            version=VERSION,
            given=said.given,
            item=said.item,
            separator=said.separator,
            write=said.write,
            oppose=said.oppose.format(),
        )
    templates_of(chosen)
    world = WORLDS.get(chosen)
    own = CONSTITUTION_WORDINGS.get(chosen) or (world.constitution if world else None)
    return own or CHAT_CONSTITUTION


EXAMPLES = ("hint", "propose", "improve")


def _messages(turns: Sequence[ExampleTurn]) -> Messages:
    return tuple(user(t.user) if t.user else assistant(t.assistant or "") for t in turns)


def unknown(name: str) -> UserError:
    """The error of a name that no templates have."""
    return UserError(
        "there are no templates of this name",
        where=f"setting 'policy.templates' = {name}",
        expected=f"{', '.join(template_names())}, or the path of a YAML file with the turns",
    )
