"""A whole experiment in seconds: a random chat model on a dozen rows, one iteration."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_model import TEXT, build_chat_model

from flows import em
from flows.experiment import note_settings, open_experiment
from flows.schema import ExperimentSettings
from flows.settings import load_settings
from tasks.record.work import JOURNAL

WORDS = " ".join(TEXT[:4]).split()
LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
ROWS = [
    {"prompt": f"What is {i}? {' '.join(WORDS[i : i + 5])}", "gold": f"{WORDS[i]} é {LETTERS}"}
    for i in range(14)
]  # golds that random letters come near to
SETTINGS: dict[str, Any] = {
    "experiment": "lineage",
    "iterations": 1,
    "policy": {"dtype": "float32", "device": "cpu", "threads": 1},
    "prompts": {"first": 6, "later": 2, "held_out": 4},
    "mine": {
        "samples": 3,
        "temperature": 1.0,
        "max_response_tokens": 24,
        "max_principle_tokens": 6,
        "max_critique_tokens": 6,
    },
    "filter": {"keep_truncated": True, "selection": "soft"},
    "cluster": {"picture": "none"},
    "evaluate": {
        "max_response_tokens": 12,
        "max_principle_tokens": 6,
        "max_failed": 1.0,  # random letters are often no words
        "resamples": 200,
    },
}

PAIRS = [
    {"text": f"Say {word}.", "antithesis": f"Never say {word}."}
    for word in ("<b>why</b>", "what next", "who", "when")
]  # one that a page has to escape
TAUGHT: dict[str, Any] = {
    "experiment": "taught",
    "method": "sami",
    "write": {"constitution": "pairs.yaml", "held_out": 0.25},
    "sample": {"constitutions": 2, "principles": 2, "max_response_tokens": 10},
    "train": {"kl": 0.1},
    "evaluate": {
        "judge": "similarity",
        "temperature": 1.0,
        "max_response_tokens": 10,
        "max_failed": 1.0,
        "resamples": 200,
    },
}
"""SAMI on the same rows; what is not here is as in `SETTINGS`."""


def make(folder: Path, migrated_database: Path) -> None:
    """A model, rows and an empty record."""
    shutil.copy(migrated_database, folder / "mlflow.db")
    build_chat_model(folder / "model", "llama3")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    values = {
        **SETTINGS,
        "policy": {**SETTINGS["policy"], "model": str(folder / "model")},
        "prompts": {**SETTINGS["prompts"], "sources": [{"path": str(folder / "rows.jsonl")}]},
    }
    (folder / "lineage.yaml").write_text(yaml.safe_dump(values))
    (folder / "pairs.yaml").write_text(yaml.safe_dump({"principles": PAIRS}))
    (folder / "taught.yaml").write_text(yaml.safe_dump({**values, **TAUGHT}))


def make_finished(folder: Path, migrated_database: Path) -> None:
    """The same with "lineage" finished; `copy_finished` takes it elsewhere."""
    make(folder, migrated_database)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        finished()


def copy_finished(made: Path, folder: Path) -> None:
    """Copy a finished experiment; its settings and its record name the new folder."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    for settings in folder.glob("*.yaml"):
        settings.write_text(settings.read_text().replace(str(made), str(folder)))
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            moved = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.execute(moved, (str(made), str(folder)))


def finished(name: str = "lineage") -> ExperimentSettings:
    """An experiment of this folder, finished with its own settings: "lineage", or "taught"."""
    settings = load_settings(f"{name}.yaml")
    note_settings(settings)
    run(settings)
    return settings


def run(settings: ExperimentSettings, **how: Any) -> set[tuple[str, int]]:
    """Run all of it, without Prefect; the stages that the journal says were computed."""
    journal = Path(".staple/work") / JOURNAL
    seen = len(journal.read_text().splitlines()) if journal.exists() else 0
    experiment = open_experiment(settings, **how)
    for t in range(settings.last + 1):
        for _ in em.steps(experiment, t):
            pass
    lines = map(json.loads, journal.read_text().splitlines()[seen:])
    return {(line["stage"], line["iteration"]) for line in lines if line["event"] == "begun"}
