"""Who computes what, and who holds the device: a second process waits, and is told for whom.

The locks are the system's file locks: they end with the process that holds them, however it ended.
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
    """Hold the lock file `path`; while another process has it, say who does what, and wait."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {_told(holder)}")
        lock.acquire()
    try:
        if holder.is_dir():  # nobody else's business: the lock is ours
            remove(holder)
        write_text(holder, json.dumps({"pid": os.getpid(), "what": what, "since": time.time()}))
        yield
        holder.unlink(missing_ok=True)
    finally:
        lock.release()


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

    Args:
        name: "cpu" needs no lock; "cuda", or "auto" where there is an NVIDIA device, does.
    """
    present = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    if name == "cpu" or (name == "auto" and not present):
        yield
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(present))
    folder = private.device_locks()
    with ExitStack() as locks:
        for number in sorted(visible.split(",")):  # one order for all: nobody waits in a circle
            locks.enter_context(held(folder / f"device-{number.strip()}.lock", what))
        yield


def place(home: Path) -> str:
    """This machine and its folder: attempts of one place share its file locks."""
    return f"{platform.node()}:{home.resolve()}"


@contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` every HEARTBEAT_SECONDS from a thread: other machines see that we live."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # the record may be away for a while; the work goes on
                beat()

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1)  # a beat may hang on a record that is away


def _told(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_bytes())
        seconds = max(time.time() - facts["since"], 0)
        return f"process {facts['pid']}: {facts['what']} (for {seconds:,.0f} s)"
    except UNREADABLE:  # not written yet, or damaged
        return "another process"
