"""Real workers: two of them with nothing on their disks, and a schedule that fires."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_loop
from servers import Server, mlflow_server, prefect_api

from flows.experiment import note_settings
from flows.schema import ExperimentSettings
from flows.server.pools import deploy
from flows.settings import load_settings
from tasks.record.work import JOURNAL


@dataclass(frozen=True)
class Site:
    """Two servers, and the environment in which all machines know them."""

    folder: Path
    api: httpx.Client
    environment: dict[str, str]
    settings: ExperimentSettings


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, prefect_home: Path
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    small_loop.make(folder, migrated_database)
    shutil.copytree(prefect_home, folder / "prefect")
    (folder / "mlflow.db").rename(folder / "server.db")
    with prefect_api(folder) as prefect, mlflow_server(folder) as mlflow:
        shared = {"PREFECT_API_URL": prefect.url, "MLFLOW_TRACKING_URI": mlflow.url}
        environment = {**os.environ, **shared, "PREFECT_WORKER_QUERY_SECONDS": "3"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**shared, "STAPLE_HOME": str(folder / "client")}.items():
                patch.setenv(name, value)
            settings = load_settings(str(folder / "lineage.yaml"))
            note_settings(settings)
            deploy(prefect.url, environment, [])
            # on SQLite, Prefect lets a request wait a minute for the database
            anew = httpx.Limits(max_keepalive_connections=0)  # none that the server has just closed
            with httpx.Client(base_url=prefect.url, timeout=120, limits=anew) as api:
                yield Site(folder, api, environment, settings)


@contextmanager
def worker(site: Site, name: str, pool: str) -> Iterator[Path]:
    """A worker with a working directory and a home of its own, both empty."""
    place = site.folder / name
    place.mkdir(exist_ok=True)
    with (place / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name],
            cwd=place,
            env={
                **site.environment,
                "STAPLE_HOME": str(place / "home"),
                "PREFECT_HOME": str(place / "prefect"),
            },
            stdout=log,
            stderr=log,
        )
    try:
        yield place
    finally:
        Server("", process).kill()


@pytest.fixture(scope="module")
def one(site: Site) -> Iterator[Path]:
    """The place of a worker that both tests give something to do."""
    with worker(site, "one", "gpu") as place:
        yield place


def run_deployment(site: Site, name: str, **parameters: Any) -> dict[str, Any]:
    """Run a deployment as the UI does, and wait for its end."""
    deployment = site.api.get(f"/deployments/name/{name}/{name}").json()
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    for _ in range(20):
        made = site.api.post(f"/deployments/{deployment['id']}/create_flow_run", json=body)
        if made.status_code != 503:  # its database is busy; Prefect's own client asks again too
            break
        time.sleep(0.5)
    assert made.status_code == 201, made.text
    return ended(site, made.json()["id"])


def ended(site: Site, run_id: str, seconds: float = 1200) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = site.api.get(f"/flow_runs/{run_id}").json()["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return dict(state)
        time.sleep(0.5)
    raise TimeoutError(f"flow run {run_id} is {state}")


def computed(place: Path) -> list[str]:
    """The stages that a worker computed, by its own journal."""
    path = place / "home" / "work" / JOURNAL
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines]
    return [e["stage"] for e in events if e["event"] == "recorded"]


def test_two_workers_share_nothing_but_the_record(site: Site, one: Path) -> None:
    stage = {"experiment": "lineage", "iteration": 1}
    with worker(site, "two", "cpu") as two:
        for name in ("prompts", "mine", "score"):
            state = run_deployment(site, name, **stage)
            assert state["type"] == "COMPLETED", state["message"]
        again = run_deployment(site, "score", **stage)
    assert computed(one) == ["mine"]
    assert computed(two) == ["prompts", "score"]
    assert (again["name"], again["type"]) == ("Unchanged", "COMPLETED")


def test_the_schedule_fires_and_skips_what_is_done(site: Site, one: Path) -> None:
    deployment = site.api.get("/deployments/name/experiment/experiment").json()
    assert [s["active"] for s in deployment["schedules"]] == [False], "nobody asked for it yet"
    often = {
        "parameters": {"source": "lineage"},
        "schedules": [{"schedule": {"interval": 20}, "active": True}],
    }
    changed = site.api.patch(f"/deployments/{deployment['id']}", json=often)
    assert changed.status_code == 204, changed.text
    states = [ended(site, run_id) for run_id in fired(site, deployment["id"], 2)]
    off = {"schedules": [{"schedule": {"interval": 20}, "active": False}]}
    site.api.patch(f"/deployments/{deployment['id']}", json=off)
    assert [s["type"] for s in states] == ["COMPLETED", "COMPLETED"], states
    assert states[1]["name"] == "Unchanged"
    assert "are as recorded" in states[1]["message"]
    assert computed(one).count("train") == 1, "the second run computed nothing"
    form = site.api.get("/deployments/name/mine/mine").json()["parameter_openapi_schema"]
    assert form["properties"]["experiment"]["enum"] == ["lineage"], "the new experiment is offered"


def fired(site: Site, deployment: str, wanted: int) -> list[str]:
    """The first runs that the schedule made and a worker took."""
    deadline = time.monotonic() + 300 * (wanted + 4)
    where = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
    while time.monotonic() < deadline:
        runs = site.api.post("/flow_runs/filter", json=where).json()
        taken = [r for r in runs if r["auto_scheduled"] and r["state_type"] != "SCHEDULED"]
        if len(taken) >= wanted:
            return [r["id"] for r in taken[:wanted]]
        time.sleep(1)
    raise TimeoutError(
        f"the schedule did not fire: {[(r['name'], r['state_name'], r['expected_start_time']) for r in runs]}"
    )
