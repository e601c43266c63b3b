"""The commands of README and docs/, run as written on a small experiment, in the pages' order.

A command that takes minutes, another model or a server is named with the test that runs it.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import small_loop
import yaml
from command import staple
from pages import COMMANDS, PAGES, README, ROOT, fences

from constitutions import terminal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

RUN = r"(constitution show|ask planted |status|stage|compare|export(?!.* --push)|report|plan llama|plan sami|plan mine\.yaml$|validate mine|run planted --(resume|from))"
"""The commands that are run here."""
ELSEWHERE = {
    r"run planted( --set prompts\.|$)|run planted --set iterations": "tests/test_end_to_end.py",
    r"run (mine\.yaml|FILE|EXPERIMENT|PRESET)": "tests/flows/test_bad_input.py",
    r"plan mine\.yaml --like": "tests/flows/test_plan.py",
    r"run planted --set experiment=mine|run mine --resume|constitution edit": "tests/flows/test_review.py",
    r"run planted-sami|run staple-then-sami|ask planted-sami": "tests/flows/test_sami.py",
    r"constitution write": "tests/flows/test_write.py",
    r"judge": "tests/flows/test_judge.py",
    r"baselines": "tests/flows/test_baselines.py",
    r"accept": "tests/test_old_record.py",
    r"serve": "tests/flows/test_serve.py",
    r"fetch": "tests/models/test_packaged.py",
    r"export planted --(trajectories|constitution)": "tests/flows/test_export_data.py",
    r"export planted .*--push|export planted --push": "tests/flows/test_push.py",
    r"list": "tests/flows/test_listing.py",
    r"up|down": "tests/flows/test_services.py",
}  # fmt: skip
"""Those that are not, and the test that runs such a command."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    """A folder with the experiments `planted` and `planted.star` of a small random model, and the
    README's mine.yaml with its rows."""
    folder = tmp_path_factory.mktemp("pages")
    small_loop.make(folder, migrated_database)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        given = yaml.safe_load(Path("lineage.yaml").read_text())
        rows = [
            {**row, "prompt": f"{row['prompt']} {i}?"} for i in (1, 2) for row in small_loop.ROWS
        ]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given["prompts"]["later"] = 6  # random letters must come near to some golds
        changes: dict[str, dict[str, Any]] = {
            "planted": {"iterations": 2},
            "planted.star": {"method": "star", "iterations": 0},
        }
        for name, how in changes.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump({**given, **how, "experiment": name}))
            small_loop.finished(name)
        (mine,) = fences(README, "yaml")
        Path("mine.yaml").write_text(mine.replace("/models/my-chat-model", str(folder / "model")))
        rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(3_800)]
        Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def here() -> list[tuple[str, ...]]:
    found = [c.words for c in COMMANDS if re.match(RUN, shlex.join(c.words)) and c.written]
    return list(dict.fromkeys(found))


@pytest.fixture
def settled(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("STAPLE_HOME", str(place / ".staple"))
    monkeypatch.setattr(terminal.console, "_width", 80)  # it was read when the console was made
    return place


@pytest.mark.parametrize("words", here(), ids=shlex.join)
def test_runs_as_written(
    words: tuple[str, ...], settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = staple(capsys, *words)
    assert ran.code == 0, ran.err
    assert ran.out


def test_every_other_command_is_run_by_a_named_test() -> None:
    assert len(here()) >= 15
    for command in COMMANDS:
        told = shlex.join(command.words)
        if not command.written:
            continue
        found = [test for known, test in ELSEWHERE.items() if re.match(known, told)]
        assert found or command.words in here(), f"{command}: no test runs it"
    for test in ELSEWHERE.values():
        assert (ROOT / test).exists()


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        tuple(text[2:].split("\n", 1))
        for page in PAGES
        for text in fences(page, "text")
        if text.startswith("$ staple ")
    ],
)
def test_the_output_is_as_shown(
    command: str, shown: str, settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = staple(capsys, *shlex.split(command)[1:])
    assert ran.out.split() == shown.split()
