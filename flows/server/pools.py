"""What `staple up` creates in Prefect's server: work pools and deployments; and it ends dead runs.

A run has only parameters. Command, environment and working directory come from the pool
(`pool.json`), so that a person who may start a run cannot start another program.
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

    import psutil
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule

POOLS = {"gpu": 1, "cpu": 2}
"""Work pools and how many runs each has at a time."""
DEPLOYMENTS = Path(__file__).parents[2] / "prefect.yaml"
TEMPLATE = Path(__file__).parent / "pool.json"
WORKER = "prefect.worker.name"
"""The label by which Prefect says which worker took a run."""
RUN_ID = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a run's process, and of all that it starts."""


CLOSED = "additionalProperties"
"""Of a form: false where unknown parameters are refused."""


def client_of(url: str, login: str | None = None) -> SyncPrefectClient:
    """Prefect's client for the server at an API's URL; it repeats a request to a busy server."""
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(url, auth_string=login)


def deploy(url: str, environment: Mapping[str, str], experiments: Sequence[str]) -> None:
    """Create the pools and deployments of `prefect.yaml` in the Prefect server at an API's URL.

    The server is made to refuse unknown parameters of a deployment; by default it accepts them, and
    the run crashes. Schedules that were changed in the UI stay as they are.

    Args:
        experiments: what the stages' forms offer (`offer_experiments`).

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
            raise UserError(f"Prefect refused the deployments:\n{tail(done.stdout + done.stderr)}")
        _close_parameters(client)
        offer_experiments(client, experiments)
        for deployment, before in schedules.items():
            _restore_schedules(client, deployment, before)


def offer_experiments(client: SyncPrefectClient, names: Sequence[str]) -> None:
    """Add recorded experiments to those that the stages' forms offer; other names are refused.

    Without any the experiment stays a text field, as it does where `deploy` did not make the
    deployments: those may belong to another record.
    """
    for deployment in client.read_deployments():
        form = deployment.parameter_openapi_schema or {}
        fields = form.get("properties", {})
        if names and "experiment" in fields and form.get(CLOSED) is False:
            asked = fields["experiment"]
            asked = {**asked, "enum": list(dict.fromkeys([*asked.get("enum", []), *names]))}
            _change_form(
                client, deployment.id, {**form, "properties": {**fields, "experiment": asked}}
            )


def end_dead_runs(client: SyncPrefectClient, dead: Collection[str], *, alone: bool) -> list[str]:
    """Mark runs without a process as crashed, which frees their pools' slots; the runs' names.

    Args:
        dead: names of this machine's dead workers.
        alone: whether only this machine uses the server. Then a run without a worker's name, which
            was taken just before a crash, is dead too, unless another worker is online.
    """
    runs = _unfinished(client, work_pools={"name": {"any_": list(POOLS)}})
    if not runs:
        return []
    living = {env[RUN_ID] for _, env in processes() if RUN_ID in env}
    orphaned = {p for p in POOLS if alone and not online(client, p) - set(dead)}
    ended = list[str]()
    for run in runs:
        worker = run["labels"].get(WORKER)
        is_dead = worker in dead if worker else run["work_pool_name"] in orphaned
        if is_dead and run["id"] not in living:
            _crash(client, run, f"the worker {worker or 'that took it'} died on {platform.node()}")
            ended.append(run["name"])
    return ended


def _crash(client: SyncPrefectClient, run: Mapping[str, Any], why: str) -> None:
    """Mark a run as crashed, and the runs below it."""
    from uuid import UUID

    from prefect.client.schemas.objects import State
    from prefect.states import Crashed

    for below in _unfinished(client, flow_runs={"parent_flow_run_id": {"any_": [run["id"]]}}):
        _crash(client, below, why)
    crashed: State[Any] = Crashed(message=f"No process runs this any more: {why}.")
    client.set_flow_run_state(UUID(run["id"]), crashed, force=True)


def _unfinished(
    client: SyncPrefectClient, flow_runs: Mapping[str, Any] | None = None, **filters: Any
) -> list[dict[str, Any]]:
    states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    wanted = {"flow_runs": {"state": states, **(flow_runs or {})}, **filters}
    found: list[dict[str, Any]] = client.request("POST", "/flow_runs/filter", json=wanted).json()
    return found


def processes() -> Iterator[tuple[psutil.Process, Mapping[str, str]]]:
    """This machine's processes with their environments, as far as this user may read them."""
    import psutil

    for process in psutil.process_iter():
        try:
            yield process, process.environ()
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
            form = deployment.parameter_openapi_schema or {}
            _change_form(client, deployment.id, {**form, CLOSED: False})


def _change_form(client: SyncPrefectClient, deployment: UUID, form: Mapping[str, Any]) -> None:
    change = {"parameter_openapi_schema": form}
    client.request("PATCH", "/deployments/{id}", path_params={"id": deployment}, json=change)


def _restore_schedules(
    client: SyncPrefectClient, deployment: UUID, before: Sequence[DeploymentSchedule]
) -> None:
    kept = [s.model_dump(mode="json", include={"schedule", "active", "parameters"}) for s in before]
    place = {"id": deployment}
    client.request("PATCH", "/deployments/{id}", path_params=place, json={"schedules": kept})


def online(client: SyncPrefectClient, pool: str) -> set[str]:
    """The names of the pool's workers that sent the server a recent heartbeat."""
    found = client.request(
        "POST",
        "/work_pools/{work_pool_name}/workers/filter",
        path_params={"work_pool_name": pool},
        json={},
    )
    return {entry["name"] for entry in found.json() if entry["status"] == "ONLINE"}


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a text."""
    return "\n".join(text.strip().splitlines()[-lines:])
