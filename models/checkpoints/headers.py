"""A model directory's files as they lie on the disk, read without torch and without trust.

`models.checkpoints.check` holds what is found here against the architecture. Nothing is followed
out of the directory but links to files (the hub's cache is made of them), and nothing is read whole
but small files.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constitutions.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Of one number, by what safetensors calls its type."""
LARGEST = {"config.json": 16 << 20, "tokenizer.json": 256 << 20, INDEX: 64 << 20}
SMALL = 64 << 20
"""Bytes that any other file that is read whole may have."""
LONGEST_HEADER = 32 << 20
"""Bytes: a hundred thousand tensors in one file take about ten million."""
READ_WHOLE = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a safetensors header says of a tensor."""

    kind: str
    """Its type, as in `BITS`."""
    shape: tuple[int, ...]
    file: str


def check_listing(directory: Path) -> None:
    """See that a directory has what transformers loads a model from, as files.

    Raises:
        UserError: something is missing, no regular file, or too large to be what it is called.
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
    """A JSON file that holds an object.

    Raises:
        UserError: it cannot be read, is no JSON, too deep, or holds something else.
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
    """The tensors of a model directory, by name: every header that transformers would read.

    Raises:
        UserError: a header or the index is malformed, a shard is missing or cut, or the index and
            the shards disagree.
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
    """Whether all files of weights are there that the directory names."""
    if (directory / WEIGHTS).exists():
        return True
    places = read_object(directory / INDEX).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    return all((directory / name).exists() for name in names)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        UserError: the header is malformed, or is not the header of this file.
    """
    _check_file(file)
    header, rest = _header_bytes(file)
    try:
        told = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is no JSON ({_said(error)})") from None
    if not isinstance(told, dict):
        raise _damaged(file, f"its header holds {_kind(told)}")
    spans = []
    found = {}
    for name, entry in told.items():
        if name != "__metadata__":
            found[name], span = _tensor(file, name, entry)
            spans.append((*span, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise _damaged(file, f"the bytes of {name} begin at {begin:,}, not at {end:,}")
        end = stop
    if end != rest:
        raise _damaged(file, f"its header tells of {end:,} bytes of tensors; there are {rest:,}")
    return found


def digest_parts(directory: Path) -> Iterator[bytes]:
    """What a check of the directory depends on: names, sizes, small files, headers of weights."""
    for file in _entries(directory):
        size = file.stat().st_size
        yield f"\n{file.relative_to(directory)}:{size}\n".encode()
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                yield stream.read(min(length, LONGEST_HEADER))
        elif file.suffix in READ_WHOLE:
            yield file.read_bytes()


def _entries(directory: Path) -> list[Path]:
    """The files that transformers may look at, by name; folders it knows are looked into."""
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
    where = f"model directory {directory}"
    whole = "a directory as `save_pretrained` writes it, with model.safetensors"
    suffixes = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        return UserError(
            "holds an adapter, not a model",
            where=where,
            expected=whole,
            fix="merge it into its base (peft: merge_and_unload, save_pretrained)",
        )
    if ".gguf" in suffixes:
        return UserError(
            "holds a GGUF file, which is not supported yet",
            where=where,
            expected=whole,
            fix="convert it: from_pretrained(directory, gguf_file=…), then save_pretrained",
        )
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return UserError(
            "lacks safetensors weights: pickled weights (.bin, .pt) are not loaded",
            where=where,
            expected=whole,
            fix="take the model's safetensors version, or convert it where you trust the file",
        )
    other = next((name for name in sorted(names) if name.endswith(".safetensors")), "")
    return UserError(
        "lacks safetensors weights" + (f" (there is {other}, which no index names)" * bool(other)),
        where=where,
        expected=whole,
    )


def _header_bytes(file: Path) -> tuple[bytes, int]:
    """The header, and how many bytes follow it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(file, f"its header would have {length:,} bytes; the file has {size:,}")
        if length > LONGEST_HEADER:
            raise _damaged(file, f"its header has {length >> 20:,} MiB")
        return stream.read(length), size - 8 - length


def _tensor(file: Path, name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, span = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in BITS:
        raise _damaged(file, f"{name[:200]} has the type {str(kind)[:40]!r}")
    if not _sizes(shape) or not _sizes(span) or len(span) != 2:
        raise _damaged(file, f"{name[:200]} has no shape or no place in the file")
    begin, end = span
    if end - begin != math.ceil(math.prod(shape) * BITS[kind] / 8):
        raise _damaged(file, f"{name[:200]}: {end - begin:,} bytes are not {kind} {shape}")
    return Tensor(kind, tuple(shape), file.name), (begin, end)


def _sizes(found: Any) -> bool:
    whole = isinstance(found, list) and len(found) <= 16
    return whole and all(type(size) is int and 0 <= size < 1 << 63 for size in found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:200]!r} is named twice")
        found[name] = value
    return found


def _leads_away(name: str) -> bool:
    return name != Path(name).name or name.startswith(".")


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"is not a whole safetensors file: {what}", where=str(file), fix="fetch the file again"
    )


def _kind(found: Any) -> str:
    names = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(found), "a number" if isinstance(found, int | float) else "something")


def _said(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
