"""Real servers for the tests, on loopback, ended with the test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it and all that it started, at once."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        for member in (*family, self.process):
            try:
                member.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[Server]:
    """MLflow with its database and artefacts in the folder; the same folder goes on with them."""
    port = port or free_port()
    arguments = [
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with run_server(arguments, folder, f"http://127.0.0.1:{port}", "/health") as server:
        yield server


@contextmanager
def prefect_api(folder: Path, port: int | None = None) -> Iterator[Server]:
    """A Prefect server with its database in `folder`/prefect; `url` is its API's."""
    port = port or free_port()
    arguments = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with run_server(arguments, folder, f"http://127.0.0.1:{port}/api", "/health") as server:
        yield server


@contextmanager
def run_server(arguments: Sequence[str], folder: Path, url: str, health: str) -> Iterator[Server]:
    program, *rest = arguments
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes, as `staple up` has it
    }
    environment.pop("PREFECT_API_URL", None)
    with (folder / f"{program}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / program), *rest],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    server = Server(url, process)
    try:
        _wait(url + health, process)
        yield server
    finally:
        if process.poll() is None:
            server.kill()


def _wait(url: str, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended at once"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
