"""The record's database may have a password: it stands in no argument of a server, in no message."""

from __future__ import annotations

from pathlib import Path

import pytest

from constitutions.errors import UserError
from flows.server import services
from flows.settings import load_settings

URI = "postgresql://someone:s3cr3t@database/mlflow"


def test_the_mlflow_server_is_told_its_database_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everyone on a machine can read the arguments of its processes."""
    from mlflow.cli import server

    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path))
    services.login_file().parent.mkdir()
    command, environment = services._mlflow_server(5000)
    assert "s3cr3t" not in " ".join(command)
    (option,) = [o for o in server.params if o.name == "backend_store_uri"]
    assert environment[str(option.envvar)] == URI


@pytest.mark.parametrize(
    "address", ["http://someone:s3cr3t@host/v1", "http://host/v1?api_key=s3cr3t"]
)
def test_an_endpoints_password_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("planted", [f"policy.endpoint={address}"])
    assert "policy.endpoint" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
