"""Settings as a form of Prefect's UI, in which every field may stay empty.

Prefect's form sends the default of every field that has one: with defaults, "run it again" would
set every setting. So a form has none: an empty field keeps the experiment's value, and its
description names the default. A setting that may have no value is emptied by its name, in the list
`unset`. `flows.deployments` uses the forms.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python as to_jsonable

from models.settings import Settings, is_settings

YesNo = Annotated[bool, WithJsonSchema({"type": "string", "enum": ["yes", "no"]})]
"""A drop-down: a switch cannot be empty, and the UI shows a chosen `false` as nothing chosen."""


UNSET = "unset"
"""The field of a form that lists settings to empty."""


class SettingsForm(BaseModel):
    """What a person changed; unknown fields are refused, empty ones are not there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value not in (None, "", [], {})}

    @model_serializer
    def given(self) -> dict[str, Any]:
        """The fields that were filled in."""
        return {n: getattr(self, n) for n in type(self).model_fields if n in self.model_fields_set}


@cache
def form_of(settings: type[Settings]) -> type[SettingsForm]:
    """The form of a Settings class; settings within it become forms within the form. What has names
    of its own (`then`) is for YAML."""
    fields: dict[str, Any] = {
        name: _field(name, field)
        for name, field in settings.model_fields.items()
        if get_origin(field.annotation) is not dict  # its form sends something for nothing
    }
    if optional := tuple(n for n in fields if type(None) in _options(settings, n)):
        names: Any = types.GenericAlias(tuple, (Literal[optional], ...))
        about = "Settings that shall have no value, such as a limit that shall not be there."
        fields[UNSET] = names, Field(default_factory=_empty, title=UNSET, description=about)
    return create_model(
        settings.__name__.replace("Settings", "Form"),
        __base__=SettingsForm,
        __doc__=settings.__doc__,
        **fields,
    )


def changes(form: SettingsForm, under: str = "") -> dict[str, Any]:
    """What was filled in, by name: {"cluster.distance_threshold": 0.6}, with `under` before each.

    The values are plain, as JSON has them; None for what is emptied, unless it is filled in too.
    """
    given = form.given()
    found: dict[str, Any] = {
        f"{under}.{name}" if under else name: None for name in given.pop(UNSET, ())
    }
    for name, value in given.items():
        path = f"{under}.{name}" if under else name
        found |= (
            changes(value, path) if isinstance(value, SettingsForm) else {path: to_jsonable(value)}
        )
    return found


def _field(name: str, field: FieldInfo) -> tuple[Any, Any]:
    """A field of the form: the same type and limits, no default, the default said in words."""
    kind = _bare(field.annotation)
    if is_settings(kind):
        inner = form_of(kind)
        return inner, Field(default_factory=inner, title=name, description=field.description)
    about = " ".join((field.description or "").split())
    has_default = field.default not in (None, ()) and not field.is_required()
    shown = f" Default: {_shown(field.default)}." if has_default else ""
    kind = _in_forms(kind)
    limited: Any = Annotated[(kind, *field.metadata)] if field.metadata else kind
    description = f"{about}{shown}".strip()
    return limited, Field(default_factory=_empty, title=name, description=description)


NUMBER = r"-?[0-9]*\.?[0-9]+(e-?[0-9]+)?"


def _empty() -> None:
    """What an empty field holds: it is no default, which the UI would fill in."""


def _options(settings: type[Settings], name: str) -> tuple[Any, ...]:
    """The types that a setting may have."""
    return get_args(settings.model_fields[name].annotation)


def _bare(kind: Any) -> Any:
    """The type without None; of "a word or a list of …" the list, which a form can show.

    A number or a word is a text field, which takes both.
    """
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    options = [option for option in get_args(kind) if option is not type(None)]
    words = [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]
    if words and any(_is_number(option) for option in options):
        pattern = f"^({'|'.join((*words, NUMBER))})$"
        return Annotated[kind, WithJsonSchema({"type": "string", "pattern": pattern})]
    lists = [option for option in options if get_origin(option) is tuple]
    return (lists or options)[0]


def _is_number(kind: Any) -> bool:
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return bare in (int, float)


def _in_forms(kind: Any) -> Any:
    if kind is bool:
        return YesNo
    if get_origin(kind) is tuple and is_settings(get_args(kind)[0]):
        return types.GenericAlias(tuple, (form_of(get_args(kind)[0]), ...))
    return kind


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)
