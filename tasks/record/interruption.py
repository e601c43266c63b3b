"""What is kept if the program is stopped now, and the command that resumes it.

The process that computes notes it in memory that it shares with the process that started it, so
that `flows/commands/program.py` can say it even when the child is dead.
"""

from __future__ import annotations

import json
import mmap

_page = mmap.mmap(-1, 4096)
_facts: dict[str, str] = {}


def note(**facts: str) -> None:
    """Note what holds from now on; an empty text deletes a fact.

    Args:
        facts: `command`, which resumes the work; `stage`, the one that runs, such as "mine 1";
            `parts`, what of it is finished, such as "3 of 8 shards"; `all`, what there is to say
            while no stage runs; `grace`, the seconds that an orderly end may take; `log`, the file
            with the log of the run.
    """
    _facts.update(facts)
    text = json.dumps(_facts).encode()
    if len(text) < len(_page):
        _page[: len(text) + 1] = text + b"\0"


def noted() -> dict[str, str]:
    """What this process, or one that shares its memory, noted last."""
    text = _page[:].partition(b"\0")[0]
    try:
        return dict(json.loads(text)) if text else {}
    except ValueError:  # another process was writing it
        return {}


def kept() -> str:
    """ "3 of 8 shards of mine 1 are kept"."""
    facts = noted()
    stage, parts = facts.get("stage"), facts.get("parts")
    if stage and parts:
        return f"{parts} of {stage} are kept"
    if stage:
        return f"what was finished before {stage} is kept"
    return facts.get("all") or "what was finished is kept"
