"""The review by a form of Prefect's, on a real server, and by an editor."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from command import staple
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Pending
from prefect.utilities.schema_tools import ValidationError, validate
from review_world import clustered_attempt, clustering

import flows.review
from constitutions.constitution import (
    Constitution,
    Principle,
    Tail,
    load,
    load_draft,
    principle_id,
    save,
)
from constitutions.review import Decision
from flows.commands.edit import decided
from flows.experiment import note_settings, open_experiment, recorded_settings
from flows.review import ReviewForm, ask, examples_of, form_of, verdict_of
from flows.schema import ExperimentSettings
from tasks.record.record import Attempt
from tasks.review import ReviewDecision, recorded_review, recorded_verdict
from tasks.rows import Labelled

NAME = "an-experiment"
JOKE, WARN, ASK = (principle_id(text) for text in ("tell a joke", "warn of risks", "ask back"))
NUMBER = {text: n for n, text in enumerate(clustering()[1].texts, start=1)}


@pytest.fixture
def clustered(workplace: Path) -> Attempt:
    """An experiment whose first iteration got as far as its constitution."""
    settings = ExperimentSettings(experiment=NAME, iterations=1)
    note_settings(settings)
    return clustered_attempt(open_experiment(settings).slot(1))


def verdict(clustered: Attempt) -> ReviewDecision | None:
    return recorded_verdict(clustered.record, 1, clustered)


# The form


def form(mistakes: str = "", filled_in: ReviewForm | None = None) -> Any:
    labelled, constitution = clustering()
    return form_of(constitution, examples_of(constitution, labelled), 1, filled_in, mistakes)


def entry(text: str, /, **changes: Any) -> dict[str, Any]:
    """The answer to one principle's part, by its text."""
    filled = {"text": text, "into": 0, "drop": False} | changes
    return {f"principle_{NUMBER[text]}": filled}


def answer(*entries: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"by": "ann", **others, **{k: v for e in entries for k, v in e.items()}}


def test_an_untouched_form_approves() -> None:
    given = verdict_of([form()(**answer())], clustering()[1])
    assert given == ReviewDecision(by="ann")


def test_the_form_says_what_a_person_decided() -> None:
    filled = answer(
        entry("tell a joke", drop=True, text="left over"),
        entry("ask back", into=NUMBER["warn of risks"]),
        entry("warn of risks", text="warn of dangers"),
        added=["be brief"],
        note="why",
    )
    given = verdict_of([form()(**filled)], clustering()[1])
    assert set(given.decisions) == {
        Decision(id=JOKE, action="drop"),
        Decision(id=ASK, action="merge", into=WARN),
        Decision(id=WARN, action="reword", text="warn of dangers"),
    }
    assert (given.added, given.by, given.note) == (("be brief",), "ann", "why")


@pytest.mark.parametrize(
    ("filled", "said"),
    [
        ({}, "'by' is a required property"),
        ({"by": " "}, "by"),
        (answer(entry("ask back", action="explode")), "'action' was unexpected"),
        (answer(entry("ask back", into=4)), "4 is greater than the maximum of 3"),
        (answer(entry("ask back", text=" ")), r"principle_\d.text"),
        (answer(entry("ask back", drop=True, into=NUMBER["warn of risks"])), "0 was expected"),
        (answer(entry("ask back", into=NUMBER["ask back"])), r"principle_\d.into"),
        (answer(principle_9={}), "principle_9"),
    ],
)  # fmt: skip
def test_the_server_can_tell_an_invalid_answer(filled: dict[str, Any], said: str) -> None:
    schema = form().model_json_schema(ref_template="#/$defs/{model}")
    validate(answer(entry("ask back", into=NUMBER["tell a joke"])), schema, True)
    with pytest.raises(ValidationError, match=said):
        validate(filled, schema, True)


