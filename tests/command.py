"""Run `staple` in this process, as its entry point does; read the pages that it writes."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def staple(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Exit code, standard output and standard error; an unexpected exception goes through."""
    from flows.commands.cli import main

    before, sys.argv = sys.argv, ["staple", *arguments]
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)


def words(page: str) -> str:
    """What a reader of a page sees, as one line."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
