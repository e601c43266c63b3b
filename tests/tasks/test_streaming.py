"""Stages stream: what they hold in memory does not depend on the number of prompts."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pytest
from chat_model import build_chat_model

from models.policy import PolicySettings
from models.prompts import CHAT
from models.settings import Settings
from tasks.filter import FilterSettings, filter_stage
from tasks.record import tables
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace
from tasks.rows import Candidate, Mined, Rejected, Scores, Trajectory
from tasks.score import ScoreSettings, score_stage
from tasks.train import Training, TrainSettings, conversations_of, tokenised

Made = TypeVar("Made")
WORDS = ("cat", "mat", "dog", "door", "house", "rain", "old", "by", "in", "on", "the")
FEW, MANY = 24, 96


class NoSettings(Settings):
    pass


def text(number: int) -> str:
    return f"{' '.join((*WORDS[number % 11 :], *WORDS) * 12)} {number}"


def mined(prompts: int) -> Iterator[Mined]:
    for n in range(prompts):
        candidates = tuple(
            Candidate(
                sample=i, principle=f"Be {WORDS[i]} {n % 50}.", critique="", refined=text(n + i),
                finish="stop", tokens=1,
            )
            for i in range(6)
        )  # fmt: skip
        yield Mined(
            prompt_id=f"p{n}", prompt=({"role": "user", "content": f"Q{n}?"},), gold=text(n + 3),
            source=f"a:{n}", initial="the cat", initial_finish="stop", initial_tokens=1,
            candidates=candidates,
        )  # fmt: skip


def measured(peaks: dict[str, list[int]], name: str, compute: Callable[[], Made]) -> Made:
    """What a computation returns; `peaks` has the most bytes that Python and Arrow held."""
    gc.collect()
    tracemalloc.start()
    held = pa.total_allocated_bytes()
    made = compute()
    most = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - held
    tracemalloc.stop()
    peaks.setdefault(name, []).append(most)
    return made


def test_four_times_the_prompts_take_no_more_memory(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 1 << 15)  # both sizes have many of them
    monkeypatch.setattr(tables, "FILE_BYTES", 1 << 18)
    model = build_chat_model(workplace / "model", "llama3")
    peaks: dict[str, list[int]] = {}
    for prompts in (1, FEW, MANY):
        stream(workplace / str(prompts), model, prompts, peaks)
    assert set(peaks) == {"mine", "score", "filter", "tokenise"}
    for name, (_, few, many) in peaks.items():  # at first, much is imported
        assert many < 1.5 * few, f"{name}: {few:,} bytes, then {many:,}"


def stream(folder: Path, model: Path, prompts: int, peaks: dict[str, list[int]]) -> None:
    at = Slot(Record(f"streams-{prompts}", folder / "home"), 1, seed=0, shard_size=8)

    def mine(work: Workspace) -> Metrics:
        measured(peaks, "mine", lambda: work.write("mined", mined(prompts), Mined))
        return {"mined_candidates": 6.0 * prompts}

    rows = at.attempt("mine", NoSettings(), {}, mine)
    scored = measured(peaks, "score", lambda: score_stage(at, ScoreSettings(), rows))
    assert len(scored.rows("scored", Scores)) == prompts
    kept: Attempt = measured(
        peaks, "filter", lambda: filter_stage(at, FilterSettings(), rows, scored)
    )
    assert len(kept.rows("trajectories", Trajectory)) == prompts
    assert len(kept.rows("rejected", Rejected)) == 5 * prompts
    work = Workspace(folder / "work", at.shard_size)
    training = Training(
        model=model, policy=PolicySettings(), previous_adapter=None, out=work.outputs / "adapter",
        settings=TrainSettings(), seed=0,
    )  # fmt: skip
    given = kept.rows("trajectories", Trajectory)
    learned = partial(conversations_of, templates=CHAT, settings=training.settings)
    data = measured(peaks, "tokenise", lambda: tokenised(work, training, given, learned, "1"))
    assert data.conversations == len(data.examples) == prompts