def test_the_form_shows_support_and_an_example_of_each_principle_as_mere_text() -> None:
    asked = form()
    shown = asked.model_fields[f"principle_{NUMBER['warn of risks']}"]
    assert shown.title == f"{NUMBER['warn of risks']}. warn of risks"
    facts = str(shown.annotation.__doc__)
    assert "3 trajectories, 31.7% of the weight" in facts
    assert "Prompt: please repair part 4" in facts
    assert r"Before: repair it \| now" in facts
    assert r"\<script\>" in facts
    table = str(asked._description).splitlines()
    assert [line.count("|") - line.count(r"\|") for line in table[2:]] == [6] * 5
    assert "<script>" not in str(asked._description).replace(r"\<script\>", "")


def test_a_refused_form_comes_back_filled_in_and_says_why() -> None:
    first = form()(**answer(entry("ask back", text="ask first"), note="why", added=["be brief"]))
    again = form("“ask back” (a): wrong\n“b”: too", first)
    said = str(again.model_fields["by"].description)
    assert "cannot be applied" in said
    assert "“b”: too" in said
    refilled = again(by="bob")
    assert (refilled.note, refilled.added) == ("why", ["be brief"])
    assert verdict_of([refilled], clustering()[1]).decisions == (
        Decision(id=ASK, action="reword", text="ask first"),
    )


def large(principles: int) -> tuple[Constitution, dict[str, Labelled]]:
    """A constitution with a tail, and an example of each principle with long texts."""
    row = clustering()[0][0]
    long = replace(row, initial="before " * 400, refined="after " * 500)
    texts = [f"principle {n} " + "that says what to do " * 5 for n in range(principles)]
    entries = tuple(
        Principle(text=text, support=1000 - n, share=0.9 / principles)
        for n, text in enumerate(texts)
    )
    tail = Tail(principles=14_000, support=5_000, share=0.1)
    return Constitution(principles=entries, tail=tail), {p.id: long for p in entries}


def test_a_large_constitution_is_reviewed_in_pages_by_support_with_the_tail_at_the_end() -> None:
    constitution, examples = large(130)
    pages: list[Any] = [form_of(constitution, examples, 1, page=page) for page in range(3)]
    for page in pages:
        schema = json.dumps(page.model_json_schema(ref_template="#/$defs/{model}"))
        assert len(schema.encode()) + len(str(page._description).encode()) < 150_000
    shown = [name for page in pages for name in page.model_fields if name.startswith("principle_")]
    assert shown == [f"principle_{n}" for n in range(1, 131)]
    assert ["drop_tail" in page.model_fields for page in pages] == [False, False, True]
    assert ["by" in page.model_fields for page in pages] == [True, False, False]
    assert "page 2 of 3" in str(pages[1]._description)

    ids = [p.id for p in constitution.principles]
    answers = [
        pages[0](by="ann"),
        pages[1](principle_61={"text": constitution.texts[60], "into": 130}),
        pages[2](principle_121={"text": "brief"}, drop_tail=True),
    ]
    assert verdict_of(answers, constitution) == ReviewDecision(
        decisions=(
            Decision(id=ids[60], action="merge", into=ids[129]),
            Decision(id=ids[120], action="reword", text="brief"),
        ),
        drop_tail=True,
        by="ann",
    )
    again = form_of(constitution, examples, 1, answers[2], "wrong", page=2)
    assert verdict_of([*answers[:2], again()], constitution) == verdict_of(answers, constitution)


def test_a_constitution_without_principles_is_one_page() -> None:
    empty = Constitution(principles=())
    form: Any = form_of(empty, {}, 1)
    assert verdict_of([form(by="ann")], empty) == ReviewDecision(by="ann")


@flow(name="reviewed")
def reviewed() -> str:
    experiment = open_experiment(recorded_settings(NAME))
    return ask(experiment, 1, clustered_attempt(experiment.slot(1))).run_id


