"""The program `staple`: it runs the command line in a child process, and ends it at a signal.

A signal must take effect within seconds, but a library in a long computation does not react to one.
So the process that the shell started only waits. At a signal it interrupts the child, waits
`GRACE_SECONDS` (a server notes more) for an orderly end, then kills the child and its descendants,
and says what is kept.
It imports almost nothing, so that it handles signals from the start.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from models.lifetime import end_with
from tasks.record import interruption

if TYPE_CHECKING:
    import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 3.0
"""How long the child may take to close its record and report to its server."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived: libraries treat it like Ctrl-C."""


def main() -> None:
    """Entry point of `staple`: the exit code is the command's, or 128 + the signal's number."""
    sys.exit(watched(_command_line))


def _command_line() -> None:
    from flows.commands.cli import main as command_line

    command_line()


def watched(work: Callable[[], None]) -> int:
    """Run `work` in a child; this process's exit code."""
    stops: list[int] = []
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the parent may have ignored it
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)  # until both processes have their handlers
    child = os.fork()
    if child == 0:
        _handle(handled)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        end_with(parent)
        _work(work)
    for number in handled:
        signal.signal(number, lambda number, _: _stop(stops, number))
    with suppress(_FirstSignal):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        return _exit_code(os.waitpid(child, 0)[1])
    return _end(child, stops)


class _FirstSignal(BaseException):
    """The first signal has arrived."""


def _stop(stops: list[int], number: int) -> None:
    stops.append(number)
    if len(stops) == 1:
        raise _FirstSignal


def _end(child: int, stops: list[int]) -> int:
    """End the child and its descendants, and print what is kept; the exit code."""
    deadline = time.monotonic() + float(interruption.noted().get("grace", GRACE_SECONDS))
    family = _family(child)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)  # a terminal sent it already: the child ignores the second
    status, again = None, time.monotonic() + 0.3
    while status is None and time.monotonic() < deadline:
        if len(stops) > 1 and time.monotonic() > again:  # a second Ctrl-C
            break
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
        time.sleep(0.02)
    if status is None:
        family |= _family(child)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _kill(family)
    if status is not None and _exit_code(status) == 0:
        return 0  # it finished at that moment
    resume = interruption.noted().get("command") or shlex.join(["staple", *sys.argv[1:]])
    _say(interruption.kept(), resume)
    return 128 + stops[0]


def _say(what: str, command: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        show_cursor = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{show_cursor}staple: stopped: {what}; continue with: {command}", file=sys.stderr)


def _family(child: int) -> set[psutil.Process]:
    """The child's descendants."""
    import psutil

    try:
        return set(psutil.Process(child).children(recursive=True))
    except psutil.Error:
        return set()


def _kill(processes: set[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=1)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# The child ---------------------------------------------------------------------------------


def _handle(handled: Sequence[int]) -> None:
    """Let the first signal interrupt this process; ignore later ones while it closes its record."""
    stopped = list[int]()

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            return
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # interrupted libraries print tracebacks
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    for number in handled:
        signal.signal(number, stop)


def _work(work: Callable[[], None]) -> NoReturn:
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


if __name__ == "__main__":
    main()
