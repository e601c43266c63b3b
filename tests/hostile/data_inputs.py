"""Data files as people have them, and as nobody should: what is read of each, or how it is refused.

`tests/tasks/test_corpus_inputs.py` reads them by `load_corpus`; `hostile.data` gives them to the
command line, within limits of time and memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile.cases import Content, fifo, link_to, row, sparse


@dataclass(frozen=True)
class DataInput:
    """A data file, and what becomes of it."""

    name: str
    file: str
    content: Content
    reads: tuple[tuple[str, str], ...] = ()
    """The last turn of each prompt and the gold, where the file is read."""
    says: tuple[str, ...] = ()
    """Parts of the refusal, where it is not."""


ROWS = [{"prompt": f"Q{i}?", "gold": f"A{i}"} for i in range(3)]
READ = tuple((r["prompt"], r["gold"]) for r in ROWS)
ONE = (("Q?", "A"),)
LINES = "".join(row(**r) for r in ROWS)
USER, ASSISTANT = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}
OTHER = {"role": "assistant", "content": "B"}
SHARE = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
NUMPY = "[{'content': 'Q?', 'role': 'user'}\n {'content': 'A', 'role': 'assistant'}]"


def table(*rows: tuple[Any, ...], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("prompt", "gold"), *rows])
    return out.getvalue()


def parquet(columns: dict[str, Any], **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path, **options)

    return make


def two_of_a_name(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "gold", "gold"]), path)


def shared_text(path: Path) -> None:
    """One text of 10 MiB to which 3,000 rows refer: 30 GB where each has a copy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 3_000, pa.int32()), ["x" * (10 << 20)])
    columns = {"prompt": texts, "gold": texts}
    pq.write_table(pa.table(columns), path, compression="zstd", write_statistics=False)


def packed(piece: bytes, times: int, before: bytes = b"") -> bytes:
    """A gzip file of a piece many times, made at once: of as many members."""
    return (gzip.compress(before) if before else b"") + gzip.compress(piece) * times


def pipe_behind_a_link(path: Path) -> None:
    fifo(path.parent / "pipe")
    path.symlink_to("pipe")


MIB = 1 << 20
LONG_LIST = "[" + ",".join(json.dumps({**r, "more": "x" * 3_000_000}) for r in ROWS) + "]"

