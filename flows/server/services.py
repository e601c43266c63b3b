"""The services of `staple up`: Prefect's server, MLflow's server, and a worker for each pool.

Each is a process with a mark in its environment, which its children inherit. `staple down` ends
exactly the processes with a mark, even if the system has reused their ids. $STAPLE_HOME keeps a
list of the services, which other commands read (`adopt`), and the login of both servers, which
processes get in their environment, never as an argument.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constitutions.errors import UserError
from flows.experiment import recorded_names
from flows.server.pools import (
    POOLS,
    client_of,
    deploy,
    end_dead_runs,
    online,
    processes,
    tail,
)
from flows.server.prefect_server import environment as server_environment
from flows.server.prefect_server import new_login
from models.files import UNREADABLE, remove
from models.notices import say
from tasks.record import private

if TYPE_CHECKING:
    import psutil

MARK = "STAPLE_SERVICE"
"""Environment variable of a service and its children: which service of which `staple up`."""
URL = "STAPLE_SERVICE_URL"
"""Environment variable of a service: where it answers."""
HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "mlflow": 5000}
ADDRESSES = {"prefect": "PREFECT_API_URL", "mlflow": "MLFLOW_TRACKING_URI"}
"""Environment variables of clients: where the servers answer."""
START_SECONDS = 180
"""How long a service may take to answer: the first start creates its database."""
ACCOUNTS = """[mlflow]
database_uri = sqlite:///{database}
default_permission = NO_PERMISSIONS
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 3600
"""
"""MLflow's settings of its accounts; without the cache each request hashes the password again."""
STOP_SECONDS = 20
"""How long a service may take to end before it is killed."""


@dataclass(frozen=True)
class Service:
    """A process that `staple up` started."""

    name: str
    mark: str
    pid: int
    log: str
    url: str = ""
    host: str = ""
    """The machine that started it: several machines may share $STAPLE_HOME."""

    @property
    def is_here(self) -> bool:
        """Whether it was started on this machine."""
        return self.host in ("", platform.node())

    def is_alive(self) -> bool:
        """Whether the process runs; another process with the same id has no such mark."""
        import psutil

        try:
            return psutil.Process(self.pid).environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False


@dataclass(frozen=True)
class Up:
    """Where the services answer, and which of them this call started."""

    prefect: str
    mlflow: str
    started: tuple[str, ...]
    folder: Path
    login: str = ""
    """The login for both pages, if this call created it."""
    ended: tuple[str, ...] = ()
    """Flow runs of dead workers that this call marked as crashed."""


def adopt() -> None:
    """Let this process use the running services, unless its environment names others."""
    for service in _noted():
        variable = ADDRESSES.get(service.name)
        if variable and variable not in os.environ and service.is_alive():
            for name, value in _client_environment(service).items():
                os.environ.setdefault(name, value)