def test_a_deployed_run_suspends_refuses_and_goes_on(
    clustered: Attempt, prefect_server: None
) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(reviewed), name="here")
        run_id = client.create_flow_run_from_deployment(deployment).id

        def go_on() -> FlowRun:
            client.set_flow_run_state(run_id, Pending(), force=True)
            with suppress(Pause):  # a worker's process would end here
                run_flow(reviewed, flow_run=client.read_flow_run(run_id), return_type="state")
            return client.read_flow_run(run_id)

        def resume(filled: dict[str, Any]) -> str:
            done = client.resume_flow_run(run_id, run_input=filled)
            return f"{done.status.value} {getattr(done.details, 'reason', '')}"

        assert go_on().state_name == "Suspended"
        refused = resume(answer(entry("ask back", into=NUMBER["ask back"])))
        assert refused.startswith("REJECT")
        assert "into" in refused
        assert client.read_flow_run(run_id).state_name == "Suspended"

        ring = entry("ask back", into=NUMBER["tell a joke"])
        drop = entry("tell a joke", drop=True)
        assert resume(answer(ring, drop)).startswith("ACCEPT")
        assert go_on().state_name == "Suspended"  # what the entries say together is wrong
        assert "which is dropped" in _asked(client, run_id)
        assert verdict(clustered) is None

        assert resume(answer(drop, entry("ask back"), note="not funny")).startswith("ACCEPT")
        assert go_on().state_name == "Completed"
    given = verdict(clustered)
    assert given == ReviewDecision(
        decisions=(Decision(id=JOKE, action="drop"),), by="ann", note="not funny"
    )


def _asked(client: Any, run_id: UUID) -> str:
    """The description of the form that the run waits with."""
    key = client.read_flow_run(run_id).state.state_details.run_input_keyset["description"]
    found = client._client.get(f"/flow_runs/{run_id}/input/{key}")
    return str(found.json())


def test_a_deployed_run_asks_page_by_page(
    clustered: Attempt, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.review, "PAGE", 2)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(reviewed), name="in-pages")
        run_id = client.create_flow_run_from_deployment(deployment).id
        pages: list[dict[str, Any]] = [{"by": "ann"}, {"principle_3": {"text": "be brief"}}]
        for filled in pages:
            with suppress(Pause):
                run_flow(reviewed, flow_run=client.read_flow_run(run_id), return_type="state")
            assert client.read_flow_run(run_id).state_name == "Suspended"
            assert client.resume_flow_run(run_id, run_input=filled).status.value == "ACCEPT"
            client.set_flow_run_state(run_id, Pending(), force=True)
        run_flow(reviewed, flow_run=client.read_flow_run(run_id), return_type="state")
        assert client.read_flow_run(run_id).state_name == "Completed"
    third = clustering()[1].principles[2]
    assert verdict(clustered) == ReviewDecision(
        decisions=(Decision(id=third.id, action="reword", text="be brief"),), by="ann"
    )


# The editor


def editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str) -> None:
    """$EDITOR that replaces texts in the file: "a→b;c→d"."""
    script = tmp_path / "editor.py"
    script.write_text(
        "import sys; p = sys.argv[-1]; s = open(p).read()\n"
        f"for pair in {change!r}.split(';'):\n"
        "    old, _, new = pair.partition('→'); assert old in s, (old, s); s = s.replace(old, new)\n"
        "open(p, 'w').write(s)\n"
    )
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"{sys.executable} {script}")


