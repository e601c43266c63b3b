"""The base of every settings model: unknown fields are errors, values do not change."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings of one part; `Field(description=…)` is what the CLI and Prefect's forms show."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
