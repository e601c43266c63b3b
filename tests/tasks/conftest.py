"""A place to evaluate a policy in: a record with held-out prompts, and a small chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_model import build_chat_model
from scripted import HELD_OUT, Place

from tasks.corpus.prompts import CorpusSettings
from tasks.prompts import PromptSettings, prompts_stage
from tasks.record.record import Record
from tasks.record.slot import Slot


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model") / "small", "llama")


@pytest.fixture
def place(workplace: Path, chat_model: Path) -> Place:
    rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}, of course."} for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    at = Slot(Record("stage", workplace / ".staple"), 0, 0, mode=lambda _: "force", shard_size=3)
    sources = (CorpusSettings(path="rows.jsonl"),)
    prompts = PromptSettings(sources=sources, first=1, later=1, held_out=HELD_OUT)
    return Place(chat_model, at, prompts_stage(at, prompts))
