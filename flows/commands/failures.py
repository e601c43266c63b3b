"""The cause of an unexpected error: damage, an unusable path, an outage, or a defect of staple."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from constitutions.errors import UserError

UNUSABLE = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
)
"""Errors of a path that the user can correct."""


def explained(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code: 2 if the user can correct it, 1 for an outage; None for a defect."""
    from tasks.record.database import damage_behind

    if damage := damage_behind(error):
        return str(damage), 2
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in UNUSABLE and cause.filename:
            refused = UserError(
                str(cause.strerror),
                where=os.fsdecode(cause.filename),
                expected="a path that this user can read and write",
                fix="change its permissions or move it away, then repeat the command",
            )
            return str(refused), 2
    for cause in _causes(error):
        if refused_login := _refused_login(cause):
            return str(refused_login), 2
        if outage := _outage(cause):
            return f"{outage}; finished work is kept: staple run EXPERIMENT --resume", 1
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refused_login(error: BaseException) -> UserError | None:
    library = type(error).__module__.partition(".")[0]
    if library == "mlflow" and getattr(error, "error_code", "") == "UNAUTHENTICATED":
        server, login = "MLflow", "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
    elif getattr(getattr(error, "response", None), "status_code", 0) == 401 and (
        library in ("httpx", "prefect")
    ):
        server, login = "Prefect's server", "PREFECT_API_AUTH_STRING"
    else:
        return None
    return UserError(
        f"{server} refuses the login",
        where=f"{login}, in the environment",
        expected="the login that the server was started with (of staple up: its services/login)",
        fix="set it; for the servers of staple up, unset it",
    )


def _outage(error: BaseException) -> str:
    """Which service or disk failed; "": none."""
    text, library = str(error), type(error).__module__.partition(".")[0]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "database or disk is full" in text:
        return "the disk is full; free some space"
    first_line = text.strip().partition("\n")[0][:200]
    if library in ("httpx", "httpcore") or "reach API at" in text:
        reason = first_line + _proxy("PREFECT_API_URL")
        return f"Prefect's server does not answer ({reason})"
    broken = any(sign in text for sign in ("Max retries", "onnection"))
    if broken and library in ("mlflow", "requests", "sqlalchemy", "urllib3"):
        return f"MLflow stopped answering ({first_line}{_proxy('MLFLOW_TRACKING_URI')})"
    return ""


def _proxy(variable: str) -> str:
    """Part of a message: the proxy on the way to the server that the variable names."""
    from models.endpoint.proxies import proxy_of

    proxy = proxy_of(os.environ.get(variable, ""))
    return f", asked through the proxy in {proxy.source}" if proxy else ""
