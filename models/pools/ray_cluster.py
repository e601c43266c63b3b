"""The Ray pool: one engine for each actor, one actor for each GPU.

The process that runs a stage gives each worker one shard at a time and keeps the rows. When a
worker is lost, another one computes its shard again. Workers copy the model's folders to their node
(`models.pools.weights`), and refuse to work if their code differs from the stage's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic

import psutil

from constitutions.errors import UserError
from models.policy import PolicySettings, PoolSettings, Progress
from models.pools.base import Compute, E, Finished, Opener, Pool, Row, Shards
from models.pools.weights import Folder, Shelf, bring, folders

LOSSES = 3
"""Lost workers after which a stage gives up: at one shard, or in a row while opening engines."""
PATIENCE = 60.0
"""Seconds without any worker until a message says what the pool waits for."""
OBJECTS = 256 << 20
"""Bytes of shared memory for rows, where this process starts its own Ray."""

_log = logging.getLogger(__name__)


# The cluster -------------------------------------------------------------------------------


def join(settings: PoolSettings, cpus: int) -> Any:
    """The `ray` module, joined to the cluster that the settings name; a process joins only one.

    Without an address it starts a Ray of its own, which ends with this process. It listens on the
    loopback interface only, and requires a token that only its processes' environment holds.

    Args:
        cpus: CPUs that all workers together ask for.

    Raises:
        UserError: there is no such cluster, or this process has joined another one.
    """
    if settings.address is None:
        # nodes then listen on loopback
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if ray.is_initialized():
        return _joined(ray, settings)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address is None:
        cpus = max(cpus, os.cpu_count() or 1)
        quiet |= {"num_cpus": cpus, "object_store_memory": OBJECTS, "include_dashboard": False}
        ray.init("local", **quiet)
        return _joined(ray, settings)
    host, _, port = settings.address.rpartition(":")
    try:
        if host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(settings.address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"the Ray cluster cannot be joined: {_words(error)}",
            where=f"setting 'pool.address' = {settings.address}",
            expected="a cluster of which this machine is a node, and its token in RAY_AUTH_TOKEN "
            "or ~/.ray/auth_token",
            fix="ray start --address=HEAD:PORT on this machine; or leave the address unset",
        ) from None
    return _joined(ray, settings)


_addresses: list[str | None] = []
"""The cluster that this process has joined, if any."""


def _joined(ray: Any, settings: PoolSettings) -> Any:
    if _addresses and _addresses[0] != settings.address:
        raise UserError(
            "one process cannot join two Ray clusters",
            where=f"settings 'pool.address' = {settings.address} and {_addresses[0]}",
            expected="one address for the policy's pool and the judges'",
        )
    _addresses[:] = [settings.address]
    return ray


def identity() -> dict[str, str]:
    """Versions that results depend on: of this project's code and of the libraries."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("constitutions", "models", "tasks"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    libraries = {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {"this project": digest.hexdigest()[:12], **libraries}


def _version(package: str) -> str:
    """The version without its build: a build for CUDA has another than one for CPUs."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return "none"


def _words(error: BaseException) -> str:
    """An error of Ray on one line of at most 600 characters."""
    return " ".join(str(error).split())[:600]


# The worker --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opening(Generic[E]):
    """What a worker needs to open its engine."""

    opener: Opener[E]
    models: Mapping[str, Folder]
    shelf: Any
    """The actor that serves their files; None where every worker sees the driver's disk."""
    identity: Mapping[str, str]
    node: str
    """The driver's node, on which workers use the driver's `home`."""
    home: Path


