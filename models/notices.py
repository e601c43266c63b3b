"""One line for whoever watches; `tasks.record.progress` shows how far a stage is."""

from __future__ import annotations

import sys

from constitutions.untrusted import clean


def say(line: str) -> None:
    """One line for whoever watches: on standard error, and in the log of the Prefect run."""
    line = clean(line)
    print(line, file=sys.stderr, flush=True)
    if "prefect" in sys.modules:
        from prefect.context import FlowRunContext, TaskRunContext
        from prefect.logging import get_run_logger

        if FlowRunContext.get() or TaskRunContext.get():
            get_run_logger().info(line)
