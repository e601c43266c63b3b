"""What an embedded world offers: prompts with golds and, in some worlds, models and an oracle.

Stages, judges and the planner ask a `World` for what it offers, never for its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from models.prompts import ConstitutionWording, Templates

Steps = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldPrompt:
    """A prompt with its gold response."""

    prompt: str
    gold: str
    source: str
    """Where in the world it comes from ("train:1")."""
    other_golds: tuple[str, ...] = ()
    """Further references: the nearest counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillExample:
    """A taught example of the two skills: naming what a better answer does, and following a named
    rule."""

    prompt: str
    initial: str
    """y1: the answer that follows no rule."""
    gold: str
    """What the hint shows: it obeys the rule, and may differ from `refined` in wording."""
    principle: str
    """z: the rule, named."""
    refined: str
    """y2: y1 under the rule."""
    source: str
    """Where it comes from ("skill:1")."""


class Oracle(Protocol):
    """What is true of a world's prompts. It only measures: nothing that learns may call it.

    Each function that reads a prompt raises UserError where the prompt is not one of the world's.
    """

    TRUTH: frozenset[str]
    """Every behaviour that a prompt can call for."""

    def called(self, prompts: Sequence[str]) -> frozenset[str]:
        """The behaviours that an experiment's prompts call for, read from some of them: what its
        constitution should recover."""

    def score(self, prompt: str, response: str) -> float:
        """How good a response is: higher is better."""

    def obedience(self, prompt: str, principles: Sequence[str], response: str) -> float:
        """How well a response follows a constitution: higher is better."""

    def obeyed(self, principles: Sequence[str], response: str) -> float | None:
        """The share, in [0, 1], of the principles that a response follows; None without any."""

    def core_share(self, prompt: str, response: str) -> float:
        """How much of the plain answer, in [0, 1], a response holds."""

    def needed(self, prompt: str) -> frozenset[str]:
        """The behaviours that a prompt calls for."""

    def shown(self, response: str) -> frozenset[str]:
        """The behaviours that a response shows."""

    def behaviour_of(self, principle: str) -> str | None:
        """The behaviour that a principle names; None where it names none."""

    def known(self, principle: str) -> bool:
        """Whether a text names a behaviour, or the antithesis of one."""


class World(ABC):
    """An embedded world: one object in `models.worlds.registry`; its name is `prompts.sources`."""

    name: str
    models: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The world's own models: each name that `policy.model` may have, and its `config.json`."""
    pretraining: str = ""
    """The module whose code decides what `pretrain` makes."""
    truth: str = ""
    """The module of `oracle`; "" where there is none."""
    policy: ClassVar[Mapping[str, Any]] = {}
    """The settings of `policy` with which these models write principles, by name."""
    principle: str = ""
    """An example of a principle that its oracle knows."""
    templates: Templates | None = None
    """The turns of its own that `policy.templates` means by the world's name; None: it has none."""
    constitution: ConstitutionWording | None = None
    """The wording of constitutions that stands beside `templates`; None: that of "chat"."""

    @abstractmethod
    def mined(self, n: int, seed: int) -> list[WorldPrompt]:
        """The first `n` prompts to mine; those of a shorter list begin a longer one.

        Raises:
            ValueError: the world has fewer.
        """

    @abstractmethod
    def held_out(self, n: int, seed: int) -> list[WorldPrompt]:
        """`n` prompts for evaluation, none of them among those to mine.

        Raises:
            ValueError: the world has fewer.
        """

    def skill_examples(self, n: int, seed: int) -> list[SkillExample]:
        """`n` examples of the two skills, on rules that none of its prompts calls for; none where
        the world teaches no skill.

        Raises:
            ValueError: the world has fewer.
        """
        return []

    @property
    def topics(self) -> Sequence[str]:
        """The topics on which its models can write principles."""
        return ()

    @property
    def wording(self) -> str:
        """The templates that its models are taught, as one text."""
        return ""

    @property
    def oracle(self) -> Oracle | None:
        """The judge that knows the truth; None where only the golds can tell."""
        return None

    def pretrain(self, model: str, seed: int, cache: Path, progress: Steps) -> Path:
        """The directory of one of `models`, below `cache`; it is made the first time.

        Raises:
            LookupError: the world has no models of its own.
        """
        raise LookupError(f"the world {self.name} has no models")
