"""Prints and logs lines for a person; `tasks.record.progress` shows a stage's progress."""

from __future__ import annotations

import logging
import sys

from constitutions.untrusted import clean

LOG = logging.getLogger("staple")
"""What a person was told, for the log file of a run (`flows.commands.logs`)."""
LOG.setLevel(logging.INFO)
LOG.propagate = False


def say(line: str) -> None:
    """Print a line on standard error, and log it."""
    line = clean(line)
    print(line, file=sys.stderr, flush=True)
    log(line)


def log(line: str) -> None:
    """Log a line in the file of this run, and in the Prefect run, if there are such."""
    LOG.info("%s", line)
    if "prefect" in sys.modules:
        from prefect.context import FlowRunContext, TaskRunContext
        from prefect.logging import get_run_logger

        if FlowRunContext.get() or TaskRunContext.get():
            get_run_logger().info(line)
