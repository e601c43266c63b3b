"""Where an attempt works before it counts: a folder of this machine, named by its fingerprint.

A killed attempt leaves its finished shards, its training checkpoints or even its finished outputs
here; the next attempt with the same fingerprint finds them. `journal.jsonl` beside the folders
says what this machine computed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from constitutions.errors import UserError
from models.files import (
    Damaged,
    bytes_sha256,
    file_sha256,
    read_sealed,
    remove,
    text_sha256,
    write_sealed,
    written,
)
from models.pools.base import Compute, E, Finished, Pool, Shards
from tasks.record import interruption
from tasks.record.progress import progress, say
from tasks.record.tables import StoredRows, read_bytes, rows_as_bytes, write_rows, write_tables
from tasks.rows import from_table

Row = TypeVar("Row")
Other = TypeVar("Other")
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

    Only the holder of the fingerprint's lock writes there.

    Args:
        shard_size: items that are computed and kept together.
    """

    def __init__(self, folder: Path, shard_size: int = 64) -> None:
        self.folder, self.shard_size = folder, shard_size
        self.device: Callable[[], AbstractContextManager[None]] = nullcontext
        """Holds the accelerators; for stages that take them for a part of their work."""
        self.outputs = folder / "outputs"
        self.parts = folder / "parts"
        self._done = folder / "done.json"
        for path in (self.outputs, self.parts):
            path.mkdir(parents=True, exist_ok=True)
        for unfinished in list(
            folder.rglob("*.tmp")
        ):  # of a process that was killed while it wrote
            remove(unfinished)

    def write(self, name: str, rows: Iterable[Any], row_type: type) -> None:
        """Write the table `name` whole or not at all."""
        write_rows(self._table(name), rows, row_type)

    def in_shards(
        self,
        name: str,
        row_type: type[Row],
        items: Sequence[Any],
        pool: Pool[E],
        compute: Compute[E, Row],
        *,
        what: str,
        unit: str,
        each: int = 1,
    ) -> Parts[Row]:
        """`compute` over the items, in shards, by the engines of a pool; see `sharded`.

        Args:
            what: is computed, for the progress bar, which counts `each` units an item.
        """
        with progress(what, each * len(items), unit) as tick:
            return self.sharded(
                name,
                row_type,
                shards(items, self.shard_size),
                lambda missing: pool.map(compute, missing, tick),
                found=lambda shard: tick(each * len(shard)),
            )

    def sharded(
        self,
        name: str,
        row_type: type[Row],
        shards: Sequence[Sequence[Any]],
        compute: Callable[[Shards], Iterable[Finished]],
        found: Callable[[Sequence[Any]], None],
    ) -> Parts[Row]:
        """Compute the missing shards, in any order, and keep each when it is finished.

        A part is named by the range of its items: a shard of another size is another part.

        Args:
            compute: yields shards as they are finished, as `Pool.map` does.
            found: called with each shard that an earlier, killed attempt had finished.

        Returns:
            All shards; `table` makes one table of them.
        """
        ends = list(accumulate(map(len, shards)))
        parts = [
            Part(self.parts, f"{name}-{end - len(shard):05}-{end:05}")
            for shard, end in zip(shards, ends, strict=True)
        ]
        missing: dict[int, Sequence[Any]] = {}
        for number, shard in enumerate(shards):
            if parts[number].is_finished():
                found(shard)
            else:
                missing[number] = shard
        kept = len(shards) - len(missing)
        interruption.note(parts=f"{kept} of {len(shards)} shards")
        for done in compute(missing):
            part = parts[done.number]
            part.write(done.rows, row_type)
            self.note("shard", name=part.name, seconds=done.seconds)
            kept += 1
            interruption.note(parts=f"{kept} of {len(shards)} shards")
        return Parts(name, row_type, parts)

    def table(self, parts: Parts[Row]) -> StoredRows[Row]:
        """Write all rows of finished shards as the table of their name."""
        path = self._table(parts.name)
        write_tables(path, parts.tables(), parts.row_type)
        return StoredRows.at(path, parts.row_type)

    def items_table(self, name: str, parts: Parts[Any], column: str, row_type: type[Any]) -> None:
        """Write the items of a column of lists as the table `name`."""
        lists = (table.column(column).combine_chunks() for table in parts.tables())
        tables = (pa.Table.from_struct_array(found.flatten()) for found in lists)
        write_tables(self._table(name), tables, row_type)

    def _table(self, name: str) -> Path:
        return self.outputs / f"{name}.parquet"

    def finish(self, metrics: Metrics, seconds: float) -> Done:
        """Mark the outputs as whole: only recording them is left to do."""
        done = Done(metrics, seconds, manifest(self.outputs))
        write_sealed(self._done, done._asdict())
        self.note("computed", seconds=seconds)
        return done

    def finished(self) -> Done | None:
        """What an earlier attempt finished but did not record, if it is intact."""
        try:
            done = Done(**read_sealed(self._done))
        except FileNotFoundError:
            return None
        except Damaged as error:
            say(f"{error}; the stage's outputs are computed again")
        else:
            if is_intact(self.outputs, done.manifest):
                return done
            say(f"{self.outputs} was damaged; it is computed again")
        for left in (self._done, self.outputs):
            remove(left)
        self.outputs.mkdir()
        return None

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to this machine's journal: in one write, as several processes may."""
        who = {"time": time.time(), "pid": os.getpid(), "fingerprint": self.folder.name}
        line = {**who, "event": event, **facts}
        with (self.folder.parent / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        """Delete the folder: the record has everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Part:
    """A finished shard on disk. Its digest is part of the file's name, so that both appear at once;
    it covers the shard's own name, so that no other shard is taken for it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def is_finished(self) -> bool:
        """Whether it is there and intact; a damaged one is deleted with a message."""
        files = sorted(self.folder.glob(f"{self.name}.*parquet"))
        intact = [file for file in files if self._content(file) is not None]
        for file in files:
            if file not in intact[:1]:
                say(f"{file} was damaged; this shard is computed again")
                remove(file)
        return bool(intact)

    def write(self, rows: Iterable[Any], row_type: type) -> None:
        """Keep the shard's rows."""
        content = rows_as_bytes(rows, row_type)
        with written(self._place(content)) as sink:
            sink.write(content)

    def tables(self) -> Iterator[pa.Table]:
        """The shard's rows as Arrow tables.

        Raises:
            UserError: the disk does not give back what was written to it.
        """
        for file in self.folder.glob(f"{self.name}.*parquet"):
            content = self._content(file)
            if content is not None:
                return read_bytes(content)
        raise UserError(
            "a finished shard was damaged while the stage was at work",
            where=str(self.folder / self.name),
            expected="what was written to it a moment ago",
            fix="look after the disk; the same command computes this shard again",
        )

    def _content(self, file: Path) -> bytes | None:
        try:
            content = file.read_bytes()
        except OSError:
            return None
        return content if file == self._place(content) else None

    def _place(self, content: bytes) -> Path:
        digest = bytes_sha256(self.name.encode() + b"\0" + content)[:32]
        return self.folder / f"{self.name}.{digest}.parquet"


@dataclass(frozen=True)
class Parts(Generic[Row]):
    """Finished shards in their order, read each time they are asked for."""

    name: str
    row_type: type[Row]
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[Row]:
        return self.read(self.row_type)

    def read(self, row_type: type[Other]) -> Iterator[Other]:
        """The rows as another type, without the columns that it lacks."""
        return (row for table in self.tables() for row in from_table(table, row_type))

    def tables(self) -> Iterator[pa.Table]:
        """The rows as Arrow tables; raises as `Part.tables`."""
        return (table for part in self.parts for table in part.tables())


def manifest(folder: Path) -> Manifest:
    """The files of a folder, by sorted relative path."""
    found: Manifest = {}
    for name, sha256 in _digests(folder).items():
        found[name] = {"sha256": sha256}
        if name.endswith(".parquet"):
            found[name]["rows"] = pq.read_metadata(folder / name).num_rows
    return found


def is_intact(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder holds the files of a manifest, byte for byte, and no others."""
    return _digests(folder) == {name: facts["sha256"] for name, facts in manifest.items()}


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) over the data files of a manifest: what a successor's fingerprint rests on."""
    data = {name: facts for name, facts in manifest.items() if not name.endswith(FIGURES)}
    return text_sha256(json.dumps(data, sort_keys=True))


def shards(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Rows in consecutive groups of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
