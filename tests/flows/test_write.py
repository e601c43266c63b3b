"""`staple constitution write`: a real small writer, its file, and what is refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import staple
from planted_writer import WRITER
from review_world import clustered_attempt

from constitutions.constitution import load, principle_id
from constitutions.review import Decision
from flows.experiment import note_settings, open_experiment, recorded_settings
from flows.review import record_review
from flows.schema import ExperimentSettings
from models.planted import pretrain
from models.planted.oracle import behaviour_of
from models.policy import PolicySettings
from tasks.record.record import Attempt
from tasks.review import ReviewDecision

HELD: dict[str, Any] = {
    "templates": "terse",
    "dtype": "float32",
    "device": "cpu",
    "quantization": "none",
    "threads": 1,
}


@pytest.fixture
def writer(planted_writer: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the model that "planted-sami" names here, in an empty working directory."""
    monkeypatch.setitem(pretrain.RECIPES, "planted-sami", WRITER)
    (workplace / ".staple").mkdir()
    (workplace / ".staple" / "planted").symlink_to(planted_writer)
    return next(planted_writer.glob("planted-*"))


@pytest.fixture
def clustered(writer: Path) -> Attempt:
    """An experiment of that policy whose first iteration got as far as its constitution."""
    policy = PolicySettings(model=str(writer), **HELD)
    settings = ExperimentSettings(experiment="found", iterations=1, policy=policy)
    note_settings(settings)
    return clustered_attempt(open_experiment(settings).slot(1))


@pytest.mark.usefixtures("writer")
def test_the_planted_writer_needs_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "constitution", "write")
    assert ran.code == 0, ran.err
    found = load("constitution.yaml")
    assert len(found.principles) == 8
    assert sum(behaviour_of(p.text) is not None for p in found.principles) >= 5
    assert all(p.text in ran.out and p.antithesis in ran.out for p in found.principles)
    assert "rejected" in ran.out
    first = Path("constitution.yaml").read_bytes()
    assert staple(capsys, "constitution", "write", "--out", "again.yaml").code == 0
    assert Path("again.yaml").read_bytes() == first
    assert staple(capsys, "constitution", "write", "--out", "b.yaml", "--seed", "1").code == 0


def test_topics_number_and_settings_are_options(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [part for name, value in HELD.items() for part in ("--set", f"writer.{name}={value}")]
    options = ["--topic", "cost", "--topic", "waste", "--principles", "4", "--model", str(writer)]
    ran = staple(capsys, "constitution", "write", *options, *held, "--set", "max_tokens=16")
    assert ran.code == 0, ran.err
    found = load("constitution.yaml")
    assert len(found.principles) == 4
    assert sum("cost" in p.text or "waste" in p.text for p in found.principles) >= 3


@pytest.mark.usefixtures("writer")
def test_why_something_was_rejected_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    many = ("--principles", "40", "--set", "attempts=1", "--set", "similar=0.75")
    ran = staple(capsys, "constitution", "write", *many)
    assert ran.code == 0, ran.err
    assert "× principle repeated" in ran.out
    ran = staple(capsys, "constitution", "write", "--force", "--set", "max_tokens=1")
    assert ran.code == 2
    assert "worded 0 principles" in ran.err
    assert "most often (32 of 32): principle not ended" in ran.err


@pytest.mark.usefixtures("writer")
def test_a_file_is_not_replaced_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("constitution.yaml").write_text("mine")
    ran = staple(capsys, "constitution", "write")
    assert ran.code == 2
    assert "there is such a file already" in ran.err and "--force" in ran.err
    assert Path("constitution.yaml").read_text() == "mine"
    assert staple(capsys, "constitution", "write", "--force").code == 0
    assert load("constitution.yaml").principles
    assert (
        "there is no folder no" in staple(capsys, "constitution", "write", "--out", "no/c.yaml").err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--set", "writer.templates=odd"),
            "setting 'writer.templates': odd: there is no such file",
        ),
        (("--set", "writer.nope=1"), "'writer.nope': unknown setting; expected one of model,"),
        (("--set", "similarity=1"), "'similarity': unknown setting; expected one of constitution,"),
        (("--set", "held_out=0.5"), "'held_out': it has no effect here"),
        (("--topic", " "), "setting 'topics.0'"),
        (("--model", "./nowhere"), "there is no such directory"),
        (("--endpoint", "nowhere"), "setting 'writer.endpoint'"),
        (("--from", "nobody"), "nothing is recorded under this name"),
    ],
)
def test_a_mistake_is_one_message(
    workplace: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    ran = staple(capsys, "constitution", "write", *options)
    assert ran.code == 2
    assert said in ran.err
    assert not Path("constitution.yaml").exists()


def test_a_discovered_constitution_gets_antitheses_by_its_own_policy(
    clustered: Attempt, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = staple(capsys, "constitution", "write", "--from", "found")
    assert ran.code == 0, ran.err
    before = {p.id: p for p in load(clustered.path("constitution.yaml")).principles}
    found = load("constitution.yaml")
    assert found.experiment == "found"
    assert 2 <= len(found.principles) <= 3
    for principle in found.principles:
        assert principle.antithesis
        assert principle.model_copy(update={"antithesis": ""}) == before[principle.id]
    ran = staple(capsys, "constitution", "write", "--from", "found", "--force", "--principles", "3")
    assert "--principles, --from found" in ran.err


def test_what_a_person_approved_is_what_gets_antitheses(
    clustered: Attempt, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_experiment(recorded_settings("found"))
    joke = Decision(id=principle_id("tell a joke"), action="reword", text="remind people of cost")
    record_review(opened, 1, clustered, ReviewDecision(decisions=(joke,), by="ann"))
    ran = staple(capsys, "constitution", "write", "--from", "found", "--model", "planted-sami")
    assert ran.code == 0, ran.err
    texts = {p.text for p in load("constitution.yaml").principles}
    assert "remind people of cost" in texts
    assert "tell a joke" not in texts