class Worker(Generic[E]):
    """A Ray actor: an engine, in a process of its own."""

    engine: E

    def open(self, opening: _Opening[E]) -> tuple[str, int]:
        """Open the engine.

        Returns:
            This worker's node and process id.

        Raises:
            UserError: the installation on this node differs, or the engine cannot be opened.
        """
        import ray

        found, node = identity(), str(ray.get_runtime_context().get_node_id())
        for name, wanted in opening.identity.items():
            if found[name] != wanted:
                raise UserError(
                    f"{name} is {found[name]} there, but {wanted} where the stage runs",
                    where=f"Ray node {socket.gethostname()}",
                    expected="the same installation on every node, such as one image",
                )
        home = opening.home if node == opening.node else _home(Path.home() / ".cache" / "staple")
        places = {
            name: str(bring(folder, home, partial(_piece, opening.shelf, folder.path)))
            for name, folder in opening.models.items()
        }
        self.engine = opening.opener(lambda model: places.get(model, model))
        return node, os.getpid()

    def run(
        self, compute: Compute[E, Row], number: int, shard: Sequence[Any]
    ) -> tuple[Finished, int]:
        """A shard's rows, and the units of progress that they are."""
        ticks, started = list[int](), time.monotonic()
        rows = list(compute(self.engine, shard, ticks.append))
        return Finished(number, rows, time.monotonic() - started), sum(ticks)


def _home(default: Path) -> Path:
    return Path(os.environ.get("STAPLE_HOME") or default).absolute()


def _piece(shelf: Any, path: str, name: str, offset: int) -> bytes:
    """A piece of a file of the folder `path`, from the driver's machine."""
    import ray

    if shelf is None:
        raise FileNotFoundError(f"{path} has changed while a stage uses it")
    piece: bytes = ray.get(shelf.piece.remote(path, name, offset))
    return piece


# The pool ----------------------------------------------------------------------------------


