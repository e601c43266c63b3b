"""One of several training processes: `accelerate launch … -m models.training.worker FOLDER PARENT`.

`models/training/job.py` starts it. The first process prints a line after each step, and writes the
adapter and the curve. An error is written into the job's folder, where `job.py` reads it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import astuple
from pathlib import Path

from constitutions.errors import UserError


def main() -> None:
    """Take part in the training that a job's folder describes."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", "0"))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        _take_part(folder, first=rank == 0)
    except UserError as error:
        _leave(folder, rank, what=error.what, expected=error.expected, fix=error.fix)
    except Exception as error:
        traceback.print_exc()
        _leave(folder, rank, what=f"training failed: {type(error).__name__}: {error}")


def _take_part(folder: Path, *, first: bool) -> None:
    from models.training.job import STEP, fit, read_job

    job, examples = read_job(folder)

    def report(steps: int) -> None:
        print(STEP, steps, flush=True)

    curve = fit(job, examples, report if first else None, write=first)
    if first:
        (folder / "curve.json").write_text(json.dumps([astuple(step) for step in curve]), "utf-8")


def _leave(folder: Path, rank: int, **error: str) -> None:
    """Write the error and end; torchrun then ends the processes that wait for this one."""
    (folder / f"error-{rank}.json").write_text(json.dumps(error), "utf-8")
    os._exit(1)


def _end_with(parent: int) -> None:
    """End when the parent has ended: a training must not run beside one that resumes it."""
    while True:
        time.sleep(0.5)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


if __name__ == "__main__":
    main()
