"""Who is let in at Prefect's server, and what a run may bring."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.client.base import PrefectHttpxSyncClient
from servers import free_port
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows.server import pools, services
from flows.server.pools import RUN_ID, WORKER, client_of, deploy, end_dead_runs, offer_experiments
from flows.server.prefect_server import is_ours

ROOT = Path(__file__).parents[2]


def heads(host: str, *origins: str) -> list[tuple[bytes, bytes]]:
    pairs = [("host", host), *(("origin", origin) for origin in origins)]
    return [(name.encode(), value.encode("latin-1")) for name, value in pairs]


@pytest.mark.parametrize(
    ("host", "origins"),
    [
        ("127.0.0.1:4200", ()),
        ("localhost:4200", ("http://127.0.0.1:4200",)),  # the page by one name, the API by another
        ("LOCALHOST:9999", ("http://localhost:9999",)),  # through a tunnel
        ("[::1]:4200", ("http://[::1]:4200",)),
    ],
)
def test_pages_of_this_machines_server_are_let_in(host: str, origins: tuple[str, ...]) -> None:
    assert is_ours(heads(host, *origins))


@pytest.mark.parametrize(
    ("host", "origins"),
    [
        ("evil.example:4200", ()),  # DNS rebinding
        ("127.0.0.1.evil.example", ()),
        ("localhost.:4200", ()),
        ("127.0.0.1@evil.example", ()),
        ("é", ()),
        ("", ()),
        ("127.0.0.1:4200", ("http://evil.example",)),
        ("127.0.0.1:4200", ("null",)),  # a file, a sandboxed frame
        ("127.0.0.1:4200", ("http://127.0.0.1:8888",)),  # another server of this machine
        ("127.0.0.1:4200", ("https://127.0.0.1:4200",)),
        ("127.0.0.1:4200", ("http://127.0.0.1:4200", "http://evil.example")),
    ],
)
def test_other_hosts_and_origins_are_not(host: str, origins: tuple[str, ...]) -> None:
    assert not is_ours(heads(host, *origins))


def test_a_request_names_one_host() -> None:
    assert not is_ours([])
    assert not is_ours([*heads("127.0.0.1:1"), *heads("evil.example")])


# With real servers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    folder: Path
    url: str
    mlflow: str
    login: str
    shown: str

    def asked(self, **headers: str) -> int:
        """The status of a harmless request to Prefect's API, with the password unless one comes."""
        own = {"authorization": httpx.BasicAuth(*self.login.split(":"))._auth_header, **headers}
        return httpx.post(
            f"{self.url}/api/flows/filter", json={}, headers=own, timeout=60
        ).status_code


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, prefect_home: Path
) -> Iterator[Site]:
    """`staple up` in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(prefect_home, folder / "prefect")
    (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
    prefect, mlflow = free_port(), free_port()
    try:
        shown = staple(folder, "up", "--port", str(prefect), "--mlflow-port", str(mlflow))
        login = (folder / ".staple/services/login").read_text().strip()
        urls = f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}"
        yield Site(folder, *urls, login, shown)
    finally:
        staple(folder, "down")


def staple(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Run `staple` in a process of its own; what it prints."""
    foreign = ("PREFECT_API", "PREFECT_SERVER", "MLFLOW_TRACKING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {"PREFECT_HOME": f"{folder}/prefect", "STAPLE_HOME": f"{folder}/.staple"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.program", *arguments],
        cwd=folder,
        env={**kept, **own, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


def test_the_password_is_printed_once_and_kept_for_its_owner(site: Site) -> None:
    folder = site.folder / ".staple" / "services"
    assert site.login in site.shown
    assert (folder / "login").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    secret = site.login.partition(":")[2]
    assert len(secret) >= 32
    for log in folder.glob("*.log"):
        assert secret not in log.read_text()
        assert log.stat().st_mode & 0o777 == 0o600
    for process in psutil.process_iter():
        try:
            assert not any(secret in word for word in process.cmdline())
        except psutil.Error:
            continue


def test_who_is_let_in(site: Site) -> None:
    assert site.asked() == 200
    assert site.asked(origin=site.url) == 200
    assert site.asked(authorization="") == 401
    assert site.asked(authorization=httpx.BasicAuth("staple", "guess")._auth_header) == 401
    assert site.asked(host="evil.example") == 403
    assert site.asked(origin="http://evil.example") == 403
    assert httpx.get(site.url, headers={"host": "evil.example"}, timeout=300).status_code == 403
    page = httpx.get(site.url, headers={"accept": "text/html"}, follow_redirects=True, timeout=300)
    assert "<title>" in page.text


def test_whom_mlflow_lets_in(site: Site) -> None:
    user, password = site.login.split(":")

    def asked(auth: tuple[str, str] | None = (user, password), **head: str) -> int:
        address = f"{site.mlflow}/api/2.0/mlflow/experiments/search"
        body = {"max_results": 1}
        return httpx.post(address, json=body, headers=head, auth=auth, timeout=300).status_code

    assert asked() == 200
    assert asked(auth=None) == 401
    assert asked(auth=(user, "guess")) == 401
    assert asked(host="evil.example") == 403
    assert asked(origin="http://evil.example") == 403
    assert httpx.get(site.mlflow, timeout=300).status_code == 401


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"])
def test_a_wrong_login_of_the_environment_is_named(site: Site, variable: str) -> None:
    wrong = {variable: "some:guess"}
    said = staple(site.folder, "run", "planted", "--set", "iterations=0", code=2, **wrong)
    assert variable in said and "refuses the login" in said
    assert "Traceback" not in said and "guess" not in said


def test_a_websocket_is_guarded_too(site: Site) -> None:
    address = site.url.replace("http", "ws") + "/api/events/in"
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin="http://evil.example")  # type: ignore[arg-type]
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, additional_headers={"Origin": "null"})


