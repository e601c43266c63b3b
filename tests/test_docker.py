"""docker/: what can be checked without an engine, and the same services run from packages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from constitutions.errors import UserError

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
SECRETS = {
    "POSTGRES_PASSWORD", "PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD",
    "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY",
}  # fmt: skip
GIVEN = {name: f"{name.lower()} with $HOME, $${{x}} and 'quotes'" for name in SECRETS}


@pytest.fixture(scope="module")
def packages() -> Any:
    """docker/from_packages.py as a module: the folder is no package."""
    spec = importlib.util.spec_from_file_location("from_packages", DOCKER / "from_packages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services as written, variables unresolved."""
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    return loaded["services"]


def program(name: str) -> str:
    """A program's path, beside this Python or on the PATH; skipped where it is missing."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def compose(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Docker Compose, which needs no engine to check and resolve a file."""
    docker = shutil.which("docker")
    plugin = (
        docker
        and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    )
    command = [str(docker), "compose"] if plugin else [program("docker-compose")]
    return subprocess.run(
        [*command, "--file", str(DOCKER / "compose.yaml"), "--env-file", os.devnull,
         "--profile", "gpu", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **env},
        capture_output=True, text=True,
    )  # fmt: skip


def test_hadolint_finds_nothing() -> None:
    checked = subprocess.run(
        [program("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_compose_resolves_the_file_as_we_do(packages: Any, services: dict[str, Any]) -> None:
    shown = compose("config", "--format", "json", **GIVEN)
    assert shown.returncode == 0, shown.stderr
    theirs = json.loads(shown.stdout)["services"]
    ours = packages.resolve(services, GIVEN)
    assert theirs.keys() == ours.keys()
    for name, service in ours.items():
        # Compose prints a `$` as `$$`, so that its output is a file again
        environment = {
            k: v.replace("$$", "$") for k, v in theirs[name].get("environment", {}).items()
        }
        assert environment == {k: str(v) for k, v in service.get("environment", {}).items()}
        assert theirs[name].get("command") == service.get("command")
        assert theirs[name].get("healthcheck", {}).get("test") == service.get(
            "healthcheck", {}
        ).get("test")
        after = {k: v["condition"] for k, v in theirs[name].get("depends_on", {}).items()}
        assert after == {k: v["condition"] for k, v in service.get("depends_on", {}).items()}


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_starts_without_a_secret(missing: str, packages: Any, tmp_path: Path) -> None:
    for empty in ({**GIVEN, missing: ""}, {k: v for k, v in GIVEN.items() if k != missing}):
        with pytest.raises(UserError, match=rf"(?s){missing}.*docker/env\.example"):
            packages.services(empty, tmp_path)


def test_compose_names_the_missing_secret() -> None:
    refused = compose("config", "--quiet", **{**GIVEN, "MLFLOW_PASSWORD": ""})
    assert refused.returncode != 0
    assert "MLFLOW_PASSWORD is missing a value: give it in docker/.env" in refused.stderr


def test_every_secret_comes_from_outside_and_has_no_default(services: dict[str, Any]) -> None:
    for service in services.values():
        for key, value in service.get("environment", {}).items():
            if re.search("(PASSWORD|AUTH_STRING|_KEY|_TOKEN)$", key):
                assert re.search(r"\$\{\w+:\?", value), f"{key} is not required"
    text = (DOCKER / "compose.yaml").read_text("utf-8")
    assert set(re.findall(r"\$\{(\w+):\?", text)) == SECRETS


def test_the_example_names_every_secret_and_gives_the_defaults(
    packages: Any, services: dict[str, Any], tmp_path: Path
) -> None:
    example = (DOCKER / "env.example").read_text("utf-8")
    assert {k for k, v in packages.read_env(DOCKER / "env.example").items() if not v} == SECRETS
    (tmp_path / "env").write_text(re.sub(r"^# (\w+=)", r"\1", example, flags=re.MULTILINE))
    given = packages.read_env(tmp_path / "env")
    assert len(given) > len(SECRETS) and given.keys() <= packages.variables().keys()
    assert packages.resolve(services, given | GIVEN) == packages.resolve(services, GIVEN)


def test_both_servers_ask_for_a_password(services: dict[str, Any]) -> None:
    assert services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert services["mlflow"]["command"][-2:] == ["--app-name", "basic-auth"]
    assert services["mlflow"]["environment"]["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert services["mlflow"]["environment"]["MLFLOW_FLASK_SERVER_SECRET_KEY"]


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert "ports" not in services["postgres"]
    assert not any("network_mode" in service for service in services.values())


def test_every_service_is_watched_hardened_and_starts_in_order(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and "docker.sock" not in str(service), name
        once = name == "deploy"
        assert service["restart"] == ("on-failure:3" if once else "unless-stopped"), name
        assert ("healthcheck" in service) != once, name
        for other, how in service.get("depends_on", {}).items():
            expected = "completed_successfully" if other == "deploy" else "healthy"
            assert how == {"condition": f"service_{expected}"}, name
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_images_are_pinned_and_run_as_nobody_special(services: dict[str, Any]) -> None:
    text = (DOCKER / "Dockerfile").read_text("utf-8")
    stages = text.split("\nFROM ")[1:]
    assert stages[0].startswith("python:3.11-slim-bookworm AS base")
    targets = {stage.split()[2]: stage for stage in stages[1:]}
    assert all(re.findall(r"^USER (.*)$", t, re.MULTILINE)[-1] == "10001" for t in targets.values())
    built = {s["build"]["target"] for s in services.values() if "build" in s}
    assert built == set(targets)
    installs = re.findall(r"^RUN pip install (.*)$", text, re.MULTILINE)
    assert all(line.startswith("--constraint constraints.txt ") for line in installs)
    assert not re.search(r"^(ARG|ENV) .*(PASSWORD|SECRET|TOKEN)", text, re.MULTILINE)
    images = [service["image"] for service in services.values()]
    assert not any(image.endswith(":latest") or ":" not in image for image in images)


def test_what_the_images_copy_is_there_and_let_through() -> None:
    text = (DOCKER / "Dockerfile").read_text("utf-8")
    copied = {
        n for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for n in line.split()
    }
    let_through = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


@pytest.fixture(scope="module")
def throwaway(packages: Any) -> Any:
    """Random secrets and free ports; one process of MLflow starts sooner than two."""
    return {**packages.throwaway(), "MLFLOW_WORKERS": "1"}


@pytest.fixture(scope="module")
def running(packages: Any, throwaway: Any) -> Iterator[dict[str, str]]:
    """Postgres, Prefect server and MLflow, from packages; yields a client's environment."""
    try:
        packages.postgres_programs()
    except UserError as error:
        pytest.skip(f"no Postgres: {error}")
    with packages.serving(throwaway):
        yield packages.client(throwaway)


def test_who_is_let_in(running: dict[str, str]) -> None:
    servers = {
        f"{running['PREFECT_API_URL']}/flow_runs/count": running["PREFECT_API_AUTH_STRING"],
        f"{running['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search": ":".join(
            (running["MLFLOW_TRACKING_USERNAME"], running["MLFLOW_TRACKING_PASSWORD"])
        ),
    }
    for url, known in servers.items():
        user, password = known.split(":")
        ask: dict[str, Any] = {"json": {"max_results": 1}, "timeout": 60}
        assert httpx.post(url, **ask).status_code == 401
        assert httpx.post(url, auth=(user, "wrong"), **ask).status_code == 401
        assert httpx.post(url, auth=(user, password), **ask).status_code == 200


def test_mlflow_answers_to_its_name_among_the_services_only(running: dict[str, str]) -> None:
    uri, port = running["MLFLOW_TRACKING_URI"], running["MLFLOW_TRACKING_URI"].rpartition(":")[2]
    known = (running["MLFLOW_TRACKING_USERNAME"], running["MLFLOW_TRACKING_PASSWORD"])

    def ask(host: str) -> int:
        url = f"{uri}/api/2.0/mlflow/experiments/search"
        headers = {"Host": host}
        answer = httpx.post(url, json={"max_results": 1}, auth=known, headers=headers, timeout=60)
        return answer.status_code

    assert ask(f"mlflow:{port}") == 200  # as a worker calls it
    assert ask("elsewhere.example") == 403


def test_a_run_through_both_servers_is_in_postgres(
    running: dict[str, str], throwaway: dict[str, str], tmp_path: Path
) -> None:
    import psycopg

    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("one_run.py")],
        env={**os.environ, **running, "PREFECT_HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    ids = json.loads(ran.stdout.splitlines()[-1])  # MLflow prints addresses before it
    assert ids["uri"].startswith("mlflow-artifacts:/")
    assert not list(tmp_path.glob("mlruns*"))

    def row(database: str, user: str, query: str, *values: str) -> Any:
        with psycopg.connect(
            host="127.0.0.1", port=throwaway["POSTGRES_PORT"], dbname=database, user=user,
            password=throwaway[f"{user.upper()}_DATABASE_PASSWORD"],
        ) as connection:  # fmt: skip
            return connection.execute(query, values).fetchone()

    query = "SELECT state_type::text FROM flow_run WHERE id = %s"
    assert row("prefect", "prefect", query, ids["flow_run"]) == ("COMPLETED",)
    assert row("mlflow", "mlflow", "SELECT status FROM runs WHERE run_uuid = %s", ids["run"]) == (
        "FINISHED",
    )
    assert row("mlflow_auth", "mlflow", "SELECT username, is_admin FROM users") == ("staple", True)
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        row("prefect", "mlflow", "SELECT 1")
