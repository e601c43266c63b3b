"""Tokenised conversations in a file that is mapped into memory: training reads what a step needs.

`tasks/train.py` writes it; `models/training/loop.py` takes examples from it by their numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import pyarrow as pa

from models.files import written
from models.training.encoding import EncodedExample

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("weight", pa.float64()),
        ("taught", pa.list_(pa.int32())),
    ]
)
BATCH = 16
"""Examples that are written together: a million tokens each at most, as Python's integers."""


class StoredExamples(Sequence[EncodedExample]):
    """The examples of a file. One costs nothing until it is asked for.

    Raises:
        OSError, ValueError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids, self._trained, self._weight, self._taught = table.columns

    @classmethod
    def write(cls, path: Path, examples: Iterable[EncodedExample]) -> StoredExamples:
        """Write examples whole or not at all, and open the file."""
        left = iter(examples)
        with written(path) as sink, pa.ipc.new_file(sink, SCHEMA) as file:
            while batch := list(itertools.islice(left, BATCH)):
                rows = [(list(e.ids), list(e.trained), e.weight, list(e.taught)) for e in batch]
                columns = [list(column) for column in zip(*rows, strict=True)]
                file.write_table(pa.table(columns, schema=SCHEMA))
        return cls(path)

    def __len__(self) -> int:
        return len(self._weight)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...

    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return EncodedExample(
            self._ids[index].values.to_numpy(),
            self._trained[index].values.to_numpy(zero_copy_only=False),
            self._weight[index].as_py(),
            self._taught[index].values.to_numpy(),
        )