_READ: list[tuple[str, str, Content, tuple[tuple[str, str], ...]]] = [
    # encodings and layouts
    ("UTF-8 with a mark", "a.jsonl", LINES.encode("utf-8-sig"), READ),
    ("UTF-16", "a.jsonl", LINES.encode("utf-16"), READ),
    ("UTF-16, big end first", "a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be"), READ),
    ("UTF-32", "a.jsonl", LINES.encode("utf-32"), READ),
    ("UTF-32, big end first", "a.json", b"\0\0\xfe\xff" + json.dumps(ROWS).encode("utf-32-be"), READ),
    ("UTF-16 CSV", "a.csv", table(*READ).encode("utf-16"), READ),
    ("UTF-16 CSV as Excel writes it", "a.csv", table(*READ, delimiter="\t").encode("utf-16"), READ),
    ("UTF-16 in gzip", "a.jsonl.gz", gzip.compress(LINES.encode("utf-16")), READ),
    ("gzip without its name", "a.jsonl", gzip.compress(LINES.encode()), READ),
    ("Windows line ends", "a.jsonl", LINES.replace("\n", "\r\n"), READ),
    ("blank lines between", "a.jsonl", LINES.replace("\n", "\n\n \n"), READ),
    ("a list in .jsonl", "a.jsonl", json.dumps(ROWS), READ),
    ("a list over lines in .jsonl", "a.jsonl", json.dumps(ROWS, indent=2), READ),
    ("a long list on one line", "a.json", LONG_LIST, READ),
    ("one object over lines", "a.json", json.dumps(ROWS[0], indent=2), READ[:1]),
    ("one object on a line", "a.json", json.dumps(ROWS[0]), READ[:1]),
    ("objects over lines", "a.jsonl", "\n".join(json.dumps(r, indent=2) for r in ROWS), READ),
    ("no space between objects", "a.json", "".join(json.dumps(r, indent=0) for r in ROWS), READ),
    ("a wrapped list", "a.json", json.dumps({"version": "1", "data": ROWS}), READ),
    ("a wrapped list over lines", "a.json", json.dumps({"rows": ROWS, "n": {"a": [1]}}, indent=1), READ),
    ("a wrapped list in .jsonl", "a.jsonl", json.dumps({"examples": ROWS}), READ),
    ("wrapped as instances", "a.json", json.dumps({"instances": ROWS}, indent=4), READ),
    ("wrapped as train", "a.json.gz", gzip.compress(json.dumps({"train": ROWS}).encode()), READ),
    ("a long wrapped list", "a.json", '{"data": ' + LONG_LIST + "}", READ),
    ("brackets in texts", "a.json", json.dumps([{"prompt": 'a]}"{[\\', "gold": "],[\n"}]), (('a]}"{[\\', "],[\n"),)),
    ("a surrogate pair", "a.jsonl", '{"prompt": "\\ud83d\\ude00", "gold": "A"}', (("\U0001f600", "A"),)),
    ("NaN in a column that is not read", "a.jsonl", '{"prompt": "Q?", "gold": "A", "score": NaN}', ONE),
    ("a null in a column that is not read", "a.jsonl", row(prompt="Q?", gold="A", x=None), ONE),
    # CSV
    ("semicolons", "a.csv", table(*READ, delimiter=";"), READ),
    ("tabs", "a.csv", table(*READ, delimiter="\t"), READ),
    ("tabs by name", "a.tsv", table(*READ, delimiter="\t"), READ),
    ("bars", "a.csv", table(*READ, delimiter="|"), READ),
    ("Excel's separator line", "a.csv", "sep=;\n" + table(*READ, delimiter=";"), READ),
    ("a semicolon in a text", "a.csv", table(("Q; or?", "A;B")), (("Q; or?", "A;B"),)),
    ("blank lines in a text", "a.csv", table(("Q\n\n\n?", "A")), (("Q\n\n\n?", "A"),)),
    ("blank lines between CSV rows", "a.csv", "prompt,gold\n\nQ?,A\n\n", ONE),
    ("columns without a name", "a.csv", "prompt,gold,,\nQ?,A,,\n", ONE),
    ("old line ends", "a.csv", "prompt,gold\rQ?,A\r", ONE),
    # messages
    ("messages as JSON", "a.jsonl", row(prompt=json.dumps([USER]), gold="A"), ONE),
    ("messages as Python's text", "a.csv", table((str([USER]), "A")), ONE),
    ("a gold of messages", "a.jsonl", row(prompt=[USER], gold=[ASSISTANT]), ONE),
    ("a gold of messages as text", "a.csv", table(("Q?", str([ASSISTANT]))), ONE),
    ("messages with quotes as text", "a.csv", table((str([{"role": "user", "content": "Isn't it \"so\"?\n"}]), "A")), (("Isn't it \"so\"?\n", "A"),)),
    ("text and messages in turn", "a.jsonl", row(prompt="P?", gold="A") + row(prompt=[USER], gold="A"), (("P?", "A"), ("Q?", "A"))),
    ("a list of JSON that is no message", "a.jsonl", row(prompt='[{"id": 1}]', gold="A"), (('[{"id": 1}]', "A"),)),
    ("JSON of a transfer", "a.jsonl", row(prompt='{"from": "USD", "value": 1}', gold="A"), (('{"from": "USD", "value": 1}', "A"),)),
    ("prose about a message", "a.jsonl", row(prompt=f"{[USER]} is what?", gold="A"), ((f"{[USER]} is what?", "A"),)),
    ("prose in brackets", "a.jsonl", row(prompt="[role] and [content]", gold="A"), (("[role] and [content]", "A"),)),
    ("contents in parts", "a.jsonl", row(prompt=[{"role": "user", "content": [{"type": "text", "text": "Q?"}]}], gold="A"), ONE),
    ("several parts", "a.jsonl", row(prompt=[{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]}], gold="A"), (("Q\nR", "A"),)),
    ("TRL's implicit prompt", "a.jsonl", row(chosen=[USER, ASSISTANT], rejected=[USER, OTHER]), ONE),
    ("TRL's implicit prompt as text", "a.jsonl", row(chosen=json.dumps([USER, ASSISTANT]), rejected=json.dumps([USER, OTHER])), ONE),
    ("TRL's implicit prompt in Parquet", "a.parquet", parquet({"chosen": [[USER, ASSISTANT]], "rejected": [[USER, OTHER]]}), ONE),
    ("TRL's explicit prompt", "a.jsonl", row(prompt=[USER], chosen=[ASSISTANT], rejected=[OTHER]), ONE),
    ("an explicit prompt and more turns", "a.jsonl", row(prompt=[USER], chosen=[ASSISTANT, {"role": "user", "content": "R?"}, OTHER]), (("R?", "B"),)),
    ("a text prompt and a chosen message", "a.jsonl", row(prompt="Q?", chosen=[ASSISTANT], rejected=[OTHER]), ONE),
    ("preferences from pandas", "a.csv", f'chosen,rejected\n"{[USER, ASSISTANT]}","{[USER, OTHER]}"\n', ONE),
    ("messages", "a.jsonl", row(messages=[USER, ASSISTANT]), ONE),
    ("messages in Parquet", "a.parquet", parquet({"messages": [[USER, ASSISTANT]]}), ONE),
    ("ShareGPT", "a.json", json.dumps([{"id": "1", "conversations": SHARE}]), ONE),
    ("ShareGPT with a system", "a.jsonl", row(system="Be brief.", conversations=SHARE), ONE),
    ("ShareGPT as text", "a.csv", f'conversations\n"{SHARE}"\n', ONE),
    ("formats in turn", "a.jsonl", row(prompt="P?", gold="A") + row(messages=[USER, ASSISTANT]), (("P?", "A"), ("Q?", "A"))),
    ("texts that Parquet shares", "a.parquet", parquet({"prompt": ["Q0?", "Q1?", "Q2?"], "gold": ["A"] * 3}), (("Q0?", "A"), ("Q1?", "A"), ("Q2?", "A"))),
]  # fmt: skip