class RayPool(Pool[E]):
    """One engine for each worker; progress by shards. The first `map` with shards joins a cluster.

    The stage's process holds the locks of this machine's GPUs (`tasks.record.locks`); workers take
    none.
    """

    def __init__(self, settings: PolicySettings, opener: Opener[E], models: Sequence[str]) -> None:
        self._settings, self._opener, self._models = settings, opener, models
        self._cluster: _Cluster | None = None
        self._shelf: Any = None
        self._opening: Any = None
        self._idle: list[Any] = []
        self._tasks: dict[Any, tuple[Any, int | None]] = {}
        """The worker of each task, and the number of its shard; None: it opens its engine."""
        self._neighbours: set[int] = set()
        """Process ids of the workers on this machine."""

    def map(self, compute: Compute[E, Row], shards: Shards, tick: Progress) -> Iterator[Finished]:
        """See `Pool.map`."""
        if not shards:
            return
        cluster = self._cluster = self._cluster or self._join()
        job, left = cluster.ray.put(compute), deque(shards)
        losses, finished = Counter[int | None](), list[Finished]()
        while left or self._busy:
            self._hire(cluster, len(left) + self._busy)
            while left and self._idle:
                number, worker = left.popleft(), self._idle.pop()
                self._tasks[worker.run.remote(job, number, list(shards[number]))] = worker, number
            yield from finished  # while the workers are at the next ones already
            finished = list(self._collect(cluster, left, losses, tick))
        yield from finished

    def close(self) -> None:
        """See `Pool.close`: the workers end and free their GPUs."""
        if self._cluster is None:
            return
        for worker in [*self._idle, *(worker for worker, _ in self._tasks.values())]:
            self._cluster.ray.kill(worker)
        if self._shelf is not None:
            self._cluster.ray.kill(self._shelf)
        deadline = time.monotonic() + 30
        while any(map(psutil.pid_exists, self._neighbours)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._cluster = self._shelf = self._opening = None
        self._idle, self._tasks, self._neighbours = [], {}, set()

    @property
    def _busy(self) -> int:
        return sum(number is not None for _, number in self._tasks.values())

    def _join(self) -> _Cluster:
        """Join the cluster, and put what workers need into its store."""
        cluster = _Cluster.of(self._settings)
        home = _home(Path(".staple"))
        models = folders(self._models, home)
        if self._settings.pool.address is not None:
            self._shelf = cluster.beside_us(Shelf, [folder.path for folder in models.values()])
        opening = _Opening(self._opener, models, self._shelf, identity(), cluster.node, home)
        self._opening = cluster.ray.put(opening)
        return cluster

    def _hire(self, cluster: _Cluster, shards: int) -> None:
        """Start workers until there are as many as the shards can use."""
        for _ in range(len(self._idle) + len(self._tasks), min(cluster.workers, shards)):
            worker = cluster.worker()
            self._tasks[worker.open.remote(self._opening)] = worker, None

    def _collect(
        self, cluster: _Cluster, left: deque[int], losses: Counter[int | None], tick: Progress
    ) -> Iterator[Finished]:
        """The shards of the tasks that end next; a lost worker's goes back to `left`."""
        ray = cluster.ray
        done, _ = ray.wait(list(self._tasks), timeout=PATIENCE)
        if not done and not self._busy:
            _log.warning("waiting for Ray to start a worker with %s", cluster.needs)
        for task in done:
            worker, number = self._tasks.pop(task)
            try:
                found = ray.get(task)
            except ray.exceptions.RayTaskError as error:  # raised by this project's code there
                self._idle.append(worker)
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            except ray.exceptions.RayError as error:
                ray.kill(worker)
                _count_loss(losses, number, _words(error))
                left.extendleft([] if number is None else [number])
                continue
            self._idle.append(worker)
            if number is None:
                losses[None] = 0
                self._neighbours |= {pid for node, pid in [found] if node == cluster.node}
            else:
                shard, units = found
                tick(units)
                yield shard


@dataclass(frozen=True)
class _Cluster:
    """The cluster as a pool sees it."""

    ray: Any
    node: str
    """The node of this process."""
    workers: int
    needs: Mapping[str, int]
    """Resources of each worker."""

    @classmethod
    def of(cls, settings: PolicySettings) -> _Cluster:
        """Join the cluster; each worker takes a GPU if there are any and the policy may use them.

        Raises:
            UserError: it cannot be joined, or lacks the GPUs that are asked for.
        """
        pool, threads = settings.pool, settings.threads or 1
        ray = join(pool, (pool.workers or 1) * threads)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if settings.device != "cpu" else 0
        if settings.device == "cuda" and not gpus:
            raise UserError(
                "the Ray cluster has no GPU",
                where="setting 'policy.device' = cuda",
                expected="a GPU for each worker",
                fix="set it to auto or cpu, or give the cluster a node with a GPU",
            )
        needs = {"num_cpus": threads, "num_gpus": int(gpus > 0)}
        node = str(ray.get_runtime_context().get_node_id())
        return cls(ray, node, pool.workers or max(gpus, 1), needs)

    def worker(self) -> Any:
        """Another worker, on any node with room; Ray does not restart it when it is lost."""
        return self.ray.remote(Worker).options(**self.needs, scheduling_strategy="SPREAD").remote()

    def beside_us(self, actor: type, *args: Any) -> Any:
        """An actor on this node that takes no CPU."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        at = NodeAffinitySchedulingStrategy(self.node, soft=False)
        return self.ray.remote(actor).options(num_cpus=0, scheduling_strategy=at).remote(*args)


def _count_loss(losses: Counter[int | None], number: int | None, reason: str) -> None:
    what = "opening its engine" if number is None else f"shard {number}"
    losses[number] += 1
    _log.warning("a worker was lost at %s: %s", what, reason)
    if losses[number] >= LOSSES:
        raise UserError(
            f"{LOSSES} workers were lost at {what}; the last one: {reason}",
            where="setting 'pool' = ray",
            expected="workers that live as long as a shard takes",
            fix="give them more memory, or lower batch_rows; Ray's logs say more "
            "(/tmp/ray/session_latest/logs)",
        )
