"""All settings of an experiment, as types. `flows.settings` reads and checks them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from models.policy import PolicySettings
from models.settings import Settings
from tasks.stages import StageSettings

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MethodName = Literal["staple", "star", "sft", "sami"]
"""The names of `flows.methods.METHODS`."""


class GeneralSettings(Settings):
    """The settings that belong to no stage."""

    experiment: str = Field("staple", pattern=NAME)
    """The experiment's name in MLflow: letters, digits, dot, dash and underscore."""
    method: MethodName = "staple"
    """STaPLe; SAMI, which teaches a given constitution without golds; or a baseline: "star" is
    STaPLe's loop with no principle between the two responses (and, with no iteration, Self-Refine),
    "sft" learns the gold responses themselves."""
    after: str | None = Field(None, pattern=NAME)
    """SAMI: the name of a finished STaPLe experiment whose policy is trained further, and whose
    constitution is amplified."""
    then: dict[str, Any] = Field(default_factory=dict)
    """Settings of the SAMI experiment, NAME.sami, that starts from this one's policy and
    constitution: see the preset staple-then-sami."""
    seed: int = Field(0, ge=0)
    """Seeds every draw: prompts, samples, clustering, adapter, bootstrap."""
    iterations: Annotated[int, Field(ge=0, le=100)] | Literal["auto"] = 4
    """T: iterations. With 0 nothing is trained: the initial policy answers the held-out prompts.
    "auto" stops when two iterations in a row do not become the champion."""
    max_iterations: int = Field(10, ge=1, le=100)
    """T at most, with iterations: auto."""
    decisions: int | None = Field(None, ge=1, le=1000)
    """Among how many decisions about the champion the held-out prompts are shared; none uses
    prompts of another. Unset: one for each iteration. More leave some for iterations that are added
    or trained again."""
    shard_size: int = Field(64, ge=1, le=4096)
    """Prompts (or pairs to judge) that are computed and saved together: what a killed run repeats
    at most. No result depends on it."""
    policy: PolicySettings = PolicySettings()
    """The model that improves itself."""

    @property
    def last(self) -> int:
        """The number of the last iteration; with "auto" that of the last that there can be."""
        return self.max_iterations if self.iterations == "auto" else self.iterations


class ExperimentSettings(StageSettings, GeneralSettings):
    """One experiment: T iterations of a method on prompts, with gold responses where it needs them.

    pydantic puts the fields of `GeneralSettings` first.
    """
