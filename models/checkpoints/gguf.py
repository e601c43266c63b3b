"""Finds the directory of a local model; a GGUF file gets one, in which its weights are dequantised.

It is made once for each content of a file and kept in the user's cache. Everything that reads
models sees an ordinary directory: safetensors, configuration, tokenizer, chat template.
"""

from __future__ import annotations

import stat
from functools import cache
from importlib.metadata import version
from pathlib import Path

from constitutions.errors import UserError
from models.checkpoints.bounded import WALL_SECONDS, ask
from models.checkpoints.headers import INDEX, WEIGHTS
from models.files import (
    bytes_sha256,
    file_sha256,
    recall,
    remember,
    remove,
    text_sha256,
    user_cache,
)
from models.notices import say
from models.packaged import fetched

SUFFIX = ".gguf"
CONVERTER = "models.checkpoints.dequantise"
"""The module that reads a file in a process of its own, and decides what the directory holds."""
SLOWEST = 250_000
"""Bytes of a file that are dequantised in a second on a slow and busy machine."""


def local_directory(model: str | Path) -> Path | None:
    """The directory of a model on this machine; None where `model` is neither a path of one nor
    the name of a packaged model (`models.packaged`).

    A GGUF file is dequantised the first time: seconds to minutes, in a process of its own.

    Raises:
        UserError: as `gguf_file` and `dequantised`.
    """
    if file := gguf_file(model):
        return dequantised(file)
    directory = fetched(str(model)) or Path(model).expanduser()
    return directory if directory.is_dir() else None


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that `model` names, by itself or as the only one in a directory, else None.

    A directory with safetensors weights is one of transformers', whatever else it holds.

    Raises:
        UserError: there is no such file, it is not one, a directory holds several, or a packaged
            model is not fetched yet.
    """
    path = fetched(str(model)) or Path(model).expanduser()
    if path.is_dir():
        held = {file.name for file in path.iterdir()}
        found = sorted(name for name in held if name.lower().endswith(SUFFIX))
        if not found or held & {WEIGHTS, INDEX}:
            return None
        if len(found) > 1:
            raise _several(path, found)
        path /= found[0]
    elif path.suffix.lower() != SUFFIX:
        return None
    _check_magic(path)
    return path


def place_of(file: Path) -> Path:
    """The directory for a GGUF file's dequantised model, whether or not it is made.

    It has the file's name, or that of the first file with this content.
    """
    code = Path(__file__).with_name("dequantise.py").read_bytes()
    facts = (content(file), bytes_sha256(code), version("transformers"), version("gguf"))
    folder = user_cache() / "gguf" / text_sha256(" ".join(facts))[:32]
    made = [p.parent for p in folder.glob("*/config.json") if not p.parent.name.startswith(".")]
    return made[0] if made else folder / (file.stem.strip(".") or "model")


def dequantised(file: Path) -> Path:
    """The directory for a GGUF file's model, made the first time.

    Raises:
        UserError: transformers cannot read the file exactly, it is not whole, it has no chat
            template, or disk or memory do not suffice.
    """
    from filelock import FileLock

    place = place_of(file)
    if place.is_dir():
        return place
    folder = place.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the dequantised model cannot be kept: {error.strerror}",
            where=str(folder),
            fix="set XDG_CACHE_HOME to a folder that can be written to",
        ) from None
    with FileLock(folder / ".lock"):
        if not (place := place_of(file)).is_dir():
            _convert(file, place)
    return place


def _convert(file: Path, place: Path) -> None:
    for left in place.parent.glob(".*/"):  # of a killed process
        remove(left)
    say(f"{file.name} is dequantised, once, into {place}")
    wall = WALL_SECONDS + file.stat().st_size // SLOWEST
    ended = ask(CONVERTER, {"file": str(file.resolve()), "to": str(place)}, wall)
    if ended.reason:
        raise UserError(f"{ended.step} {ended.reason}", where=f"GGUF file {file}")
    if error := ended.error:
        raise UserError(
            error.what,
            where=error.where.replace(str(file.resolve()), str(file)),
            expected=error.expected,
            fix=error.fix,
        )


def content(file: Path) -> str:
    """sha256 (hex) of a file, found once for each (path, size, time of change)."""
    status = file.stat()
    return _content(file.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _content(file: Path, size: int, changed: int) -> str:
    memory, key = user_cache() / "sha256", text_sha256(f"{file}:{size}:{changed}")
    if not (found := recall(memory, key)):
        found = file_sha256(file)
        remember(memory, key, found)
    return found


def _check_magic(file: Path) -> None:
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would never answer
            raise UserError("is no file", where=f"GGUF file {file}")
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=f"GGUF file {file}") from None
    if magic != b"GGUF":
        raise UserError("is not a GGUF file", where=str(file), fix="fetch it again")


def _several(directory: Path, names: list[str]) -> UserError:
    return UserError(
        f"holds {len(names)} GGUF files: {', '.join(names[:4])}{', …' if names[4:] else ''}",
        where=f"model directory {directory}",
        expected="one model in one file",
        fix=f"name the file, as in {directory / names[0]}; join parts of a split model with "
        "llama-gguf-split --merge",
    )
