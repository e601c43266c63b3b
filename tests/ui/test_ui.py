"""`staple up`, and what a person does in the browser: a stage from its form, a review answered.

Everything is real: servers, workers, deployments, a recorded experiment, Chromium. The tests build
on one another in their order.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import small_loop
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright

from constitutions.constitution import load
from flows.experiment import note_settings
from flows.server.services import MARK
from flows.settings import load_settings
from tasks.record.record import Record
from tasks.rows import Rejected

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or ""
browser_test = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt install chromium")


@dataclass(frozen=True)
class Place:
    """A working directory where `staple up` ran."""

    folder: Path
    prefect: str
    mlflow: str

    @property
    def record(self) -> Record:
        return Record("small", self.folder / ".staple", self.mlflow)

    @property
    def login(self) -> tuple[str, str]:
        """Name and password of both servers."""
        name, password = (self.folder / ".staple/services/login").read_text().strip().split(":")
        return name, password

    def staple(self, *arguments: str) -> str:
        return staple(self.folder, *arguments)

    def services(self) -> dict[str, dict[str, Any]]:
        """What is noted of the services, by name."""
        noted = (self.folder / ".staple/services/services.json").read_text()
        return {entry["name"]: entry for entry in json.loads(noted)}

    def deployment(self, name: str) -> str:
        """The URL of a deployment in Prefect's API."""
        address = f"{self.prefect}/api/deployments/name/{name}/{name}"
        found = httpx.get(address, auth=self.login, timeout=300).json()
        return f"{self.prefect}/api/deployments/{found['id']}"


