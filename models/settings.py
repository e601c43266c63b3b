"""The base of every settings model: unknown fields are errors, values do not change."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**32 - 1
"""The largest absolute value of a whole number: numpy's seeds end there."""
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and half characters, which no setting's text may hold."""
LONGEST = 100_000
"""Most characters of a setting's text."""


class Settings(BaseModel):
    """Settings of one part; `Field(description=…)` is what the CLI and Prefect's forms show."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _bounded(self) -> Any:
        """Refuse values that are out of range for every field."""
        for name in type(self).model_fields:
            if problem := _unfit(getattr(self, name)):
                raise ValueError(f"{name}: {problem}")
        return self


def is_settings(kind: Any) -> TypeGuard[type[Settings]]:
    """Whether a field's type is a settings model."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def _unfit(value: Any) -> str:
    """What is wrong with a number or a text; "" where nothing is."""
    if isinstance(value, tuple):
        return next(filter(None, map(_unfit, value)), "")
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"at most {LARGEST:,}"
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST:
        return f"at most {LONGEST:,} characters, not {len(value):,}"
    found = UNFIT.search(value)
    return "a text without control characters or half characters" if found else ""
