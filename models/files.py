"""Writes files whole or not at all, with digests that show damage.

The record, the caches and the shards of stages are written with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from constitutions.errors import UserError

UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Errors of reading a damaged JSON file, and of using its values."""
SEAL = "# sha256 of what follows: "


class Damaged(UserError):
    """A file whose contents are not what was written to it."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(f"the file is damaged ({why})", where=str(path))


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def bytes_sha256(content: bytes) -> str:
    """sha256 (hex) of some bytes."""
    return hashlib.sha256(content).hexdigest()


def text_sha256(text: str) -> str:
    """sha256 (hex) of a text's UTF-8."""
    return bytes_sha256(text.encode())


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it becomes `path` where the block succeeds, and is deleted otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:  # on a full disk, too
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written(path) as sink:
        sink.write(text.encode())


def write_sealed(path: Path, value: Any) -> None:
    """Write a JSON value and its digest into one file, whole or not at all."""
    write_text(path, json.dumps({"sha256": _json_sha256(value), "value": value}))


def read_sealed(path: Path) -> Any:
    """The value that `write_sealed` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: the file cannot be read, or its digest differs.
    """
    try:
        found = json.loads(path.read_bytes())
        if found["sha256"] == _json_sha256(found["value"]):
            return found["value"]
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise Damaged(path, error or type(error).__name__) from error
    raise Damaged(path, "its digest differs")


def seal(text: str) -> str:
    """The text below a first line with its digest, which is a comment in YAML."""
    return f"{SEAL}{text_sha256(text)}\n{text}"


def unseal(path: Path) -> str:
    """The text of a file that holds what `seal` returned.

    Raises:
        Damaged: the file cannot be read, or its digest differs.
    """
    try:
        line, _, text = path.read_bytes().decode().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(path, error) from error
    if line != f"{SEAL}{text_sha256(text)}":
        raise Damaged(path, "its digest differs")
    return text


def user_cache() -> Path:
    """The folder of what this user's experiments share; it may be deleted at any time."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home: nothing is kept
        cache = os.devnull
    return Path(cache) / "staple"


def recall(folder: Path, key: str) -> str:
    """The text that `remember` wrote under a key; "" where there is none or it is damaged."""
    with suppress(Damaged):
        return unseal(folder / key)
    return ""


def remember(folder: Path, key: str, text: str) -> None:
    """Write a text under a key; where that is not possible, a later process finds it out again."""
    with suppress(OSError):
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(folder / key, seal(text))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _json_sha256(value: Any) -> str:
    return text_sha256(json.dumps(value, sort_keys=True))
