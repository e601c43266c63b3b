"""Bad input ends with one message that names the place, exit code 2, and nothing computed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from chat_model import build_chat_model
from command import Ran, staple

from flows.settings import presets

GOOD = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def run(workplace: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`staple run` on rows (or raw bytes) and settings."""

    def go(rows: object = GOOD, **settings: object) -> Ran:
        data = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()  # type: ignore[call-overload]
        Path("rows.jsonl").write_bytes(data)
        experiment = {
            "experiment": "bad",
            "iterations": 1,
            "policy": {"model": str(model), "dtype": "float32", "device": "cpu"},
            "prompts": {"sources": [{"path": "rows.jsonl"}], "first": 4, "held_out": 4},
        } | settings
        Path("e.yaml").write_text(yaml.safe_dump(experiment))
        ran = staple(capsys, "run", "e.yaml")
        assert "Traceback" not in ran.err
        assert not Path("mlruns").exists(), "nothing may be computed"
        return ran

    return go


def sources(**change: object) -> dict[str, object]:
    return {"sources": [{"path": "rows.jsonl"} | change], "first": 4, "held_out": 4}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "What?"}, "gold"),
        ({"prompt": "What?", "gold": ""}, "gold"),
        ({"prompt": "  ", "gold": "It."}, "prompt"),
        ({"prompt": "x" * 200_000, "gold": "It."}, "200,000"),
        ({"prompt": 7, "gold": "It."}, "prompt"),
        ({"prompt": "What is 1?", "gold": "It is 1."}, "rows.jsonl:2"),
    ],
    ids=["no gold", "empty gold", "empty prompt", "long prompt", "wrong type", "duplicate"],
)
def test_a_bad_row(run: Callable[..., Ran], row: dict[str, object], named: str) -> None:
    ran = run([*GOOD, row])
    assert ran.code == 2
    assert named in ran.err
    assert "rows.jsonl" in ran.err
    assert "9" in ran.err  # the row's number


def test_broken_utf8(run: Callable[..., Ran]) -> None:
    good = "\n".join(map(json.dumps, GOOD)).encode()
    ran = run(good + b'\n{"prompt": "Wh\xff?", "gold": "It."}\n')
    assert ran.code == 2
    assert "UTF-8" in ran.err
    assert "9" in ran.err


def test_a_missing_file(run: Callable[..., Ran]) -> None:
    ran = run(prompts=sources(path="nowhere.jsonl"))
    assert ran.code == 2
    assert "nowhere.jsonl" in ran.err


def test_too_few_rows(run: Callable[..., Ran]) -> None:
    ran = run(GOOD[:5])
    assert ran.code == 2
    assert "5" in ran.err


def test_every_configuration_error_at_once(run: Callable[..., Ran]) -> None:
    ran = run(mine={"sampels": 3, "temperature": "hot"}, iterations=-1, evaluate={"judge": "me"})
    assert ran.code == 2
    for named in ("mine.sampels", "samples", "mine.temperature", "iterations", "evaluate.judge"):
        assert named in ran.err


def test_settings_data_and_model_are_checked_together(run: Callable[..., Ran]) -> None:
    ran = run(policy={"model": "./no-model"}, prompts=sources(path="nowhere.jsonl"))
    assert ran.code == 2
    assert "no-model" in ran.err
    assert "nowhere.jsonl" in ran.err


@pytest.mark.parametrize("lacking", ["tokenizer", "safetensors", "config"])
def test_an_incomplete_model_directory(
    run: Callable[..., Ran], model: Path, tmp_path: Path, lacking: str
) -> None:
    incomplete = tmp_path / "incomplete"
    shutil.copytree(model, incomplete)
    for file in incomplete.iterdir():
        if lacking in file.name and "generation" not in file.name:
            file.unlink()
    ran = run(policy={"model": str(incomplete)})
    assert ran.code == 2
    assert lacking in ran.err
    assert "incomplete" in ran.err


def test_a_full_disk_is_seen_first(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import preflight

    monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", 1 << 60)
    ran = run()
    assert ran.code == 2
    assert "free" in ran.err


def test_a_disk_that_fills_up_is_said_without_a_traceback(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`/dev/full` is a device on which every write finds no space left."""
    from flows import preflight
    from flows.commands.failures import explained

    def write(*_: object) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    monkeypatch.setattr(preflight, "check", write)
    ran = staple(capsys, "run", "planted")
    assert ran.code == 1
    assert "disk is full" in ran.err
    assert "Traceback" not in ran.err
    wrapped = RuntimeError("(sqlite3.OperationalError) database or disk is full")
    assert "disk is full" in str(explained(wrapped))
    assert explained(RuntimeError("something else")) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "plantd"], "planted"),
        (["run", "planted", "--set", "mine.samples"], "key=value"),
        (["status", "never-run"], "never-run"),
        (["ask", "never-run", "Why?"], "never-run"),
        (["stage", "mine", "--experiment", "never-run", "--iteration", "1"], "never-run"),
        (["run", "planted", "--set", "experiment=../escape"], "experiment"),
    ],
)
def test_a_wrong_word_on_the_command_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    ran = staple(capsys, *arguments)
    assert ran.code == 2
    assert named in ran.err
    assert "Traceback" not in ran.err


def test_good_input_passes(run: Callable[..., Ran], capsys: pytest.CaptureFixture[str]) -> None:
    run(GOOD[:5])
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    for file in ("e.yaml", "rows.jsonl", "planted"):
        ran = staple(capsys, "validate", file)
        assert (ran.code, "can be run" in ran.out) == (0, True)


@pytest.mark.parametrize("preset", presets())
def test_a_presets_name_is_no_data_file(
    workplace: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    """Some have a dot in their name. Offline the large ones end at the hub, and a packaged one is not fetched."""
    ran = staple(capsys, "validate", preset)
    assert ran.code == 0 or re.search("hub|staple fetch", ran.err.lower())
    assert "no such file" not in ran.err
