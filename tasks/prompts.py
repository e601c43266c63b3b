"""The input of an iteration: which prompts it mines, which ones are held out.

No prompt serves two iterations, or mining and evaluation. Read by `mine` (iteration t) and
`evaluate` (iteration 0: the held-out prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from constitutions.errors import UserError
from models.policy import Message
from models.settings import Settings
from models.worlds.base import Oracle, World, WorldPrompt
from models.worlds.registry import WORLDS
from tasks.corpus.prompts import CorpusSettings, load_corpus, shuffle_golds, source_digests, split
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Prompt, Rejected, prompt_id

MOST = 100_000_000
"""Prompts that a setting may ask for."""


def _world_name(name: str) -> str:
    if name not in WORLDS:
        raise ValueError(f"a list of corpora, or an embedded world: {', '.join(WORLDS)}")
    return name


class PromptSettings(Settings):
    """Where prompts and gold responses come from, and how many go where."""

    sources: Annotated[str, AfterValidator(_world_name)] | tuple[CorpusSettings, ...] = "planted"
    """The name of an embedded world ("planted"), or a list of corpora, which are mixed."""
    first: int = Field(50_000, ge=1, le=MOST)
    """Prompts that iteration 1 mines."""
    later: int = Field(10_000, ge=1, le=MOST)
    """Prompts that each later iteration mines."""
    skip: int = Field(0, ge=0, le=MOST)
    """Prompts that are left out before those: what an earlier experiment mined, with the same seed
    and as many held out."""
    held_out: int = Field(1_000, ge=2, le=MOST)
    """Prompts that are never mined, for evaluation."""
    shuffle_gold: bool = False
    """The control: gold responses are dealt out to other prompts, so that there is nothing to
    learn from them."""

    @property
    def world(self) -> World | None:
        """The embedded world that the prompts come from; None where they come from corpora."""
        return WORLDS[self.sources] if isinstance(self.sources, str) else None

    @property
    def oracle(self) -> Oracle | None:
        """The oracle of the embedded world; None for corpora, or where the world has none."""
        return self.world.oracle if self.world else None

    @property
    def corpora(self) -> tuple[CorpusSettings, ...]:
        """The corpora that the prompts come from; empty where they come from a world."""
        return () if isinstance(self.sources, str) else self.sources

    @property
    def has_golds(self) -> bool:
        """Whether every source has gold responses."""
        return all(corpus.gold_column for corpus in self.corpora)


@dataclass(frozen=True)
class PromptSet:
    """An iteration's prompts, and the rows of the input that could not be used."""

    rows: list[Prompt]
    rejected: list[Rejected]


def prompt_sets(settings: PromptSettings, seed: int, iteration: int) -> PromptSet:
    """The prompts of an iteration; of iteration 0 the held-out ones.

    Raises:
        UserError: the sources cannot be read, or hold too few prompts.
    """
    if settings.world:
        found = PromptSet(_of_world(settings.world, settings, seed, iteration), [])
    else:
        corpus = load_corpus(settings.corpora, seed)
        sizes = [settings.held_out, settings.skip, settings.first]
        sizes += [settings.later] * max(iteration - 1, 0)
        held_out, _, *mined = split(corpus.rows, sizes, seed)
        found = PromptSet(mined[iteration - 1] if iteration else held_out, corpus.rejected)
    return replace(found, rows=shuffle_golds(found.rows, seed)) if settings.shuffle_gold else found


@stage("prompts")
def prompts_stage(at: Slot, settings: PromptSettings) -> Attempt:
    """sources → prompts, rejected."""

    def compute(work: Workspace) -> Metrics:
        found = prompt_sets(settings, at.seed, at.iteration)
        work.write("prompts", found.rows, Prompt)
        work.write("rejected", found.rejected, Rejected)
        return {"prompts": len(found.rows), "rejected_rows": len(found.rejected)}

    world = (type(settings.world).__module__,) if settings.world else ()
    at = at.using(*world, **source_digests(settings.corpora))
    return at.attempt("prompts", settings, {}, compute)


def _of_world(world: World, settings: PromptSettings, seed: int, iteration: int) -> list[Prompt]:
    try:
        if iteration == 0:
            return _rows(world, world.held_out(settings.held_out, seed))
        start = settings.first + (iteration - 2) * settings.later if iteration > 1 else 0
        stop = settings.skip + settings.first + (iteration - 1) * settings.later
        return _rows(world, world.mined(stop, seed)[start + settings.skip :])
    except ValueError as error:
        names = ["held_out"] if iteration == 0 else ["first", "later", "skip"]
        where = ", ".join(f"'prompts.{name}'" for name in names)
        raise UserError(str(error), where=f"settings {where}", expected="fewer prompts") from error


def _rows(world: World, found: Sequence[WorldPrompt]) -> list[Prompt]:
    asked = [(Message(role="user", content=each.prompt),) for each in found]
    return [
        Prompt(
            prompt_id=prompt_id(turns),
            prompt=turns,
            gold=each.gold,
            other_golds=each.other_golds,
            source=f"{world.name}/{each.source}",
        )
        for turns, each in zip(asked, found, strict=True)
    ]
