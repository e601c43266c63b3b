"""README, CONTRIBUTING and docs/ as data: their links, fences, code words and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "docker" / "README.md"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def tokens(page: Path) -> list[Token]:
    """The page's tokens, those within a line after its own."""
    found = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    return [inner for token in found for inner in (token, *(token.children or ()))]


def fences(page: Path, *languages: str) -> Iterator[str]:
    for token in tokens(page):
        if token.type == "fence" and token.info in languages:
            yield token.content


def codes(page: Path) -> Iterator[str]:
    yield from (token.content for token in tokens(page) if token.type == "code_inline")


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every link and image that stays in the repository."""
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if target and not re.match(r"[a-z]+:", target):
            yield (parts := target.partition("#"))[0], parts[2]


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    found = tokens(page)
    texts = [found[i + 1].content for i, t in enumerate(found) if t.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@dataclass(frozen=True)
class Command:
    """A line of a page that starts `staple`."""

    page: Path
    words: tuple[str, ...]
    written: bool
    """It stands in a block, to be run as it is; else a sentence names it."""

    def __str__(self) -> str:
        return f"{name(self.page)}: {shlex.join(self.words)}"


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command of the page: those in fences, and the output's `$ command`."""
    for text in fences(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)
    for text in fences(page, "text"):
        yield from (shlex.split(line[2:]) for line in text.splitlines() if line[:2] == "$ ")


def commands(page: Path) -> Iterator[Command]:
    quoted = (shlex.split(code) for code in codes(page) if re.match(r"staple \w", code))
    for lines, written in ((shell_lines(page), True), (quoted, False)):
        for words in lines:
            if words and words[0].rpartition("/")[2] == "staple":
                yield Command(page, tuple(words[1:]), written)


COMMANDS = list(dict.fromkeys(command for page in ALL for command in commands(page)))
