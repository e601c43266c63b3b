"""The text of a data file: decompressed, decoded, and handed out line by line, within bounds.

Used by the readers of `tasks.corpus.files`. Whatever a file holds (a line of a gigabyte, a gzip
file that expands a thousandfold, a device), reading it needs bounded memory, and ends.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from constitutions.errors import UserError

LONGEST_ROW = 8 * 2**20
"""Characters of a row; a prompt has 20,000 by default."""
LONGEST_SKIPPED = 8 * LONGEST_ROW
"""Characters of the longest line that is skipped; a file with a longer one is refused."""
BLANK_LINES = 100_000
"""Blank lines in a row; a file with more is refused."""
EXPANSION, SMALL = 100, 64 * 2**20
"""The largest factor by which a file may expand, and the bytes that it always may. Text of distinct
rows expands up to tenfold."""

_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive (as Excel's workbooks are); save it as CSV or JSON Lines",
    b"BZh": "compressed by bzip2; decompress it",
    b"\xfd7zXZ": "compressed by xz; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it",
    b"%PDF": "a PDF; export its text as CSV or JSON Lines",
    b"SQLite format 3": "an SQLite database; export it as CSV or JSON Lines",
    b"ARROW1": "an Arrow file; save it as Parquet",
}


def _bytes_as_surrogates(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    broken = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in broken), error.end


codecs.register_error("bytes-as-surrogates", _bytes_as_surrogates)


@contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[IO[str]]:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; also gzipped.

    Broken bytes become lone surrogates, which the field that holds them reports.

    Raises:
        UserError: by its first bytes it is a file of another kind or encoding, or it expands too
            far.
    """
    with ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(path.open("rb"))
        head = raw.read(16)
        raw.seek(0)
        if path.suffix == ".gz" or head.startswith(b"\x1f\x8b"):
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=raw))
            raw = cast(IO[bytes], io.BufferedReader(_Expanded(path, unpacked)))
        head = cast(io.BufferedReader, raw).peek(64)[:64]
        encoding = _encoding(head, path)
        errors = "surrogateescape" if encoding == "utf-8-sig" else "bytes-as-surrogates"
        yield stack.enter_context(
            io.TextIOWrapper(cast(Any, raw), encoding, errors, newline=newline)
        )


class _Expanded(io.RawIOBase):
    """The content of a gzip file. Reading raises UserError where it expands too far."""

    def __init__(self, path: Path, unpacked: gzip.GzipFile) -> None:
        self._path, self._unpacked, self._count = path, unpacked, 0
        self._most = max(SMALL, EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._unpacked.readinto(buffer)
        self._count += count
        if self._count > self._most:
            raise UserError(
                f"the file expands to more than {self._most >> 20:,} MiB",
                where=str(self._path),
                expected=f"text that gzip makes at most {EXPANSION} times smaller",
                fix="decompress it yourself to have it read",
            )
        return count


def _encoding(head: bytes, path: Path) -> str:
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            return encoding
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"by its content this is {what}", where=str(path))
    for first in (0, 1):
        zeros, letters = head[1 - first :: 2], head[first::2]
        if len(head) >= 8 and not any(zeros) and all(letters):
            raise UserError(
                "this looks like UTF-16 without a byte order mark",
                where=str(path),
                expected="UTF-8, or UTF-16 or UTF-32 with a byte order mark",
            )
    return "utf-8-sig"


class Lines:
    """The lines of a text, one at a time; `number` is that of the last, from 1."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.number = 0
        self._file, self._path, self._blank = file, path, 0

    def read(self, *, blank: bool = False) -> str:
        """The next line with its end, at most LONGEST_ROW + 1 characters of it; "" at the end.

        Args:
            blank: return a line of white space as well.

        Raises:
            UserError: too many blank lines in a row.
        """
        while line := self._file.readline(LONGEST_ROW + 1):
            self.number += 1
            if not line.isspace():
                self._blank = 0
                return line
            self._blank += 1
            if self._blank > BLANK_LINES or len(line) > LONGEST_ROW:
                raise UserError("there are only blank lines from here on", where=self.where)
            if blank:
                return line
        return ""

    def skip(self) -> None:
        """Leave out the rest of a line that is too long.

        Raises:
            UserError: it goes on for more than LONGEST_SKIPPED characters.
        """
        for _ in range(LONGEST_SKIPPED // LONGEST_ROW):
            if not (rest := self._file.readline(LONGEST_ROW)) or rest.endswith("\n"):
                return
        raise UserError(
            f"the line has more than {LONGEST_SKIPPED:,} characters",
            where=self.where,
            expected=f"rows of at most {LONGEST_ROW:,} characters",
        )

    @property
    def where(self) -> str:
        """The file and the line, for a message."""
        return f"{self._path}, line {self.number}"
