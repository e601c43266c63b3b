"""Hostile data files."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.cases import Case, Content, fifo, folder, row, sparse
from hostile.data_inputs import INPUTS

GOOD = row(prompt="What is it?", gold="It is that.")


def bomb(size: int) -> bytes:
    """A gzip file of one line of zeros: the same 16 MiB again and again, as gzip allows."""
    return gzip.compress(b"0" * (16 << 20)) * (size >> 24)


def parquet(**columns: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path)

    return make


def cut_parquet(path: Path) -> None:
    parquet(prompt=["a"] * 100, gold=["b"] * 100)(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + raw[-8:])


LINES: dict[str, Content] = {
    "empty": "",
    "blank lines": "\n\n\n",
    "a word": "hello\n",
    "a number": "5\n",
    "null": "null\n",
    "a list": "[1]\n",
    "cut": GOOD + '{"prompt": "a", "go',
    "deep": "[" * 100_000 + "\n",
    "deep in a field": '{"prompt": ' + "[" * 100_000 + "}\n",
    "80 levels in a field": '{"gold": "x", "prompt": ' + "[" * 80 + "]" * 80 + "}\n",
    "a NUL line": b"\0" * 1_000 + b"\n",
    "bytes": bytes(range(256)) * 50,
    "latin-1": b'{"prompt": "caf\xe9", "gold": "a"}\n',
    "UTF-16 of nothing": "".encode("utf-16"),
    "half a character": '{"prompt": "\\ud800", "gold": "a"}\n',
    "no number": '{"prompt": NaN, "gold": Infinity}\n',
    "5,000 digits": '{"prompt": ' + "9" * 5_000 + ', "gold": "a"}\n',
    "other columns": row(question="a", answer="b"),
    "a red column": '{"\\u001b[31mred": "a", "gold": "b"}\n',
    "a column of markup": row(**{"[/green]": "a", "[bold]": "b"}),
    "10,000 columns": json.dumps({f"c{n}": n for n in range(10_000)}) + "\n",
    "a long column": row(**{"x" * 1_000_000: "a"}),
    "a null prompt": row(prompt=None, gold="a"),
    "a bool prompt": row(prompt=True, gold="a"),
    "an empty prompt": row(prompt="", gold="a"),
    "no gold": row(prompt="a"),
    "a number gold": row(prompt="a", gold=5),
    "an object gold": row(prompt="a", gold={"a": {"b": []}}),
    "an odd role": row(prompt=[{"role": "\x1b[31mking", "content": "a"}], gold="b"),
    "no content": row(prompt=[{"role": "user"}], gold="b"),
    "number messages": row(prompt=[1, 2, 3], gold="b"),
    "no messages": row(prompt=[], gold="b"),
    "two users": row(prompt=[{"role": "user", "content": 5}], gold="b"),
    "a long prompt": row(prompt="x" * 5_000_000, gold="b"),
    "the same twice": GOOD * 2,
    "all of them wrong": row(prompt=5, gold=6) * 20_000,
    "a key twice": '{"prompt": "a", "prompt": "b", "gold": "c"}\n',
    "a sparse line": sparse(1 << 30),
    "a sparse tail": sparse(1 << 30, GOOD.encode()),
    "a FIFO": fifo,
    "a folder": folder,
}
OTHERS: dict[str, Content] = {
    "a.json.gz: a bomb": bomb(1 << 30),
    "a.jsonl.gz: a bomb": bomb(1 << 30),
    "a.jsonl.gz: no gzip": "hello",
    "a.jsonl.gz: cut": gzip.compress(GOOD.encode() * 1_000)[:50],
    "a.csv.gz: a bomb": bomb(1 << 30),
    "a.json: a number": "5",
    "a.json: cut": '[{"prompt": "a"',
    "a.json: deep": "[" * 100_000,
    "a.json: nulls": "[null, null]",
    "a.csv: empty": "",
    "a.csv: a head": "prompt,gold\n",
    "a.csv: a NUL": "prompt,gold\na\0b,c\n",
    "a.csv: an open quote": 'prompt,gold\n"a,b\n' + "c,d\n" * 1_000,
    "a.csv: more fields": "prompt,gold\na,b,c,d\n",
    "a.csv: fewer fields": "prompt,gold\na\n",
    "a.csv: a column twice": "prompt,prompt,gold\na,b,c\n",
    "a.csv: a red column": "\x1b[31mprompt,gold\na,b\n",
    "a.csv: a long field": "prompt,gold\n" + "x" * 3_000_000 + ",b\n",
    "a.csv: a sparse line": sparse(1 << 30, b"prompt,gold\n"),
    "a.parquet: empty": "",
    "a.parquet: a word": "PAR1 hello PAR1",
    "a.parquet: cut": cut_parquet,
    "a.parquet: a huge footer": b"PAR1" + b"\0" * 50 + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "a.parquet: other columns": parquet(a=[1], b=[2]),
    "a.parquet: numbers": parquet(prompt=[1], gold=[2.5]),
    "a.parquet: nothing": parquet(prompt=[], gold=[]),
    "a.exe: odd": "MZ",
    "a\x1b[31m.jsonl: a red name": "hello",
    "a[bold].jsonl: markup": "hello",
    "a.txt: text": "hello\n",
}


def cases() -> Iterator[Case]:
    for what, content in LINES.items():
        yield Case(f"rows: {what}", ("validate", "a.jsonl"), files={"a.jsonl": content})
    for what, content in OTHERS.items():
        name = what.partition(":")[0]
        yield Case(f"file {what!r}", ("validate", name), files={name: content})
    for given in INPUTS:
        yield Case(
            f"data: {given.name}",
            ("validate", given.file),
            files={given.file: given.content},
            says=given.says[0] if given.says else "",
            code=2 if given.says else 0,
        )


CASES = list(cases())