@pytest.mark.parametrize(
    "brought",
    [{"command": "touch brought"}, {"env": {"PATH": "."}}, {"working_dir": "/"}],
    ids=lambda brought: next(iter(brought)),
)
def test_a_run_brings_no_program_of_its_own(site: Site, brought: dict[str, object]) -> None:
    with client(site) as api:
        found = api.get("/deployments/name/score/score").json()
        body = {"parameters": {"experiment": "x", "iteration": 1}, "job_variables": brought}
        with pytest.raises(httpx.HTTPStatusError) as refused:
            api.post(f"/deployments/{found['id']}/create_flow_run", json=body)
        assert refused.value.response.status_code == 422, refused.value.response.text
        assert not found["job_variables"]


def client(site: Site) -> PrefectHttpxSyncClient:
    """Prefect's own: it tries again where the server is busy (503, "database is locked")."""
    name, password = site.login.split(":")
    # no connection that the server may be closing
    fresh = httpx.Limits(max_keepalive_connections=0)
    return PrefectHttpxSyncClient(
        base_url=f"{site.url}/api", auth=(name, password), timeout=120, limits=fresh
    )


def test_a_pool_of_before_is_closed_too(site: Site) -> None:
    """Pools that were made by hand, or by an earlier version, let a run bring a command."""
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with client(site) as api:
        api.patch("/work_pools/cpu", json={"base_job_template": template, "concurrency_limit": 7})
        login = {"PREFECT_API_AUTH_STRING": site.login}
        deploy(f"{site.url}/api", {**os.environ, **login}, [])
        pool = api.get("/work_pools/cpu").json()
    assert set(pool["base_job_template"]["variables"]["properties"]) == {
        "name",
        "labels",
        "stream_output",
    }
    assert pool["concurrency_limit"] == 7, "a person's limit stays"


