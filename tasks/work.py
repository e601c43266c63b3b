"""Where an attempt works before it counts: a folder on this machine's disk, named by what it makes.

A killed attempt leaves its finished shards, its training checkpoints or even its finished outputs
here; the next attempt with the same fingerprint finds them. `journal.jsonl` beside the folders
says what this machine computed and what it found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow.parquet as pq

from models.pool import Finished, Shards
from tasks.records import from_table, to_table

Row = TypeVar("Row")
Metrics = dict[str, float]
Manifest = dict[str, dict[str, Any]]
"""File (relative path) → its sha256 and, for Parquet, its rows."""

FIGURES = (".png", ".html")
"""For people: no stage reads them, so they have no part in the digest."""
JOURNAL = "journal.jsonl"


class Done(NamedTuple):
    """An attempt whose outputs are whole."""

    metrics: Metrics
    seconds: float
    manifest: Manifest


class Workspace:
    """The folder of one fingerprint: `outputs` of the attempt, and `parts` that are finished.

    Made by the holder of the fingerprint's lock: nobody else writes there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = folder / "outputs"
        self.parts = folder / "parts"
        self._done = folder / "done.json"
        for path in (self.outputs, self.parts):
            path.mkdir(parents=True, exist_ok=True)
        for litter in folder.rglob("*.tmp"):  # of a process that was killed while it wrote
            litter.unlink(missing_ok=True)

    def write(self, name: str, rows: Iterable[Any], row_type: type) -> None:
        """Write `<name>.parquet` whole or not at all."""
        _write_parquet(self.outputs / f"{name}.parquet", rows, row_type)

    def sharded(
        self,
        name: str,
        row_type: type[Row],
        shards: Sequence[Sequence[Any]],
        compute: Callable[[Shards], Iterable[Finished]],
        found: Callable[[Sequence[Any]], None],
    ) -> list[Row]:
        """The shards that are missing computed, each kept when it is finished, in whatever order;
        then `<name>.parquet` from all of them.

        Args:
            compute: yields shards as they are finished; `Pool.map` does.
            found: is told of each shard that an earlier, killed attempt had finished.
        """
        parts = [self.parts / f"{name}-{number:05}.parquet" for number in range(len(shards))]
        missing = {n: shard for n, shard in enumerate(shards) if not parts[n].exists()}
        for number, shard in enumerate(shards):
            if number not in missing:
                found(shard)
        for done in compute(missing):
            part = parts[done.number]
            _write_parquet(part, done.rows, row_type)
            self.note("shard", name=part.stem, seconds=done.seconds)
        rows = [row for part in parts for row in from_table(pq.read_table(part), row_type)]
        self.write(name, rows, row_type)
        return rows

    def finish(self, metrics: Metrics, seconds: float) -> Done:
        """Mark the outputs as whole: from now on only recording them is left to do."""
        done = Done(metrics, seconds, manifest(self.outputs))
        write_text(self._done, json.dumps(done._asdict()))
        self.note("computed", seconds=seconds)
        return done

    def finished(self) -> Done | None:
        """What an attempt computed that ended but was not recorded, if it is intact."""
        try:
            done = Done(**json.loads(self._done.read_text()))
        except (FileNotFoundError, ValueError):
            return None
        return done if done.manifest == manifest(self.outputs) else None

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to this machine's journal: one write, so that several processes may."""
        line = {
            "time": time.time(),
            "pid": os.getpid(),
            "fingerprint": self.folder.name,
            "event": event,
            **facts,
        }
        with (self.folder.parent / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        """The record has it all: nothing here is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def manifest(folder: Path) -> Manifest:
    """The files of a folder, by sorted relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): _describe(p) for p in files}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) over the data files of a manifest: what a successor's fingerprint rests on."""
    data = {name: facts for name, facts in manifest.items() if not name.endswith(FIGURES)}
    return text_sha256(json.dumps(data, sort_keys=True))


def shards(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Rows in consecutive groups of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterable[Any], row_type: type) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as sink:
            pq.write_table(to_table(rows, row_type), sink)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:  # a full disk must not be left fuller
        temporary.unlink(missing_ok=True)


def _describe(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"sha256": file_sha256(path)}
    if path.suffix == ".parquet":
        described["rows"] = pq.read_metadata(path).num_rows
    return described


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """sha256 (hex) of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
