"""File locks: one process computes a thing or uses a device; the next waits, and says for whom.

They are the system's: a lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from models.files import UNREADABLE, remove, write_text
from tasks.record import private
from tasks.record.progress import say

HEARTBEAT_SECONDS = 10.0
BEATS_MISSED = 6
"""So many heartbeats late, by this machine's clock, another machine's process looks dead."""


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; while another process holds it, say what that one does, and wait.

    Args:
        what: this process does, for the message of the next one.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(path), _note(path)
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {holder(path)}")
        acquired = lock.acquire()
    with acquired:
        remove(note)  # a killed process may have left one
        write_text(note, json.dumps({"pid": os.getpid(), "what": what, "since": time.time()}))
        yield
        note.unlink(missing_ok=True)


def holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        facts = json.loads(_note(path).read_bytes())
        seconds = max(time.time() - facts["since"], 0)
        return f"process {facts['pid']}: {facts['what']} (for {seconds:,.0f} s)"
    except UNREADABLE:  # not written yet, or damaged
        return "another process"


def _note(path: Path) -> Path:
    return path.with_suffix(".holder")


def is_held(path: Path) -> bool:
    """Whether a living process of this machine holds the lock."""
    from filelock import FileLock, Timeout

    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def device(name: str, what: str) -> Iterator[None]:
    """Hold the visible accelerators: one policy of this user's in their memory at a time.

    Another user's processes have locks of their own. People who share a device agree on it
    themselves, or by the machine's scheduler: a file that all could lock, all could spoil.

    Args:
        name: "cpu" needs no lock; "cuda", or "auto" where there is an NVIDIA device, does.

    Raises:
        UserError: the folder of the locks cannot be used.
    """
    present = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    if name == "cpu" or (name == "auto" and not present):
        yield
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(present))
    folder = private.folder(Path.home() / ".cache" / "staple" / "locks" / platform.node())
    with ExitStack() as locks:
        for number in sorted(visible.split(",")):  # in the same order everywhere: no deadlock
            locks.enter_context(held(folder / f"device-{number.strip()}.lock", what))
        yield


def place(home: Path) -> str:
    """This machine and its folder: attempts of one place share its file locks."""
    return f"{platform.node()}:{home.resolve()}"


@contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` every HEARTBEAT_SECONDS from a thread: other machines see this process live."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # the record may be away for a while; the work continues
                beat()

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1)  # a beat may hang on a record that is away
