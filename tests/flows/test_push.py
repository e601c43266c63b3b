"""`staple export --push`: what a hub is sent, and what is said where it refuses. The hub is a local
double (`tests/hub_double.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import staple
from hub_double import Hub, running

from flows.commands.push import push
from flows.schema import ExperimentSettings

SECRET = "hf_of-nobody"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files as LFS
    with running(SECRET) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


def test_a_policy_becomes_a_private_model(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "helper-3"
    folder.mkdir()
    files = {
        "README.md": b"---\ntags: []\n---\n# helper\n",
        "adapter_model.safetensors": b"\0" * 99,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert push(folder, "ann/helper") == f"{hub.address}/ann/helper"
    assert hub.files["models/ann/helper"] == files
    (created,) = hub.created
    assert created["visibility"] == "private" and created["organization"] == "ann"

    (folder / "README.md").write_bytes(b"# better\n")
    push(folder, "ann/helper")
    assert hub.files["models/ann/helper"]["README.md"] == b"# better\n"
    assert len(hub.created) == 1


def test_trajectories_become_a_data_set(
    at_home: ExperimentSettings, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("export", "lineage", "--trajectories", "sft", "--out", "rows.sft.jsonl")
    ran = staple(capsys, *wanted, "--push", "ann/rows")
    assert ran.code == 0, ran.err
    file = Path("rows.sft.jsonl")
    assert hub.files["datasets/ann/rows"] == {file.name: file.read_bytes()}
    assert f"{hub.address}/datasets/ann/rows" in (ran.out + ran.err).replace("\n", "")
    assert SECRET not in ran.out + ran.err
    assert not any(SECRET in line for line in hub.asked)


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("not a name", SECRET, "no repository can have this name"),
        ("ann/helper", "", "HF_TOKEN is not set"),
        ("ann/helper", "hf_wrong", "the hub refused it (401)"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    at_home: ExperimentSettings,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    token: str,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    ran = staple(capsys, "export", "lineage", "--out", "refused", "--push", name)
    assert ran.code == 2 and said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err and (not token or token not in ran.err)
    assert not Path("refused").exists() and not hub.files


def test_a_hub_that_is_away(
    at_home: ExperimentSettings,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ran = staple(capsys, "export", "lineage", "--out", "refused", "--push", "ann/helper")
    assert ran.code == 2 and "no hub answers" in ran.err
