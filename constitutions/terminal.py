"""The two consoles of the command line, which print foreign text as plain text.

`Clean.render`, through which all output passes, removes terminal controls and passwords. A string
is never read as markup; `rich.text.Text` gives colours.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from constitutions.untrusted import clean, hide_passwords


class Clean(Console):
    """A console that reads no markup or emoji codes in strings and prints clean segments."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of what is printed, cleaned; rich's own controls stay."""
        if isinstance(renderable, Text) and ":/" in renderable.plain:
            renderable = renderable.copy()
            renderable.plain = hide_passwords(renderable.plain)  # before the address is wrapped
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(clean(segment.text), segment.style)

    def render_str(self, text: str, **how: Any) -> Text:
        """A string as it is printed, without passwords."""
        return super().render_str(hide_passwords(text), **how)


console = Clean()
errors = Clean(stderr=True)


def clean_logs() -> None:
    """Clean the warnings and logs of libraries in this process, which quote paths and replies."""
    warnings.formatwarning = _clean_warning
    logging.setLogRecordFactory(_clean_record)


_warning, _record = warnings.formatwarning, logging.getLogRecordFactory()


def _clean_warning(*args: Any, **how: Any) -> str:
    return clean(_warning(*args, **how))


def _clean_record(*args: Any, **how: Any) -> logging.LogRecord:
    record: logging.LogRecord = _record(*args, **how)
    if isinstance(record.msg, str):
        record.msg = clean(record.msg)
    if isinstance(record.args, tuple):
        record.args = tuple(clean(str(a)) if isinstance(a, QUOTED) else a for a in record.args)
    return record


QUOTED = (str, os.PathLike, BaseException)
"""Types of a log line's arguments that are cleaned; numbers keep their types."""


def say(line: str) -> None:
    """Print a line without wrapping or colouring it."""
    console.print(line, soft_wrap=True, highlight=False)


def fail(message: str) -> None:
    """Print an error on standard error."""
    errors.print(Text.assemble(("staple: ", "bold red"), hide_passwords(message)), soft_wrap=True)
