"""Prints one-line messages for a person; `tasks.record.progress` shows a stage's progress."""

from __future__ import annotations

import sys

from constitutions.untrusted import clean


def say(line: str) -> None:
    """Print a line on standard error, and log it in the Prefect run if there is one."""
    line = clean(line)
    print(line, file=sys.stderr, flush=True)
    if "prefect" in sys.modules:
        from prefect.context import FlowRunContext, TaskRunContext
        from prefect.logging import get_run_logger

        if FlowRunContext.get() or TaskRunContext.get():
            get_run_logger().info(line)