def test_runs_of_dead_workers_are_marked_and_no_others(site: Site) -> None:
    run_of = {"dead": "gpu-dead", "elsewhere": "gpu-of-another-machine", "still here": "gpu-dead"}
    with client(site) as api:
        found = api.get("/deployments/name/mine/mine").json()
        runs = {}
        for name, worker in run_of.items():
            parameters = {"experiment": "x", "iteration": 1}
            # far from now: no worker takes it by itself
            later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00Z"}}
            body = {"parameters": parameters, "name": name, "state": later}
            made = api.post(f"/deployments/{found['id']}/create_flow_run", json=body)
            runs[name] = made.json()["id"]
            api.patch(f"/flow_runs/{runs[name]}/labels", json={WORKER: worker})
            running = {"state": {"type": "RUNNING"}, "force": True}
            api.post(f"/flow_runs/{runs[name]}/set_state", json=running)
        sleeping = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            env={**os.environ, RUN_ID: runs["still here"]},
        )
        try:
            with pools.client_of(f"{site.url}/api", site.login) as prefect:
                assert end_dead_runs(prefect, {"gpu-dead"}, alone=True) == ["dead"]
        finally:
            sleeping.kill()
            sleeping.wait()
        states = {name: api.get(f"/flow_runs/{run}").json()["state"] for name, run in runs.items()}
    assert {name: state["type"] for name, state in states.items()} == {
        "dead": "CRASHED",
        "elsewhere": "RUNNING",
        "still here": "RUNNING",
    }
    assert "gpu-dead died" in states["dead"]["message"]


def test_after_everything_was_killed_the_slot_is_free(site: Site) -> None:
    """The last test here: SIGKILL to all services, with a run in the pool's only slot."""
    noted = json.loads((site.folder / ".staple/services/services.json").read_text())
    (worker,) = [entry["name"] and entry["mark"] for entry in noted if entry["name"] == "gpu"]
    with client(site) as api:
        found = api.get("/deployments/name/mine/mine").json()
        body = {"parameters": {"experiment": "x", "iteration": 1}, "name": "lost"}
        later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00Z"}}
        made = api.post(
            f"/deployments/{found['id']}/create_flow_run", json={**body, "state": later}
        ).json()
        api.patch(f"/flow_runs/{made['id']}/labels", json={WORKER: worker})
        api.post(
            f"/flow_runs/{made['id']}/set_state",
            json={"state": {"type": "RUNNING"}, "force": True},
        )
    for entry in noted:
        for process in services._of(entry["mark"]):
            process.kill()
    port, mlflow = (url.rpartition(":")[2] for url in (site.url, site.mlflow))
    shown = staple(site.folder, "up", "--port", port, "--mlflow-port", mlflow)
    assert "Crashed  lost" in shown
    assert site.login not in shown, "the password stays, and is printed once"
    with client(site) as api:
        assert api.get(f"/flow_runs/{made['id']}").json()["state"]["type"] == "CRASHED"


def test_forms_offer_recorded_experiments(site: Site) -> None:
    url, login = f"{site.url}/api", {"PREFECT_API_AUTH_STRING": site.login}
    deploy(url, {**os.environ, **login}, ["first"])
    with client(site) as api, client_of(url, site.login) as prefect:

        def form(stage: str) -> dict[str, Any]:
            found = api.get(f"/deployments/name/{stage}/{stage}").json()
            return dict(found["parameter_openapi_schema"])

        assert form("mine")["properties"]["experiment"]["enum"] == ["first"]
        by_hand = api.get("/deployments/name/score/score").json()["id"]
        opened = {**form("score"), "additionalProperties": True}
        api.patch(f"/deployments/{by_hand}", json={"parameter_openapi_schema": opened})
        offer_experiments(prefect, ["second", "first"])
        assert form("mine")["properties"]["experiment"]["enum"] == ["first", "second"]
        assert form("score") == opened, "another record's, perhaps"
        assert "enum" not in form("experiment")["properties"]["source"], "it may be a file"
