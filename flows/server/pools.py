"""What `staple up` keeps in Prefect's server: work pools, deployments, and runs that nobody runs.

A run of a pool brings nothing but its parameters: command, environment and working directory are
the pool's own (`pool.json`), so that who may start a run may not start a program.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constitutions.errors import UserError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.objects import DeploymentSchedule, FlowRun

POOLS = {"gpu": 1, "cpu": 2}
"""Work pools and how many runs each has at a time."""
DEPLOYMENTS = Path(__file__).parents[2] / "prefect.yaml"
TEMPLATE = Path(__file__).parent / "pool.json"
WORKER = "prefect.worker.name"
"""The label by which Prefect says which worker took a run."""
RUN_ID = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a run's process, and of all that it starts."""


def client_of(url: str, login: str | None = None) -> SyncPrefectClient:
    """Prefect's own client of the server at an API's URL: it asks again when that is busy."""
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(url, auth_string=login)


def deploy(url: str, environment: Mapping[str, str]) -> None:
    """Make the pools and deployments of `prefect.yaml` in the Prefect server at an API's URL.

    A deployment's parameters are closed: the server then refuses one that it does not know, where
    Prefect by itself would crash the run. Schedules that were changed in the UI stay as they are.

    Raises:
        UserError: Prefect refused them.
    """
    with client_of(url, environment.get("PREFECT_API_AUTH_STRING")) as client:
        for pool, limit in POOLS.items():
            _make_pool(client, pool, limit)
        schedules = {d.id: d.schedules for d in client.read_deployments()}
        command = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
        done = subprocess.run(
            [sys.executable, *command, str(DEPLOYMENTS)],
            env={**environment, "PREFECT_API_URL": url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"Prefect refused the deployments:\n{_tail(done.stdout + done.stderr)}")
        _close_parameters(client)
        for deployment, before in schedules.items():
            _restore_schedules(client, deployment, before)


def end_dead_runs(client: SyncPrefectClient, dead: Collection[str], *, alone: bool) -> list[str]:
    """Mark the runs as crashed that nobody runs any more; their names. Their pools' slots are free.

    Args:
        dead: names of this machine's workers that are dead.
        alone: the server is this machine's own. A run that was taken a moment before everything
            died, and has no worker's name yet, is then nobody's, unless another worker is online.
    """
    runs = _unfinished(client, work_pool_filter=_named(list(POOLS)))
    if not runs:
        return []
    living = set(_living_runs())
    orphaned = {p for p in POOLS if alone and not online(client, p) - set(dead)}
    ended = list[str]()
    for run in runs:
        worker = run.labels.get(WORKER)
        is_dead = worker in dead if worker else run.work_pool_name in orphaned
        if is_dead and str(run.id) not in living:
            _crash(client, run, f"the worker {worker or 'that took it'} died on {platform.node()}")
            ended.append(str(run.name))
    return ended


def _crash(client: SyncPrefectClient, run: FlowRun, why: str) -> None:
    """Mark a run, and the runs below it."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.states import Crashed

    parent = FlowRunFilterParentFlowRunId(any_=[run.id])
    for below in _unfinished(client, flow_run_filter=FlowRunFilter(parent_flow_run_id=parent)):
        _crash(client, below, why)
    client.set_flow_run_state(run.id, Crashed(message=f"Nobody runs this any more: {why}."), True)


def _unfinished(
    client: SyncPrefectClient, flow_run_filter: FlowRunFilter | None = None, **filters: Any
) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState
    from prefect.client.schemas.filters import FlowRunFilterStateType as OfType
    from prefect.client.schemas.objects import StateType

    wanted = flow_run_filter or FlowRunFilter()
    types = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    wanted.state = FlowRunFilterState(type=OfType(any_=types))
    return client.read_flow_runs(flow_run_filter=wanted, **filters)


def _named(pools: list[str]) -> WorkPoolFilter:
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

    return WorkPoolFilter(name=WorkPoolFilterName(any_=pools))


def _living_runs() -> Iterator[str]:
    """The ids of all flow runs that a process of this user runs on this machine."""
    import psutil

    for process in psutil.process_iter():
        try:
            if run := process.environ().get(RUN_ID):
                yield run
        except (psutil.Error, OSError):
            continue


def _make_pool(client: SyncPrefectClient, name: str, limit: int) -> None:
    """The pool with its template; a limit that was changed stays as it is."""
    template = json.loads(TEMPLATE.read_text("utf-8"))
    wanted = {"work_pools": {"name": {"any_": [name]}}}
    if client.request("POST", "/work_pools/filter", json=wanted).json():
        place, change = {"name": name}, {"base_job_template": template}
        client.request("PATCH", "/work_pools/{name}", path_params=place, json=change)
        return
    pool = {
        "name": name,
        "type": "process",
        "base_job_template": template,
        "concurrency_limit": limit,
    }
    client.request("POST", "/work_pools/", json=pool)


def _close_parameters(client: SyncPrefectClient) -> None:
    for deployment in client.read_deployments():
        if str(deployment.entrypoint).startswith("flows.deployments."):
            closed = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
            change = {"parameter_openapi_schema": closed}
            place = {"id": deployment.id}
            client.request("PATCH", "/deployments/{id}", path_params=place, json=change)


def _restore_schedules(
    client: SyncPrefectClient, deployment: UUID, before: Sequence[DeploymentSchedule]
) -> None:
    kept = [s.model_dump(mode="json", include={"schedule", "active", "parameters"}) for s in before]
    place = {"id": deployment}
    client.request("PATCH", "/deployments/{id}", path_params=place, json={"schedules": kept})


def online(client: SyncPrefectClient, pool: str) -> set[str]:
    """The names of the workers of which the server has heard lately."""
    found = client.request(
        "POST",
        "/work_pools/{work_pool_name}/workers/filter",
        path_params={"work_pool_name": pool},
        json={},
    )
    return {entry["name"] for entry in found.json() if entry["status"] == "ONLINE"}


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
