"""The input of an iteration: which prompts it mines, which ones are held out.

No prompt serves two iterations, or mining and evaluation. Read by `mine` (iteration t) and
`evaluate` (iteration 0: the held-out prompts).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from constitutions.errors import UserError
from models.policy import Message
from models.settings import Settings
from tasks.corpus.prompts import CorpusSettings, load_corpus, shuffle_golds, source_digests, split
from tasks.record.stage import stage
from tasks.record.store import Attempt, Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import Prompt, Rejected, prompt_id

MOST = 100_000_000
"""Prompts that a setting may ask for."""


class PromptSettings(Settings):
    """Where prompts and gold responses come from, and how many go where."""

    sources: Literal["planted"] | tuple[CorpusSettings, ...] = "planted"
    """"planted", or a list of corpora, which are mixed."""
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
    if settings.sources == "planted":
        found = PromptSet(_from_planted(settings, seed, iteration), [])
    else:
        corpus = load_corpus(settings.sources, seed)
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

    if settings.sources != "planted":
        at = replace(at, notes={**at.notes, **source_digests(settings.sources)})
    return at.attempt("prompts", settings, {}, compute)


def _from_planted(settings: PromptSettings, seed: int, iteration: int) -> list[Prompt]:
    try:
        return _planted(settings, seed, iteration)
    except ValueError as error:
        names = ["held_out"] if iteration == 0 else ["first", "later", "skip"]
        where = ", ".join(f"'prompts.{name}'" for name in names)
        raise UserError(str(error), where=f"settings {where}", expected="fewer prompts") from error


def _planted(settings: PromptSettings, seed: int, iteration: int) -> list[Prompt]:
    """An iteration's rows. Raises ValueError where the world has too few."""
    from models.planted.world import PlantedExample, sample_examples

    def rows(examples: list[PlantedExample], source: str) -> list[Prompt]:
        return [_row(e.prompt, e.gold, f"{source}:{i}") for i, e in enumerate(examples, start=1)]

    if iteration == 0:
        half = settings.held_out // 2
        seen = sample_examples(settings.held_out - half, seed, "eval", "seen")
        held = sample_examples(half, seed, "eval", "held")
        return rows(seen, "planted/seen") + rows(held, "planted/held")
    start = settings.first + (iteration - 2) * settings.later if iteration > 1 else 0
    stop = settings.skip + settings.first + (iteration - 1) * settings.later
    start += settings.skip
    return rows(sample_examples(stop, seed, "train", "seen"), "planted/train")[start:stop]


def _row(prompt: str, gold: str, source: str) -> Prompt:
    turns = (Message(role="user", content=prompt),)
    return Prompt(prompt_id=prompt_id(turns), prompt=turns, gold=gold, source=source)
