"""Reads foreign files in a child process with limits of processor time and memory.

`ask` starts `python -m MODULE PARENT`, whose `main` calls `serve`. A template that loops, a
tokenizer that fills the memory or a file that crashes a parser ends only the child; `ask` returns
the reason.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from constitutions.errors import UserError
from models.lifetime import end_with

ROOT = Path(__file__).parents[2]
DATA_BYTES = 1600 << 20
"""Most data memory of a child, which with its libraries' code stays below 2 GB."""
WALL_SECONDS = 600
"""Most seconds that a child may run: processor time is the limit on a machine that is not busy."""


class Step(Protocol):
    """Called before everything that may take long."""

    def __call__(self, name: str, seconds: int, memory: int = DATA_BYTES, /) -> None:
        """Say what is done next, and how many seconds of processor time and bytes it may take."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: with an `answer`, with an `error`, or within a `step` for a `reason`."""

    answer: Any = None
    error: UserError | None = None
    step: str = ""
    reason: str = ""


def ask(module: str, request: Any, wall: float = WALL_SECONDS) -> Ended:
    """A child's answer to a request; the child uses no GPU and no hub, and ends with this process.

    Args:
        module: its `main` calls `serve`.
        request: a JSON value.
        wall: most seconds that it may run.
    """
    kept = {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, str(os.getpid())],
            cwd=ROOT,
            env={**os.environ, **kept},
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=wall,
        )
    except subprocess.TimeoutExpired as late:
        return Ended(step=_read(late.stdout)[0], reason=f"takes more than {wall:,.0f} s")
    step, seconds, memory, last = _read(done.stdout)
    if "answer" in last:
        return Ended(last["answer"])
    if "error" in last:
        return Ended(error=UserError(**last["error"]))
    if done.returncode == -signal.SIGXCPU:
        return Ended(step=step, reason=f"takes more than {seconds} s of processor time")
    if "memory" in last or done.returncode in (-signal.SIGABRT, -signal.SIGKILL):
        return Ended(step=step, reason=f"takes more than {memory >> 20:,} MiB of memory")
    crash = last.get("crash") or f"the process ends by signal {-done.returncode}"
    return Ended(step=step, reason=f"fails: {crash}")


def _read(output: bytes | None) -> tuple[str, int, int, dict[str, Any]]:
    """The last step that a child began, its limits (seconds, bytes), and the child's last line."""
    lines = [
        json.loads(line) for line in (output or b"").splitlines(keepends=True) if line[-1:] == b"\n"
    ]
    steps = [line for line in lines if "step" in line] or [
        {"step": "starting a process", "seconds": 0, "memory": DATA_BYTES}
    ]
    step = steps[-1]
    return step["step"], step["seconds"], step["memory"], lines[-1] if lines else {}


def serve(work: Callable[[Any, Step], Any]) -> None:
    """In the child: answer the request on standard input, within the limits, and exit.

    Args:
        work: (request, step) to the answer; it calls `step` before everything that may take long,
            and raises `UserError` for what is wrong with the files.
    """
    end_with(int(sys.argv[1]))
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on standard error
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    _limit(resource.RLIMIT_DATA, DATA_BYTES, most)

    def say(**what: Any) -> None:
        output.write(json.dumps(what) + "\n")
        output.flush()

    def step(name: str, seconds: int, memory: int = DATA_BYTES) -> None:
        say(step=name, seconds=seconds, memory=memory)
        _limit(resource.RLIMIT_DATA, memory, most)
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))

    try:
        answer = work(json.load(sys.stdin), step)
    except UserError as error:
        say(error={part: getattr(error, part) for part in ("what", "where", "expected", "fix")})
    except MemoryError:
        say(memory=True)
    except Exception as error:
        say(crash=f"{type(error).__name__}: {error}"[:300])
    else:
        say(answer=answer)
    output.flush()
    os._exit(0)  # a library's threads may not end by themselves


def _limit(kind: int, soft: int, hard: int) -> None:
    """Set a soft limit, below the hard one that this process was started with."""
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
