"""Runs hostile inputs, each in a child of this process, which has imported everything once.

    python tests/hostile/warm.py DATABASE FOLDER RESULTS

DATABASE is an empty migrated mlflow.db; FOLDER is where the children work. RESULTS gets a JSON
object: a case's name → how it ended.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
AT_ONCE = 2
MEMORY = 1 << 30
"""Bytes that a child may take beyond what it shares with this process."""
CPU_SECONDS = 60
WALL_SECONDS = 240
"""For a machine on which everything else wants to run as well."""


def main(database: Path, place: Path, results: Path) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warm()
    from hostile import tables

    waiting = list(tables.CASES)
    running: dict[int, tuple[Any, Path, float]] = {}
    done: dict[str, Any] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            case = waiting.pop(0)
            folder = Path(tempfile.mkdtemp(dir=place))
            shutil.copy(database, folder / "mlflow.db")
            running[begin(case, folder)] = (case, folder, time.monotonic())
        for pid, (case, folder, started) in list(running.items()):
            ended, status, used = os.wait4(pid, os.WNOHANG)
            late = time.monotonic() - started > WALL_SECONDS
            if late and not ended:
                os.killpg(pid, signal.SIGKILL)
                ended, status, used = os.wait4(pid, 0)
            if ended:
                del running[pid]
                done[case.name] = found(folder, status, used, late)
                shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.005)
    results.write_text(json.dumps(done, indent=1), "utf-8", "backslashreplace")


def warm() -> None:
    """Import what the commands do, and make what a first call makes."""
    import importlib

    import flows

    for module in pkgutil.walk_packages(flows.__path__, "flows."):
        importlib.import_module(module.name)
    from flows.experiment import record_of
    from flows.settings import load_settings

    load_settings("planted")
    record_of("nothing")
    import datasets  # noqa: F401
    import mlflow  # noqa: F401
    import transformers  # noqa: F401

    gc.freeze()  # no child looks through all that for garbage, nor copies it


def begin(case: Any, folder: Path) -> int:
    """Start a child; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["STAPLE_HOME"] = str(folder / ".staple")
        os.environ.update(case.env)
        for name, content in case.files.items():
            make(Path(name), content)
        before = peak()
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(handle, number)
        limit(resource.RLIMIT_AS, virtual() + MEMORY)
        limit(resource.RLIMIT_CPU, CPU_SECONDS)
        code = run(case)
        Path("growth").write_text(str(max(peak() - before, 0)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(case: Any) -> int:
    """The exit code of a command, or of a call as the command line would end it."""
    from flows.commands import cli

    if case.call:
        call = case.call
        cli.app = lambda **_: call() and None  # type: ignore[assignment]
    sys.argv = ["staple", *case.argv]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def make(path: Path, content: Any) -> None:
    if callable(content):
        content(path)
    elif isinstance(content, str):
        path.write_text(content, "utf-8", "surrogatepass")
    else:
        path.write_bytes(content)


def found(folder: Path, status: int, used: Any, late: bool) -> dict[str, Any]:
    def read(name: str) -> str:
        file = folder / name
        return file.read_bytes()[:200_000].decode("utf-8", "replace") if file.exists() else ""

    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": read("stdout"),
        "err": read("stderr"),
        "late": late,
        "growth": int(read("growth") or 0),
        "seconds": used.ru_utime + used.ru_stime,
    }


def limit(what: int, most: int) -> None:
    resource.setrlimit(what, (most, most))


def peak() -> int:
    """Bytes in memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def virtual() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
