"""A Prefect server on loopback that answers only its own pages, and clients with its password.

Prefect alone checks neither the Host header nor the Origin: any page in a browser of this machine
could use the server, for instance by rebinding its own name to 127.0.0.1. `staple up` runs this
module as a process; `running_server` does so for a single command.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from constitutions.errors import UserError
from flows.server import prefect_database

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""This machine's names in a browser, also through a tunnel, at any port."""
NAMED = (b"host", b"origin")
ROOT = Path(__file__).parents[2]
START_SECONDS = 600
"""How long a server may take to answer: the first start creates a database, which takes minutes."""
STOP_SECONDS = 5
KEEP_ALIVE_SECONDS = 75
"""How long an unused connection stays open.

uvicorn's own 5 s are too few on a busy machine: where the event loop stalls for longer, the timer
closes a connection before the request that has arrived is read, and the client sees a reset.
"""

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]


class Gate:
    """An ASGI application that refuses other hosts and origins, over HTTP and websockets."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Answer 403, or pass on."""
        if scope["type"] not in ("http", "websocket") or is_ours(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
        else:
            kind = [(b"content-type", b"application/json")]
            body = b'{"exception_message": "Forbidden: another host or origin"}'
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": body})


def is_ours(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request names this machine, and comes from one of its pages or from no page."""
    hosts, origins = ([v.decode("latin-1") for k, v in headers if k == name] for name in NAMED)
    if len(hosts) != 1 or len(origins) > 1 or _name(hosts[0]) not in NAMES:
        return False
    # page and server may use different names of this machine, but not different ports
    own = {f"http://{name}{_port(hosts[0])}" for name in NAMES}
    return all(origin in own for origin in origins)


def _port(host: str) -> str:
    """ ":4200"."""
    return host[len(_name(host)) :]


def _name(host: str) -> str:
    end = host.find("]") + 1 if host.startswith("[") else 0
    colon = host.find(":", end)
    return (host if colon < 0 else host[:colon]).lower()


# The process -------------------------------------------------------------------------------


def main() -> None:
    """Serve Prefect on a port, or on a socket of the parent process until the parent ends."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int)
    arguments.add_argument("--socket", type=int, help="its file descriptor, for a temporary server")
    arguments.add_argument("--parent", type=int, help="end with this process")
    asked = arguments.parse_args()
    if asked.parent:
        threading.Thread(target=_end_with, args=(asked.parent,), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    prefect_database.make()
    app = Gate(create_app(final=True, ephemeral=asked.socket is not None))
    config = uvicorn.Config(
        app,
        host=HOST,
        port=asked.port or 0,
        log_level="error" if asked.parent else "warning",
        timeout_graceful_shutdown=STOP_SECONDS - 1,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    listening = None if asked.socket is None else [socket.socket(fileno=asked.socket)]
    uvicorn.Server(config).run(listening)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def environment(url: str, login: str, home: Path) -> dict[str, str]:
    """A server's settings for `url`, as environment variables: secrets are never arguments.

    Args:
        home: the folder of its database, unless the user has chosen another one.
    """
    port = urlsplit(url).port
    return {
        **prefect_database.own(home),
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def new_login() -> str:
    """A new login for the server: a user's name, a colon, and a password of 192 random bits."""
    return f"staple:{secrets.token_urlsafe(24)}"


# A server for one command --------------------------------------------------------------------


@contextmanager
def running_server() -> Iterator[None]:
    """A Prefect server for the flows in this block: the configured one, or a temporary one.

    The temporary one ends with the block or with this process. It runs in another session, which a
    Ctrl-C in the terminal does not reach, so that runs can still report.

    Raises:
        UserError: it does not start.
    """
    import prefect.context
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        yield
        return
    with _started() as client:
        before = {name: os.environ.get(name) for name in client}
        os.environ.update(client)
        prefect.context.refresh_global_settings_context()  # for threads, which have no other
        try:
            yield
        finally:
            _send_queued()
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({} if value is None else {name: value})
            prefect.context.refresh_global_settings_context()


def _send_queued() -> None:
    """Send this process's queued log lines and events while the server still runs."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=STOP_SECONDS)


@contextmanager
def _started() -> Iterator[dict[str, str]]:
    """A temporary server; environment variables for its clients."""
    from flows.experiment import home

    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(128)
        url, login = f"http://{HOST}:{listening.getsockname()[1]}", new_login()
        server = {
            **environment(url, login, home()),
            **{"PREFECT_UI_ENABLED": "0", "PREFECT_SERVER_UI_ENABLED": "0"},
        }
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "flows.server.prefect_server"),
                *("--socket", str(listening.fileno()), "--parent", str(os.getpid())),
            ],
            env={**os.environ, **server},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
    try:
        _wait(f"{url}/api/health", process, server)
        yield {"PREFECT_API_URL": f"{url}/api", "PREFECT_API_AUTH_STRING": login}
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], server: Mapping[str, str]) -> None:
    """Wait until the server answers; the socket queues connections before that."""
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=1, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            continue
    raise UserError(
        "Prefect's temporary server does not start"
        + (f" (exit code {process.returncode})" if process.poll() is not None else ""),
        where=f"its database, {server.get(prefect_database.URL) or prefect_database.file()}",
        expected=f"an answer within {START_SECONDS} s",
        fix="read the error of: prefect server start; or move the database away",
    )


if __name__ == "__main__":
    main()
