"""The log file of a run: what a person was told, and what libraries warned about."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version

from constitutions.untrusted import clean
from flows.experiment import home
from models.notices import LOG
from tasks.record import interruption

FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PREFECT = ("prefect.flow_runs", "prefect.task_runs")
"""Prefect's copies of what is logged here already."""


class _Clean(logging.Formatter):
    """Tracebacks quote what libraries say, which may be an address with a password."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`; cleaned as a whole."""
        return clean(super().format(record))


class _File(logging.FileHandler):
    """A log that cannot be written, on a full disk say, stops nothing and says nothing."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leave the record out."""


@contextmanager
def logged(experiment: str) -> Iterator[None]:
    """Keep a log below the home while the block runs; an error is logged with its traceback.

    What notes an error for the user names the file: see `tasks.record.interruption`.
    """
    folder = home() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}.log"
    file = _File(path, encoding="utf-8")
    file.setFormatter(_Clean(FORM))
    file.addFilter(lambda record: not record.name.startswith(PREFECT))
    loggers = (LOG, logging.getLogger())
    for logger in loggers:
        logger.addHandler(file)
    interruption.note(log=str(path))
    LOG.info("staple %s: %s", version("staple-em"), shlex.join(sys.argv))
    try:
        yield
        interruption.note(log="")
    except BaseException:
        LOG.exception("the run ended with this error")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(file)
        file.close()
