"""All hostile inputs, by kind."""

from __future__ import annotations

from hostile import command_line, constitutions, data, settings
from hostile.cases import Case

KINDS: dict[str, list[Case]] = {
    "command line": command_line.CASES,
    "settings": settings.CASES,
    "constitutions": constitutions.CASES,
    "data": data.CASES,
}
CASES = [case for cases in KINDS.values() for case in cases]
