"""A model's files: hashed once, and copied once to each machine that needs them.

`tasks.policies.base` identifies a model by them; `models.pools.ray_cluster` copies them to nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from constitutions.errors import UserError
from models.checkpoints.gguf import local_directory
from models.files import Damaged, file_sha256, read_sealed, remove, write_sealed
from models.notices import say

PIECE = 64 << 20
"""Bytes that are sent at once."""

Read = Callable[[str, int], bytes]
"""(file's relative name, offset) to at most `PIECE` bytes of it; b"" at its end."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder on one machine: its path, and each file's sha256 (hex) by relative name."""

    path: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """sha256 (hex) over names and contents."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def folders(names: Iterable[str], home: Path) -> dict[str, Folder]:
    """The folders among models' names; every node fetches a hub name by itself."""
    places = {name: local_directory(name) for name in names}
    return {
        name: Folder(str(place.resolve()), file_hashes(place, home))
        for name, place in places.items()
        if place
    }


def file_hashes(folder: Path, home: Path) -> dict[str, str]:
    """The sha256 (hex) of each file's contents, by relative name.

    A file is hashed once for each (path, size, time of change). Digests are kept under `home`:
    hashing 16 GB takes longer than everything else at start-up.
    """
    memory = home / "digests.json"
    known = _remembered(memory)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts)
    digests = {}
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        known[key] = digests[str(path.relative_to(folder))] = known.get(key) or file_sha256(path)
    home.mkdir(parents=True, exist_ok=True)
    write_sealed(memory, known)
    return digests


def _remembered(memory: Path) -> dict[str, str]:
    """The digests that are known; none where their file is damaged, which costs only time."""
    try:
        return dict(read_sealed(memory))
    except FileNotFoundError:
        return {}
    except Damaged as error:
        say(f"{error}; it is replaced, and the models' files are hashed again")
        remove(memory)
        return {}


def bring(folder: Folder, home: Path, read: Read) -> Path:
    """The folder's path on this machine: its own path if it has the same files here, else a copy
    below `home`, which the first process that needs it makes.

    Raises:
        UserError: a file arrives with another digest.
    """
    from filelock import FileLock

    own, copy = Path(folder.path), home / "models" / folder.digest[:32] / Path(folder.path).name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.parent / ".lock"):
        for place in (own, copy):
            if os.path.isdir(place) and file_hashes(place, home) == folder.files:
                return place
        _fetch(folder, copy, read)
    return copy


def _fetch(folder: Folder, to: Path, read: Read) -> None:
    """Copy it whole or not at all; the unfinished copy of a killed process is deleted."""
    scratch = to.with_name(f"{to.name}.tmp")
    for left in (scratch, to):
        shutil.rmtree(left, ignore_errors=True)
    for name, sha256 in folder.files.items():
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as sink:
            while piece := read(name, sink.tell()):
                sink.write(piece)
        if file_sha256(path) != sha256:
            raise UserError(
                f"the copy of {name} is not the file that was sent: its sha256 differs",
                where=str(to),
                expected=f"the files of {folder.path}, unchanged while a stage uses them",
            )
    scratch.replace(to)


class Shelf:
    """An actor that reads pieces of some folders' files, on the machine that has them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def piece(self, path: str, name: str, offset: int) -> bytes:
        """At most `PIECE` bytes of a file of the folder `path`; `ValueError` for another folder."""
        if path not in self._paths:
            raise ValueError(f"{path} is not on this shelf")
        with Path(path, name).open("rb") as source:
            source.seek(offset)
            return source.read(PIECE)
