"""What a hostile input is: a command line or a call, the files that it finds, how it must end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "s3cr3t"
"""A password that stands in some inputs and in no output."""
Content = bytes | str | Callable[[Path], None]
"""A file's bytes or text, or a function that makes it at a path."""


@dataclass(frozen=True)
class Case:
    """One input, run in a process of its own within limits of time and memory."""

    name: str
    argv: tuple[str, ...] = ()
    """Of `staple`."""
    call: Callable[[], Any] | None = None
    """What is called in place of a command."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """Made in the working directory first."""
    env: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    """A part of the message."""
    code: int = 2
    """The exit code: 0 where nothing is wrong with the input."""


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def sparse(size: int, head: bytes = b"") -> Callable[[Path], None]:
    """A file of which only the head is on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return make


def laughs(levels: int = 9) -> str:
    """Anchors a, b, …, each a list of nine of the one before it: 9 ** levels values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for one, other in zip("abcdefghijkl"[:levels], "bcdefghijklm", strict=False):
        lines.append(f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]")
    return "\n".join(lines) + "\n"


def row(**values: Any) -> str:
    return json.dumps(values) + "\n"


ODD_NAMES = {
    "nothing": "",
    "a blank": " ",
    "a dot": ".",
    "up": "..",
    "above": "../x",
    "absolute": "/etc/passwd",
    "two words": "a b",
    "101 letters": "x" * 101,
    "5,000 letters": "x" * 5_000,
    "100,000 letters": "x" * 100_000,
    "an accent": "é",
    "a power": "²",
    "turned round": "a\u202egnp.exe",
    "red": "\x1b[31mred",
    "a title": "\x1b]0;owned\x07",
    "one byte CSI": "\x9b31m",
    "half a character": "\udcff",
    "two lines": "a\nb",
    "markup": "a[/green]",
    "bold": "[bold]x[/bold]",
    "a link": "[link=file:///etc]x[/link]",
    "a quote": "a'; drop table experiments; --",
    "braces": "{0}{source}",
    "percent": "%s%n",
    "an address": f"http://user:{SECRET}@host/",
    "a return": "good\rbad",
    "a tab": "a\tb",
    "no width": "a\u200bb",
}
"""Names that no experiment, preset or file has."""