def staple(folder: Path, *arguments: str) -> str:
    """Run `staple` in a process of its own; its output. It finds the services by itself."""
    foreign = (
        "PREFECT_API",
        "PREFECT_SERVER_DATABASE",
        "PREFECT_HOME",
        "MLFLOW_TRACKING",
        "STAPLE",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {"HOME": str(folder.parent), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", *arguments],
        cwd=folder,
        env={**kept, **own},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, small: Path, prefect_home: Path) -> Path:
    """A folder with a finished experiment of two iterations, made without any service."""
    folder = tmp_path_factory.mktemp("ui")
    small_loop.copy_finished(small, folder)
    shutil.copy(prefect_home / "prefect.db", folder / ".staple")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        note_settings(load_settings("small.yaml"))
    return folder


@pytest.fixture(scope="module")
def place(recorded: Path) -> Iterator[Place]:
    with up(recorded) as found:
        yield found


@contextmanager
def up(folder: Path) -> Iterator[Place]:
    """Within the block the services of `staple up` run in a folder."""
    prefect, mlflow = free_port(), free_port()
    try:
        shown = staple(folder, "up", "--port", str(prefect), "--mlflow-port", str(mlflow))
        found = Place(folder, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}")
        assert found.prefect in shown and found.mlflow in shown
        user, password = found.login
        with pytest.MonkeyPatch.context() as patch:  # for `Place.record`
            patch.setenv("MLFLOW_TRACKING_USERNAME", user)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            yield found
    finally:
        staple(folder, "down")


@pytest.fixture(scope="module")
def page(place: Place) -> Iterator[Any]:
    """A page of a real browser, 1280 pixels wide."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        sign_in(page, place)
        yield page
        browser.close()


@browser_test
def test_one_stage_from_its_form(place: Place, page: Any) -> None:
    before = place.record.needs("cluster", 2)
    page.goto(f"{place.prefect}/v2/deployments")
    page.get_by_role("link", name="cluster").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    choose(page, page.get_by_label("Select experiment"), "small")
    page.get_by_label("iteration").first.fill("2")
    page.get_by_label("distance_threshold").fill("predictive")
    page.get_by_label("max_principles").fill("3")
    page.get_by_label("Select representative").click()
    assert page.get_by_role("option").all_inner_texts() == ["medoid", "mode", "none"]
    page.keyboard.press("Escape")
    assert page.get_by_text("every kind of features. Default: 0.8.").is_visible()
    sent = submit(page)
    assert sent == {
        "experiment": "small",
        "iteration": 2,
        "settings": {"distance_threshold": "predictive", "max_principles": 3},
        "force": False,
    }
    page.get_by_role("link", name="small cluster 2").wait_for(timeout=300_000)
    page.get_by_text("Completed").first.wait_for(timeout=300_000)

    after = place.record.needs("cluster", 2)
    assert after.run_id != before.run_id
    assert len(load(after.path("constitution.yaml")).principles) == 3

    page.goto(f"{place.mlflow}/#/experiments/{place.record.experiment_id}/runs")
    iteration = page.get_by_role("row").filter(has_text="iteration 2").first
    iteration.get_by_role("button").first.click()
    page.get_by_text("mine 2", exact=True).wait_for()
    assert page.get_by_text("cluster 2", exact=True).count() == 2

    shown = place.staple("status", "small")
    assert "train 2 is stale: cluster 2 has changed" in shown
    changed = "cluster.distance_threshold=predictive, cluster.max_principles=3"
    assert f"changed for iteration 2 alone: {changed}" in " ".join(shown.split())


@browser_test
def test_a_review_answered_in_its_form(place: Place, page: Any) -> None:
    clustered = place.record.needs("cluster", 1)
    trained = place.record.needs("train", 1)
    page.goto(f"{place.prefect}/v2/deployments")
    page.get_by_role("link", name="experiment").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_label("source").first.fill("small")
    page.get_by_label("iterations").first.fill("1")
    choose(page, page.get_by_label("Select enabled"), "yes")
    assert submit(page)["settings"] == {"iterations": "1", "review": {"enabled": "yes"}}
    page.get_by_role("button", name="View run").click()
    page.get_by_text("Suspended").first.wait_for(timeout=300_000)
    assert place.record.current("review", 1) is None
    assert place.record.needs("train", 1).run_id == trained.run_id

    form = resume_form(page)
    form.get_by_label("Your name").fill("Ada")
    form.get_by_label("Drop it").nth(0).click()
    form.get_by_label("Wording").nth(1).fill("Say thanks first.")
    assert (
        sent(page, form.get_by_role("button", name="Resume"), "/resume").json()["status"]
        == "ACCEPT"
    )
    run = eventually(lambda: ended(place, "experiment", but="Unchanged"))
    assert run["state"]["type"] == "COMPLETED", run["state"]

    proposed = load(clustered.path("constitution.yaml")).texts
    reviewed = place.record.needs("review", 1)
    approved = load(reviewed.path("constitution.yaml")).texts
    assert proposed[0] not in approved
    assert "Say thanks first." in approved and proposed[1] not in approved
    assert set(proposed[2:]) <= set(approved)
    assert reviewed.read("rejected", Rejected)
    again = place.record.needs("train", 1)
    assert again.run_id != trained.run_id
    assert reviewed.digest in {source.digest for source in again.inputs.values()}


@browser_test
def test_two_checkouts_side_by_side(
    place: Place, page: Any, prefect_home: Path, tmp_path: Path
) -> None:
    """Each has runs and forms of its own, under one user's login and home."""
    (tmp_path / ".staple").mkdir()
    shutil.copy(prefect_home / "prefect.db", tmp_path / ".staple")
    before = deployments(place)
    with up(tmp_path) as other:
        sign_in(page, other)
        page.get_by_text("Run a task or flow to get started").first.wait_for()
        assert page.get_by_text("small cluster 2").count() == 0
        fields = deployments(other)["cluster"]["parameter_openapi_schema"]["properties"]
        assert "enum" not in fields["experiment"], "it has no experiment to offer"
        page.goto(f"{other.mlflow}/#/experiments")
        page.get_by_text("Default", exact=True).first.wait_for()
        assert page.get_by_text("small", exact=True).count() == 0
    assert deployments(place) == before, "nothing of the first was written over"
    page.goto(f"{place.prefect}/v2/runs")
    page.get_by_text("small cluster 2").first.wait_for()


def test_a_mistaken_parameter_is_refused(place: Place) -> None:
    def refused(deployment: str, parameters: dict[str, Any]) -> str:
        url = f"{place.deployment(deployment)}/create_flow_run"
        answer = asked(place, url, {"parameters": parameters})
        assert answer.status_code == 409
        return str(answer.json()["detail"])

    one = {"experiment": "small", "iteration": 2}
    assert "'bogus' was unexpected" in refused("cluster", {**one, "bogus": 1})
    assert "'bogus' was unexpected" in refused("cluster", {**one, "settings": {"bogus": 1}})
    assert "settings.max_principles" in refused(
        "cluster", {**one, "settings": {"max_principles": 0}}
    )
    assert "mine" in refused("experiment", {"settings": {"mine": {"samples": "many"}}})
    assert "'nosuch' is not one of ['small']" in refused(
        "filter", {"experiment": "nosuch", "iteration": 1}
    )


def test_a_mistaken_iteration_fails_with_a_message(place: Place) -> None:
    parameters = {"experiment": "small", "iteration": 8}
    asked(place, f"{place.deployment('filter')}/create_flow_run", {"parameters": parameters})
    run = eventually(lambda: ended(place, "filter"))
    assert run["state"]["type"] == "FAILED"
    assert "iteration 8" in run["state"]["message"], run["state"]


def test_up_again_starts_only_what_is_not_running(place: Place) -> None:
    before = place.services()
    assert "running already" in place.staple("up")
    assert place.services() == before
    nightly = {"schedules": [{"schedule": {"cron": "0 3 * * *"}, "active": True}]}
    how: dict[str, Any] = {"auth": place.login, "timeout": 300}
    httpx.patch(place.deployment("experiment"), json=nightly, **how).raise_for_status()
    psutil.Process(before["cpu"]["pid"]).kill()
    place.staple("up")
    (kept,) = httpx.get(place.deployment("experiment"), **how).json()["schedules"]
    assert (kept["schedule"]["cron"], kept["active"]) == ("0 3 * * *", True)
    after = place.services()
    assert {name for name in after if after[name] != before[name]} == {"cpu"}


def test_down_ends_exactly_what_up_started(place: Place) -> None:
    marks = {service["mark"] for service in place.services().values()}
    command = [sys.executable, "-c", "import time; time.sleep(300)", "prefect", "worker", "start"]
    foreign = subprocess.Popen(command)
    left = ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *command]  # as a killed worker does
    marked = {**os.environ, MARK: place.services()["gpu"]["mark"]}
    orphan = int(subprocess.run(left, env=marked, capture_output=True, check=True).stdout)
    try:
        assert "prefect, mlflow, gpu, cpu" in place.staple("down")
        assert foreign.poll() is None
        assert not psutil.pid_exists(orphan)
        assert not [p for p in psutil.process_iter() if mark_of(p) in marks]
        assert "nothing" in place.staple("down")
    finally:
        foreign.kill()
        foreign.wait()


