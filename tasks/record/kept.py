"""What would be kept if the program were stopped now, and how it goes on, in words.

It stands in memory that a child shares with the process that started it:
`flows/commands/program.py` can tell it although the child that computes hears nothing, or is dead.
"""

from __future__ import annotations

import json
import mmap
from typing import Any

_page = mmap.mmap(-1, 4096)
_facts: dict[str, Any] = {}


def tell(**facts: str) -> None:
    """Note what holds from now on.

    Args:
        facts: `command`, what to type to go on; `stage`, the one that is under way, such as
            "mine 1"; `parts`, what of it is finished, such as "3 of 8 shards"; `all`, what there
            is to say where no stage is. "" forgets one.
    """
    _facts.update(facts)
    text = json.dumps(_facts).encode()
    if len(text) < len(_page):
        _page[: len(text) + 1] = text + b"\0"


def told() -> dict[str, str]:
    """What was told last, by this process or the one that shares its memory."""
    text = _page[:].partition(b"\0")[0]
    try:
        return dict(json.loads(text)) if text else {}
    except ValueError:  # it was being written
        return {}


def words() -> str:
    """ "3 of 8 shards of mine 1 are kept"."""
    facts = told()
    stage, parts = facts.get("stage"), facts.get("parts")
    if stage and parts:
        return f"{parts} of {stage} are kept"
    if stage:
        return f"what was finished before {stage} is kept"
    return facts.get("all") or "what was finished is kept"