def _client_environment(server: Service) -> dict[str, str]:
    """Where one of our servers answers, and the login for it, as environment variables."""
    address = {ADDRESSES[server.name]: api_url(server)}
    if server.name == "prefect":
        return {**address, "PREFECT_API_AUTH_STRING": _prefect_login()}
    user, _, password = _login().partition(":")
    return {**address, "MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}


def api_url(service: Service) -> str:
    """The URL of a service's API; `url` is its web page."""
    return f"{service.url}/api" if service.name == "prefect" else service.url


def up(prefect_port: int | None = None, mlflow_port: int | None = None) -> Up:
    """Start the services that do not run yet, and wait until all of them answer.

    A Prefect or MLflow server that the environment names is used instead of starting one.

    Args:
        prefect_port, mlflow_port: None is the usual port, or a free one if that is taken.

    Raises:
        UserError: a port is taken, or a service ends at its start.
    """
    with _alone():
        noted = _noted()
        running = {s.name: s for s in noted if s.is_alive()}
        others = [s for s in noted if not s.is_alive()]
        starting = _Starting(running, others)
        try:
            return _up(starting, prefect_port, mlflow_port)
        except BaseException as error:
            hurried = not isinstance(error, Exception)  # a signal must take effect within seconds
            _end(starting.started, patience=1 if hurried else STOP_SECONDS)
            _note([*others, *running.values()])
            raise


def down() -> list[str]:
    """End what `up` started: workers with their runs, then servers; the names of all."""
    with _alone():
        services = _noted()
        ended = [s.name for s in services if s.is_alive()]
        _end(services)
        _note(
            s for s in services if s.name in POOLS or not s.is_here
        )  # `up` still has to end their runs
        return ended


def _up(starting: _Starting, prefect_port: int | None, mlflow_port: int | None) -> Up:
    prefect = os.environ.get("PREFECT_API_URL", "")
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    before = dict(starting.running)
    own, own_mlflow = not prefect, not tracking.startswith(("http:", "https:"))
    made = _make_login() if own or own_mlflow else ""
    if own:
        starting.server("prefect", prefect_port, _prefect_server)
    if own_mlflow:
        from filelock import FileLock

        from tasks.record import database

        with FileLock(_home() / "mlflow.lock"):  # two processes would break its database
            database.ready(database.tracking_uri())
            starting.server("mlflow", mlflow_port, _mlflow_server)
            starting.wait_for("mlflow", _answers)
    starting.wait_for("prefect", _answers)
    client_environment = {"PREFECT_API_URL": prefect, "MLFLOW_TRACKING_URI": tracking}
    for name in ADDRESSES:
        if server := starting.running.get(name):
            client_environment.update(_client_environment(server))
    prefect, tracking = (client_environment[variable] for variable in ADDRESSES.values())
    if starting.started:
        given = {**_environment(), **client_environment}
        deploy(prefect, given, recorded_names())
    login = {**os.environ, **client_environment}.get("PREFECT_API_AUTH_STRING")
    with client_of(prefect, login) as client:
        dead = {s.mark for s in starting.others if s.is_here and not _of(s.mark)}
        ended = end_dead_runs(client, dead, alone=own)
        starting.forget(dead)
        for pool in POOLS:
            starting.worker(pool, client_environment)
        for pool in POOLS:
            starting.wait_for(pool, lambda service: service.mark in online(client, service.name))
    started = tuple(name for name in starting.running if name not in before)
    return Up(prefect.removesuffix("/api"), tracking, started, _folder(), made, tuple(ended))


class _Starting:
    """The running services, and those that this call started; each is written down at once."""

    def __init__(self, running: dict[str, Service], others: Sequence[Service]) -> None:
        self.running = dict(running)
        self.started: list[Service] = []
        self.others = list(others)
        """Dead services and another machine's: they stay listed until their runs are ended."""

    def forget(self, marks: set[str]) -> None:
        """Remove dead services from the list, once their runs are ended."""
        self.others = [s for s in self.others if s.mark not in marks]
        _note([*self.others, *self.running.values()])

    def server(
        self,
        name: str,
        port: int | None,
        command: Callable[[int], tuple[list[str], dict[str, str]]],
    ) -> None:
        """Start a server on its port, or on a free one if `port` is None."""
        if there := self.running.get(name):
            if port and not there.url.endswith(f":{port}"):
                raise UserError(
                    f"{name} is up at {there.url} already",
                    fix="staple down, then staple up with the other port",
                )
            return
        at = _port(name, port)
        self._start(name, _new_mark(name), *command(at), url=f"http://{HOST}:{at}")

    def worker(self, pool: str, client: Mapping[str, str]) -> None:
        """Start the worker of a pool in this directory, with this record."""
        if pool in self.running:
            return
        environment = {
            **client,
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            "STAPLE_HOME": str(_home()),
        }
        mark = _new_mark(pool)
        command = ["prefect", "worker", "start", "--pool", pool, "--type", "process"]
        self._start(pool, mark, [*command, "--name", mark], environment)

    def wait_for(self, name: str, is_ready: Callable[[Service], bool]) -> None:
        """Wait until a service that this call started is ready.

        Raises:
            UserError: it ended, or takes too long; with the last lines of its log.
        """
        service = next((s for s in self.started if s.name == name), None)
        if service is None:
            return
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(service):
            late = time.monotonic() > deadline
            if late or not service.is_alive():
                what = f"has not answered for {START_SECONDS} s" if late else "ended at its start"
                last = tail(Path(service.log).read_text("utf-8", "replace"))
                raise UserError(f"{name} {what}; the end of {service.log}:\n{last}")
            time.sleep(0.2)

    def _start(
        self,
        name: str,
        mark: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        url: str = "",
    ) -> None:
        log = _folder() / f"{name}.log"
        with open(log, "wb", opener=private.opener) as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={
                    **_environment(),
                    **environment,
                    **{MARK: mark, URL: url, "STAPLE_HOME": str(_home())},
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a Ctrl-C in this terminal does not reach it
            )
        service = Service(name, mark, process.pid, str(log), url, platform.node())
        self.running[name] = service
        self.started.append(service)
        _note([*self.others, *self.running.values()])


def _prefect_server(port: int) -> tuple[list[str], dict[str, str]]:
    command = ["flows.server.prefect_server", "--port", str(port)]
    return command, server_environment(f"http://{HOST}:{port}", _prefect_login(), _home())


def _mlflow_server(port: int) -> tuple[list[str], dict[str, str]]:
    """MLflow's server over the database and folder that the command line uses without one.

    It has one account. Its accounts' database is made anew at each start, since MLflow keeps the
    password of an account that is there already.
    """
    from tasks.record import database

    accounts, settings = (_folder() / f"mlflow-accounts.{kind}" for kind in ("db", "ini"))
    accounts.unlink(missing_ok=True)
    settings.write_text(ACCOUNTS.format(database=str(accounts).replace("%", "%%")))
    user, _, password = _login().partition(":")
    options = {
        "--app-name": "basic-auth",
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--default-artifact-root": str(Path("mlruns").absolute()),
    }
    command = ["mlflow", "server", *(word for option in options.items() for word in option)]
    return command, {
        "MLFLOW_BACKEND_STORE_URI": database.tracking_uri(),  # its password is to be no argument
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(24),
    }


def _environment() -> dict[str, str]:
    """This process's environment, without the settings that shorten the command line's log."""
    quiet = ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_LOGGING_LEVEL")
    kept = {name: value for name, value in os.environ.items() if name not in quiet}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


# The login --------------------------------------------------------------------------------------

GIVEN_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"
"""Environment variable with a login that replaces the generated one, for Prefect alone."""


def login_file() -> Path:
    """The file with the login of `staple up`'s servers: a name, a colon, a password."""
    return _folder() / "login"


def _prefect_login() -> str:
    return os.environ.get(GIVEN_LOGIN) or _login()


def _login() -> str:
    """The generated login; "" if there is none."""
    try:
        with open(login_file(), encoding="utf-8", opener=private.opener) as kept:
            return kept.read().strip()
    except FileNotFoundError:
        return ""


def _make_login() -> str:
    """Generate and keep a login; "" if there is one already."""
    if _login():
        return ""
    login_file().unlink(missing_ok=True)
    login = new_login()
    with open(login_file(), "x", encoding="utf-8", opener=private.opener) as kept:
        kept.write(login + "\n")
    return login


# Ports -----------------------------------------------------------------------------------------


def _port(name: str, asked: int | None) -> int:
    """The requested port; else the usual one, or a free one if that is taken."""
    usual = asked or PORTS[name]
    if (free := _bound(usual)) is not None:
        return free
    if asked:
        raise UserError(
            f"port {asked} is taken{_holder(asked)}",
            where=f"staple up, {name}",
            fix="choose another port, or leave the option out",
        )
    return _bound(0) or usual


def _bound(port: int) -> int | None:
    """The port on loopback that a listener gets for `port` (0: any free one); None: it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return None
        return int(listener.getsockname()[1])


def _holder(port: int) -> str:
    """ " by python (process 123)", if the system shows it."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.pid
            if listens and connection.laddr.port == port:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return ""


def _answers(server: Service) -> bool:
    import httpx

    try:
        # our own servers are on loopback, which no proxy reaches
        health = f"{api_url(server)}/health"
        return httpx.get(health, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


# What runs ---------------------------------------------------------------------------------------


def _home() -> Path:
    """As `flows.experiment.home`, without its imports: every command asks for it (`adopt`)."""
    return Path(os.environ.get("STAPLE_HOME", ".staple")).absolute()


def _folder() -> Path:
    return _home() / "services"


def _new_mark(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:12]}"


def _noted() -> list[Service]:
    """The listed services; if the list is damaged, those whose processes have a mark."""
    path = _folder() / "services.json"
    try:
        return [Service(**entry) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        found = list(_marked())
        names = ", ".join(service.name for service in found) or "nothing"
        say(f"{path} is damaged ({error}) and written again; running services: {names}")
        with suppress(OSError):  # without the list, `down` still ends the services
            remove(path)
            _note(found)
        return found


def _marked() -> Iterator[Service]:
    """The services of this $STAPLE_HOME among the running processes."""
    import psutil

    for process, own in processes():
        mark = own.get(MARK, "")
        if mark and own.get("STAPLE_HOME") == str(_home()):
            with suppress(psutil.Error, OSError):
                parent = process.parent()
                if parent is None or parent.environ().get(MARK) != mark:
                    name = mark.rpartition("-")[0]
                    log = str(_folder() / f"{name}.log")
                    yield Service(name, mark, process.pid, log, own.get(URL, ""))


def _note(services: Any) -> None:
    path = _folder() / "services.json"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps([asdict(s) for s in services], indent=1) + "\n", "utf-8")
    scratch.replace(path)


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock: one `up` or `down` runs at a time."""
    from filelock import FileLock

    private.folder(_folder())
    with FileLock(_folder() / "lock"):
        yield


def _end(services: Sequence[Service], patience: float = STOP_SECONDS) -> None:
    """End services and their children: workers before servers, so that runs can still report.

    A process is asked to end (SIGTERM), and killed after `patience` seconds.
    """
    import psutil

    for service in reversed(services):
        asked = _of(service.mark)
        for process in asked:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(asked, timeout=patience)
        for process in _of(service.mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _of(mark: str) -> list[psutil.Process]:
    """Every process with this mark, whatever its parent is now."""
    return [process for process, own in processes() if own.get(MARK) == mark]