def test_an_unchanged_file_approves(
    clustered: Attempt,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    editor(monkeypatch, tmp_path, "principles→principles")
    monkeypatch.setenv("LOGNAME", "dora")
    ran = staple(capsys, "constitution", "edit", NAME, "--iteration", "1", "--note", "fine")
    assert (ran.code, verdict(clustered)) == (0, ReviewDecision(by="dora", note="fine"))
    assert "approved as it is" in ran.out
    assert f"staple run {NAME} --resume" in ran.out
    assert clustered.record.changes(1) == {"review.enabled": True}
    assert not list((tmp_path / ".staple" / "edits").iterdir())


def test_an_edit_is_shown_recorded_and_edited_again(
    clustered: Attempt,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    editor(
        monkeypatch,
        tmp_path,
        f"text: warn of risks→text: warn of dangers;text: ask back→text: ask back\n  into: {WARN}",
    )
    ran = staple(capsys, "constitution", "edit", NAME, "--by", "ann")
    assert ran.code == 0
    assert "reworded: warn of risks → warn of dangers" in ran.out
    assert "merged: ask back → warn of dangers" in ran.out

    editor(monkeypatch, tmp_path, "text: tell a joke→text: tell a good joke")
    assert staple(capsys, "constitution", "edit", NAME, "--by", "bob").code == 0
    given = verdict(clustered)
    assert given is not None
    assert given.by == "bob"
    assert {(d.id, d.action) for d in given.decisions} == {
        (WARN, "reword"),
        (ASK, "merge"),
        (JOKE, "reword"),
    }
    done = recorded_review(clustered.record, 1, clustered)
    assert done is not None
    assert load(done.path("constitution.yaml")).texts == ("warn of dangers", "tell a good joke")


def test_a_mistake_keeps_the_file_and_says_how_to_go_on(
    clustered: Attempt,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    editor(monkeypatch, tmp_path, "text: ask back→text: Warn of risks.")
    ran = staple(capsys, "constitution", "edit", NAME, "--iteration", "1")
    assert ran.code == 2
    assert "the same text as principle" in ran.err
    assert f"then: staple constitution edit {NAME} --iteration 1" in ran.err
    (kept,) = (tmp_path / ".staple" / "edits").iterdir()
    assert "Warn of risks." in kept.read_text()
    assert verdict(clustered) is None
    assert clustered.record.changes(1) == {}

    editor(monkeypatch, tmp_path, "Warn of risks.→ask first")
    assert staple(capsys, "constitution", "edit", NAME, "--iteration", "1").code == 0
    assert not kept.exists()
    given = verdict(clustered)
    assert given and given.decisions == (Decision(id=ASK, action="reword", text="ask first"),)


def test_a_file_that_was_edited_elsewhere(
    clustered: Attempt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load(clustered.path("constitution.yaml").read_text("utf-8"))
    document["principles"] = [p for p in document["principles"] if p["id"] != JOKE]
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(document))
    ran = staple(capsys, "constitution", "edit", NAME, "--file", str(file), "--by", "ann")
    assert (ran.code, "dropped: tell a joke" in ran.out) == (0, True)
    assert file.exists()
    file.write_text("principles: []\n")
    ran = staple(capsys, "constitution", "edit", NAME, "--file", str(file))
    assert ran.code == 2
    assert "every principle is dropped" in ran.err
    assert f"--file {file}" in ran.err


@pytest.mark.parametrize(
    ("said", "stood", "drops"),
    [
        (None, "kept", False),
        (None, "dropped", True),
        ("figures", "dropped", False),
        ("figures", "kept", False),
        ("keep", "dropped", False),
        ("drop", "kept", True),
    ],
)
def test_a_file_drops_the_tail_by_a_word_and_never_by_silence(
    tmp_path: Path, said: str | None, stood: str, drops: bool
) -> None:
    constitution, _ = large(3)
    assert constitution.tail
    without = constitution.model_copy(update={"tail": None})
    save(without, tmp_path / "file.yaml")
    document = yaml.safe_load((tmp_path / "file.yaml").read_text())
    if said:
        document["tail"] = constitution.tail.model_dump() if said == "figures" else said
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(document))
    shown = without if stood == "dropped" else constitution
    found = decided(constitution, shown, load_draft(tmp_path / "file.yaml"), "ann", "")
    assert found == ReviewDecision(by="ann", drop_tail=drops)
    nothing = decided(without, without, load_draft(tmp_path / "file.yaml"), "ann", "")
    assert not nothing.drop_tail, "there is none"


def test_without_an_editor_the_file_is_named(
    clustered: Attempt,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)
    ran = staple(capsys, "constitution", "edit", NAME)
    assert ran.code == 2
    assert "no editor is set" in ran.err
    monkeypatch.setenv("EDITOR", "false")
    assert "nothing was recorded" in staple(capsys, "constitution", "edit", NAME).err
    assert verdict(clustered) is None


def test_what_was_never_clustered_cannot_be_edited(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing is recorded" in staple(capsys, "constitution", "edit", "nobody").err