_REFUSED: list[tuple[str, str, Content, tuple[str, ...]]] = [
    # encodings and layouts
    ("UTF-16 without a mark", "a.jsonl", LINES.encode("utf-16-le"), ("UTF-16 without a byte order mark",)),
    ("UTF-16, big, without a mark", "a.csv", table(*READ).encode("utf-16-be"), ("UTF-16 without a byte order mark",)),
    ("half of UTF-16", "a.jsonl", row(prompt="Q?", gold="A\ud800").encode("utf-16", "surrogatepass"), ("row 1", "'gold'")),
    ("broken UTF-16", "a.csv", b"\xff\xfe" + table(("Q\udcdd?", "A")).encode("utf-16-le", "surrogatepass"), ("row 1", "'prompt'", "character 2")),
    ("latin-1", "a.jsonl", '{"prompt": "caf\u00e9", "gold": "A"}'.encode("latin-1"), ("row 1", "'prompt'", "byte 0xe9 at character 4")),
    ("latin-1 in CSV", "a.csv", table(("Q?", "caf\u00e9")).encode("latin-1"), ("row 1", "'gold'", "byte 0xe9")),
    ("half a character", "a.jsonl", '{"prompt": "a\\ud83d", "gold": "A"}', ("row 1", "'prompt'", "\\ud83d")),
    ("half a character in a message", "a.jsonl", '{"prompt": [{"role": "user", "content": "\\udc00"}], "gold": "A"}', ("prompt[0].content", "\\udc00")),
    ("NUL", "a.jsonl", '{"prompt": "a\\u0000b", "gold": "A"}', ("row 1", "'prompt'", "character 2 is NUL")),
    ("NUL in CSV", "a.csv", "prompt,gold\na\0b,A\n", ("row 1", "NUL")),
    ("NaN", "a.jsonl", '{"prompt": "Q?", "gold": NaN}', ("row 1", "'gold'", "NaN")),
    ("Infinity", "a.jsonl", '{"prompt": Infinity, "gold": "A"}', ("row 1", "'prompt'", "float")),
    ("5,000 digits", "a.jsonl", '{"prompt": "Q?", "gold": ' + "9" * 5_000 + "}", ("row 1", "too many digits")),
    ("a key twice", "a.jsonl", '{"prompt": "Q?", "gold": "A", "gold": "B"}', ("row 1", "'gold'", "twice")),
    ("a key twice in a message", "a.jsonl", '{"prompt": [{"role": "user", "role": "system", "content": "Q?"}], "gold": "A"}', ("'role'", "twice")),
    ("a key twice in a list", "a.json", '[{"prompt": "Q?", "gold": "A", "prompt": "R?"}]', ("row 1", "'prompt'", "twice")),
    ("two lists", "a.json", json.dumps({"train": ROWS, "rows": ROWS}), ("two lists of rows", "train", "rows")),
    ("columns by index", "a.json", json.dumps({"prompt": {"0": "Q?"}, "gold": {"0": "A"}}), ("columns, not rows", "orient='records'")),
    ("columns as lists", "a.json", json.dumps({"prompt": ["Q?", "R?"], "gold": ["A", "B"]}, indent=1), ("columns, not rows",)),
    ("a wrapper of another name", "a.json", json.dumps({"pairs": ROWS}), ("'prompt'", "missing", "pairs")),
    ("a list that is not closed", "a.json", json.dumps(ROWS)[:-1], ("not JSON", "after row 3")),
    ("a list that is cut", "a.json", json.dumps(ROWS)[:-12], ("not JSON", "ends within a value")),
    ("more after the list", "a.json", json.dumps(ROWS) + "\nthe end", ("'the'", "after the last row")),
    ("commas missing", "a.json", json.dumps(ROWS).replace("}, {", "} {"), ("not JSON", "after row 1")),
    ("single quotes", "a.jsonl", str(ROWS[0]), ("row 1", "not JSON")),
    ("a word in a list", "a.json", '["Q?"]', ("row 1", "type str", "a JSON object")),
    ("empty", "a.jsonl", "", ("no rows",)),
    ("an empty list", "a.json", "[]", ("no rows",)),
    ("a mark and nothing", "a.json", b"\xff\xfe", ("no rows",)),
    ("an empty wrapper", "a.json", '{"data": []}', ("'prompt'", "missing", "data")),
    # CSV
    ("a header only", "a.csv", "prompt,gold\n", ("no rows",)),
    ("a column twice", "a.csv", "prompt,gold,gold\nQ?,A,B\n", ("'gold'", "twice", "columns 2 and 3")),
    ("a quote that is open", "a.csv", 'prompt,gold\n"Q?,A\n' + "R?,B\n" * 10, ("not CSV",)),
    ("a quote that is open for long", "a.csv", 'prompt,gold\n"Q?,A\n' + ("R?,B" * 1_000 + "\n") * 3_000, ("8,388,608 characters", "quotation mark")),
    ("too few fields", "a.csv", "prompt,gold\nQ?\n", ("1 fields", "2")),
    ("a separator of another kind", "a.csv", "prompt~gold\nQ?~A\n", ("'prompt'", "missing", "prompt~gold")),
    # messages
    ("messages of numpy", "a.csv", f'prompt,gold\n"{NUMPY}",A\n', ("row 1", "'prompt'", "messages that were written as text")),
    ("an array of messages", "a.jsonl", row(prompt=f"array([{USER}], dtype=object)", gold="A"), ("messages that were written as text",)),
    ("messages that are cut", "a.jsonl", row(prompt=str([USER, ASSISTANT])[:-9], gold="A"), ("messages that were written as text",)),
    ("a message that is no list", "a.jsonl", row(prompt=json.dumps(USER), gold="A"), ("messages that were written as text",)),
    ("deep messages", "a.jsonl", row(prompt="[{'role': 'user', 'content': " + "[" * 50_000 + "]" * 50_000 + "}]", gold="A"), ("messages that were written as text",)),
    ("messages with code", "a.jsonl", row(prompt="[{'role': 'user', 'content': __import__('os').getcwd()}]", gold="A"), ("messages that were written as text",)),
    ("minus signs", "a.jsonl", row(prompt="[{'role': 'user', 'content': " + "-" * 100_000 + "1}]", gold="A"), ("messages that were written as text",)),
    ("a gold of two messages", "a.jsonl", row(prompt="Q?", gold=[USER, ASSISTANT]), ("'gold'", "2 messages")),
    ("a gold of the user", "a.jsonl", row(prompt="Q?", gold=[USER]), ("'gold'", "not the assistant's")),
    ("an image", "a.jsonl", row(prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], gold="A"), ("prompt[0].content[0]", "image_url")),
    ("no content", "a.jsonl", row(prompt=[USER, {"role": "assistant", "content": None}, USER], gold="A"), ("prompt[1].content", "null")),
    ("a call of tools", "a.jsonl", row(messages=[USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, ASSISTANT]), ("messages[1]", "calls tools")),
    ("a tool", "a.jsonl", row(messages=[USER, {"role": "tool", "content": "5"}, ASSISTANT]), ("messages[1]", "'tool'")),
    ("ShareGPT's tool", "a.jsonl", row(conversations=[*SHARE[:1], {"from": "observation", "value": "5"}]), ("conversations[1]", "'observation'")),
    ("a dialogue without an answer", "a.jsonl", row(messages=[USER]), ("not the assistant's",)),
    ("a chosen of words alone", "a.jsonl", row(chosen="The sky is blue.", rejected="green."), ("'chosen'", "dialogue")),
    ("mixed types in a list", "a.jsonl", row(prompt=[USER, "R?"], gold="A"), ("prompt[1]", "type str")),
    ("a bad row among good ones", "a.jsonl", LINES + row(prompt=5, gold="A"), ("row 4", "'prompt'", "type int")),
    # kinds of files
    ("Parquet under another name", "a.jsonl", parquet({"prompt": ["Q?"], "gold": ["A"]}), ("Parquet", ".parquet")),
    ("a workbook", "a.csv", b"PK\x03\x04" + bytes(100), ("zip archive", "Excel")),
    ("zstd", "a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(100), ("zstd",)),
    ("bzip2", "a.jsonl", b"BZh91AY&SY" + bytes(100), ("bzip2",)),
    ("gzip that is none", "a.jsonl.gz", "hello", ("cannot be read",)),
    ("gzip that is cut", "a.jsonl.gz", gzip.compress(LINES.encode() * 100)[:-30], ("cannot be read",)),
    ("gzip with a wrong sum", "a.jsonl.gz", gzip.compress(LINES.encode())[:-8] + struct.pack("<II", zlib.crc32(b""), 5), ("cannot be read",)),
    ("a column twice in Parquet", "a.parquet", two_of_a_name, ("'gold'", "twice")),
    ("a pipe", "a.jsonl", fifo, ("a pipe or a device",)),
    ("a pipe behind a link", "a.jsonl", pipe_behind_a_link, ("a pipe or a device",)),
    ("zeros without end", "a.jsonl", link_to("/dev/zero"), ("a pipe or a device",)),
    ("a link to nothing", "a.jsonl", link_to("nowhere"), ("no such file",)),
    ("a link to itself", "a.jsonl", link_to("a.jsonl"), ("a.jsonl",)),
    # bombs
    ("a sparse line", "a.jsonl", sparse(1 << 30), ("67,108,864 characters",)),
    ("a sparse JSON file", "a.json", sparse(1 << 30, b"["), ("8,388,608 characters",)),
    ("a sparse CSV file", "a.csv", sparse(1 << 30, b"prompt,gold\n"), ("8,388,608 characters",)),
    ("a long value in a list", "a.json", '[{"prompt": "' + "x" * 9_000_000 + '", "gold": "A"}]', ("8,388,608 characters",)),
    ("a long row", "a.jsonl", LINES + '{"prompt": "' + "x" * 9_000_000 + '"}\n', ("row 4", "8,388,608 characters")),
    ("a bomb of one line", "a.jsonl.gz", packed(b"0" * MIB, 10 << 10), ("67,108,864 characters",)),
    ("a bomb of blank lines", "a.jsonl.gz", packed(b"\n" * MIB, 10 << 10), ("only blank lines",)),
    ("a bomb of spaces", "a.json.gz", packed(b" " * MIB, 200, before=b"["), ("expands to more than",)),
    ("a bomb of words", "a.jsonl.gz", packed(b"hello\n" * 100_000, 300), ("not JSON", "1,000 bad rows")),
    ("a bomb of brackets", "a.json.gz", packed(b"[" * MIB, 100), ("nests deeper",)),
    ("a bomb of columns", "a.csv.gz", packed(b"," * MIB, 100), ("8,388,608 characters",)),
    ("deep", "a.jsonl", "[" * 100_000, ("nests deeper",)),
    ("deep in a row", "a.jsonl", LINES + '{"a": ' * 100_000, ("row 4", "nested too deeply")),
    ("deep in Python's form", "a.csv", table(("[{'role': 'user', 'content': '" + "(" * 19_000 + "'}]", "")), ("'gold'",)),
    ("a text that 3,000 rows share", "a.parquet", shared_text, ("8,388,608 bytes",)),
    ("Parquet that swells", "a.parquet", parquet({"prompt": ["x" * 1_000_000 + str(i) for i in range(80)], "gold": ["A"] * 80}, use_dictionary=False, compression="zstd"), ("expands to more than",)),
]  # fmt: skip

INPUTS = [
    *(DataInput(name, file, content, reads=reads) for name, file, content, reads in _READ),
    *(DataInput(name, file, content, says=says) for name, file, content, says in _REFUSED),
]
