"""Reads the files of a model directory without torch; their contents are not trusted.

`models.checkpoints.check` compares them with the architecture. Links to files may lead out of the
directory (the hub's cache consists of them). Only small files are read whole.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constitutions.errors import UserError
from constitutions.parse import RepeatedKeyError, unique_keys

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
LARGEST = {"config.json": 16 << 20, "tokenizer.json": 256 << 20, INDEX: 64 << 20}
SMALL = 64 << 20
"""Most bytes of any other file that is read whole."""
LONGEST_HEADER = 32 << 20
"""Most bytes of a header: 100,000 tensors take about ten million."""
READ_WHOLE = (".json", ".jinja", ".txt", ".model")
"""Suffixes of the files that are read whole."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's entry in a safetensors header."""

    kind: str
    """The type of its numbers, as safetensors names it."""
    shape: tuple[int, ...]
    file: str
    """The name of the file that holds it."""


def check_listing(directory: Path) -> None:
    """Check that a directory has the files from which transformers loads a model.

    Raises:
        UserError: a file is missing, is not a regular file, or is too large.
    """
    for file in _entries(directory):
        _check_file(file)
    names = {file.name for file in directory.iterdir()}
    if WEIGHTS not in names and INDEX not in names:
        raise _no_weights(directory, names)
    needs = {"config.json": ["config.json"], "a tokenizer": TOKENIZERS}
    missing = [what for what, any_of in needs.items() if names.isdisjoint(any_of)]
    if missing:
        raise UserError(
            f"lacks {' and '.join(missing)}",
            where=f"model directory {directory}",
            expected="a directory as `save_pretrained` writes it, tokenizer included",
        )


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is not JSON, is nested too deeply, or holds no object.
    """
    _check_file(file)
    try:
        found = json.loads(file.read_bytes())
    except RecursionError:
        raise UserError("is nested too deeply to be read", where=str(file)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(file)) from None
    if not isinstance(found, dict):
        raise UserError(
            f"holds {_kind(found)}", where=str(file), expected="an object: {…} with names"
        )
    return found


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a model directory by name, from every header that transformers reads.

    Raises:
        UserError: a header or the index is malformed, a shard is missing or incomplete, or the
            index and the shards disagree.
    """
    if (directory / WEIGHTS).exists():
        return read_header(directory / WEIGHTS)
    index = directory / INDEX
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError("names no tensors", where=str(index), expected="a 'weight_map'")
    for shard in places.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _leads_away(shard):
            raise UserError(
                f"names {str(shard)[:80]!r} as a file of weights",
                where=str(index),
                expected="names of .safetensors files beside it",
            )
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (directory / shard).exists():
            raise UserError(
                f"the shard {shard} is missing", where=str(index), fix="fetch the model again"
            )
        for name, tensor in read_header(directory / shard).items():
            if name in found:
                raise UserError(
                    f"the tensor {name} stands in {found[name].file} and in {shard}",
                    where=str(directory),
                )
            found[name] = tensor
    for name, shard in places.items():
        if name not in found or found[name].file != shard:
            raise UserError(f"{shard} has no tensor {name}", where=str(index))
    return found


def shards_there(directory: Path) -> bool:
    """Whether all files of weights that the directory's index names exist.

    Raises:
        UserError: the index cannot be read.
    """
    if (directory / WEIGHTS).exists():
        return True
    places = read_object(directory / INDEX).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    return all((directory / name).exists() for name in names)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        UserError: the header is malformed, names a tensor twice, or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    _check_file(file)
    try:
        if (size := _header_size(file)) > LONGEST_HEADER:
            raise SafetensorError(f"its header has {size:,} bytes, more than {LONGEST_HEADER:,}")
        with safe_open(file, framework="numpy"):  # checks all but repeated names
            header = json.loads(_header(file), object_pairs_hook=unique_keys)
    except (SafetensorError, RepeatedKeyError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")[:300]
        raise UserError(
            f"is not a whole safetensors file: {reason}", where=str(file), fix="fetch it again"
        ) from None
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), file.name)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def digest_parts(directory: Path) -> Iterator[bytes]:
    """The bytes on which a check depends: names, sizes, small files, headers of weights."""
    for file in _entries(directory):
        size = file.stat().st_size
        yield f"\n{file.relative_to(directory)}:{size}\n".encode()
        if file.suffix == ".safetensors":
            yield _header(file)
        elif file.suffix in READ_WHOLE:
            yield file.read_bytes()


def _entries(directory: Path) -> list[Path]:
    """The files that transformers may read, additional templates included, sorted."""
    more = directory / "additional_chat_templates"
    entries = [*directory.iterdir(), *(more.iterdir() if more.is_dir() else ())]
    return sorted(path for path in entries if not path.is_dir())


def _check_file(file: Path) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is a pipe or a device", where=str(file), expected="a regular file")
    if not os.access(file, os.R_OK):
        raise UserError("cannot be read: permission denied", where=str(file))
    limit = LARGEST.get(file.name, SMALL)
    if file.suffix in READ_WHOLE and status.st_size > limit:
        raise UserError(
            f"has {status.st_size >> 20:,} MiB", where=str(file), expected=f"{limit >> 20} at most"
        )


def _no_weights(directory: Path, names: set[str]) -> UserError:
    """The error for a directory without model.safetensors: it says what is there instead."""
    suffixes = {Path(name).suffix for name in names}
    other = next((name for name in sorted(names) if name.endswith(".safetensors")), "")
    what, fix = "lacks safetensors weights", ""
    if "adapter_config.json" in names:
        what = "holds an adapter, not a model"
        fix = "merge it into its base (peft: merge_and_unload, save_pretrained)"
    elif suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        what += ": pickled weights (.bin, .pt) are not loaded"
        fix = "take the model's safetensors version, or convert it where you trust the file"
    elif other:
        what += f" (there is {other}, which no index names)"
    expected = "a directory as `save_pretrained` writes it, with model.safetensors"
    return UserError(what, where=f"model directory {directory}", expected=expected, fix=fix)


def _header_size(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(8 + min(_header_size(file), LONGEST_HEADER))[8:]


def _leads_away(name: str) -> bool:
    return name != Path(name).name or name.startswith(".")


def _kind(found: Any) -> str:
    names = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(found), "a number" if isinstance(found, int | float) else "something")