# What the tests share ------------------------------------------------------------------------------


def submit(page: Any) -> dict[str, Any]:
    """Send a run's form; its parameters."""
    answer = sent(page, page.get_by_role("button", name="Submit"), "/create_flow_run")
    assert answer.status == 201, answer.text()
    return dict(json.loads(answer.request.post_data)["parameters"])


def sent(page: Any, button: Any, address: str) -> Any:
    """The server's answer to a form that a button sends. On SQLite it is sometimes too busy."""
    for _ in range(6):
        with page.expect_response(lambda answer: answer.url.endswith(address)) as answered:
            button.click()
        if answered.value.status != 503:
            break
    return answered.value


def resume_form(page: Any) -> Any:
    """The form that a suspended run waits for. Prefect saves it after the state "Suspended": a page
    that asks in between shows an error, and is loaded again."""
    for _ in range(6):
        page.reload()
        page.get_by_role("button", name="Open menu").click()
        page.get_by_role("menuitem", name="Resume").click()
        form = page.get_by_role("dialog")
        with suppress(PlaywrightTimeout):
            form.get_by_label("Your name").wait_for(timeout=30_000)
            break
    return form


def sign_in(page: Any, place: Place) -> None:
    """Give both servers the login; Prefect's first page is open then."""
    login = ":".join(place.login)
    page.goto(place.mlflow.replace("//", f"//{login}@"))  # as the browser's own dialog does
    page.goto(f"{place.prefect}/v2")
    page.get_by_placeholder("admin:pass").fill(login)
    page.get_by_role("button", name="Login").click()
    page.wait_for_url(lambda url: "/dashboard" in url)


def deployments(place: Place) -> dict[str, dict[str, Any]]:
    """What Prefect's server knows of each deployment, by name; workers change their pools."""
    address = f"{place.prefect}/api/deployments/filter"
    found = httpx.post(address, json={}, auth=place.login, timeout=300).json()
    kept = ("id", "parameter_openapi_schema", "schedules", "entrypoint")
    return {one["name"]: {name: one[name] for name in kept} for one in found}


def choose(page: Any, box: Any, option: str) -> None:
    """Choose from a drop-down."""
    box.click()
    page.get_by_role("option", name=option, exact=True).click()


def asked(place: Place, url: str, body: Any) -> httpx.Response:
    """POST, again while the server is too busy."""
    for _ in range(6):
        answer = httpx.post(url, json=body, auth=place.login, timeout=300)
        if answer.status_code != 503:
            break
    return answer


def ended(place: Place, deployment: str, but: str = "") -> dict[str, Any] | None:
    """The newest run of a deployment that came to an end (but in another state than this one)."""
    query = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_DESC"}
    address = f"{place.prefect}/api/flow_runs/filter"
    runs = httpx.post(address, json=query, auth=place.login, timeout=300).json()
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    found = (run for run in runs if run["state"]["type"] in final)
    return next((run for run in found if run["state"]["name"] != but), None)


def eventually(look: Callable[[], T | None], seconds: float = 600) -> T:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)
    return found


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
