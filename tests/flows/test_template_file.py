"""Templates of a user's own: a YAML file with the turns between the policy's."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_loop import copy_finished, run

from constitutions.errors import UserError, UserErrors
from flows.experiment import note_settings, open_experiment, recorded_settings
from flows.schema import ExperimentSettings
from flows.settings import dump_settings, load_settings, with_changes
from flows.stages import run_stage
from flows.states import stage_states
from models.policy import PolicySettings, user
from models.prompts import (
    CHAT,
    TERSE,
    TERSE_CONSTITUTION,
    ask,
    ask_critique,
    ask_refinement,
    ask_with_gold,
)
from models.templates import constitution_wording_of, templates_of
from tasks.rows import Trajectory
from tasks.train import TrainSettings, training_conversation

PAGE = Path(__file__).parents[2] / "docs/templates.md"
TURNS = ("hint", "propose", "critique", "refine", "improve")
PARTS = ("given", "item", "separator", "write", "oppose")
FILE: dict[str, Any] = {
    **{name: getattr(TERSE, name) for name in (*TURNS, "keep")},
    "constitution": {name: getattr(TERSE_CONSTITUTION, name) for name in PARTS},
}
"""The terse templates, as a file has them."""
SHOWN = [{"user": "Say {it}."}, {"assistant": "No."}, {"user": "why?"}, {"assistant": "it."}]
X = (user("What?"),)


def written(path: Path, **changes: Any) -> Path:
    """A file of templates: the terse ones, with some turns changed; None leaves one out."""
    values = {**FILE, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def chosen(path: Path) -> Any:
    return load_settings("planted", [f"policy.templates={path}"]).policy.templates


def test_a_file_says_what_the_names_say(tmp_path: Path) -> None:
    found = chosen(written(tmp_path / "t.yaml"))
    assert templates_of(found) == replace(TERSE, version="file")
    wording = constitution_wording_of(found)
    assert wording == replace(TERSE_CONSTITUTION, version="file")
    assert templates_of("terse") is TERSE and templates_of("chat") is CHAT


def test_a_doubled_brace_is_one_in_every_turn(tmp_path: Path) -> None:
    said = {name: f"{FILE[name]} {{{{}}}}" for name in TURNS}
    t = templates_of(chosen(written(tmp_path / "t.yaml", **said)))
    asked = [
        ask_with_gold(t, X, "a", "{g}"),
        ask(t, X, "a"),
        ask_critique(t, X, "a", "{z}"),
        ask_refinement(t, X, "a", "{z}"),
        ask_refinement(t.unguided(), X, "a"),
    ]
    assert all(messages[-1]["content"].endswith(" {}") for messages in asked)
    assert "{g}" in asked[0][-1]["content"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a turn is missing": ({"refine": None}, "setting 'refine': it is missing"),
    "a part is missing": (
        {"constitution": {"given": "{principles}"}},
        "setting 'constitution.item': it is missing",
    ),
    "a misspelt turn": ({"refine": None, "refin": "x"}, "did you mean 'refine'?"),
    "a hint without the gold": (
        {"hint": "why?"},
        "'hint': got 'why?'; expected a text with {gold}",
    ),
    "the gold elsewhere": ({"refine": "{gold}"}, "`hint` alone may show the gold response"),
    "a principle that is not there yet": ({"hint": "{gold} {principle}"}, "expected {gold}; any"),
    "a stray brace": ({"critique": "where {?"}, "expected {principle}; any other brace is doubled"),
    "a placeholder in disguise": ({"hint": "{gold.x}"}, "expected {gold}; any other"),
    "a format": ({"hint": "{gold:>9}"}, "expected {gold}; any other"),
    "no text": ({"propose": 7}, "'propose': got 7; expected a valid string"),
    "an empty turn": ({"propose": " "}, "setting 'propose'"),
    "a long turn": ({"propose": "x" * 8_001}, "at most 8000 characters"),
    "examples of one speaker": (
        {"examples": {"hint": SHOWN[::2]}},
        "'examples.hint': got [{'user': 'Say {it}.'}, {'user': 'why?'}]; expected `- user: …` and",
    ),
    "an example of an unknown kind": ({"examples": {"hnt": SHOWN}}, "did you mean 'hint'?"),
    "too many examples": ({"examples": {"hint": SHOWN * 17}}, "at most 64 items"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_the_file_and_the_turn(mistake: str, tmp_path: Path) -> None:
    changes, said = MISTAKES[mistake]
    file = written(tmp_path / "t.yaml", **changes)
    with pytest.raises(UserErrors, match=re.escape(f"{file}, setting")) as caught:
        chosen(file)
    assert said in str(caught.value)


def test_all_mistakes_at_once_in_every_policy(tmp_path: Path) -> None:
    file = written(tmp_path / "t.yaml", hint="a", improve="{x}")
    own = [f"policy.templates={file}", f"write.writer.templates={tmp_path}/none.yaml"]
    with pytest.raises(UserErrors) as caught:
        load_settings("planted", [*own, "mine.samples=x"])
    found = str(caught.value)
    for part in ("'hint'", "'improve'", "no such file; expected one of chat, terse,", "samples"):
        assert part in found
    assert len(found.splitlines()) == 4


def test_a_name_that_nothing_has() -> None:
    with pytest.raises(
        UserError, match="= odd: there are no templates of this name; expected chat"
    ):
        templates_of(PolicySettings(templates="odd").templates)


def test_the_page_has_a_whole_file_in_another_language(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```yaml\n(# antworten\.yaml\n.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    file = tmp_path / "antworten.yaml"
    file.write_text(text)
    t = templates_of(chosen(file))
    assert "zweite Antwort" in t.hint and t.examples.hint and t.examples.propose
    for shown in (t.examples.hint, t.examples.propose):
        assert [m["role"] for m in shown] == ["user", "assistant"] * (len(shown) // 2)


def test_examples_stand_before_x_and_after_its_system_turn(tmp_path: Path) -> None:
    kinds = {
        kind: [{"user": f"{kind} {{"}, {"assistant": "yes"}]
        for kind in ("hint", "propose", "improve")
    }
    t = templates_of(chosen(written(tmp_path / "t.yaml", examples=kinds)))
    system = {"role": "system", "content": "Be good."}
    hinted = ask_with_gold(t, (system, *X), "a", "g")  # type: ignore[arg-type]
    assert [m["content"] for m in hinted[:4]] == ["Be good.", "hint {", "yes", "What?"]
    led = [ask(t, X, "a"), ask_critique(t, X, "a", "z"), ask_refinement(t, X, "a", "z", "c")]
    assert all([m["content"] for m in asked[:3]] == ["propose {", "yes", "What?"] for asked in led)
    assert led[1][:5] == led[2][:5] and led[0] == led[1][: len(led[0])]  # they share their prefix
    unguided = ask_refinement(t.unguided(), X, "a")
    assert [m["content"] for m in unguided] == ["improve {", "yes", "What?", "a", "again."]


def test_training_has_the_examples_without_loss(tmp_path: Path) -> None:
    t = templates_of(chosen(written(tmp_path / "t.yaml", examples={"propose": SHOWN})))
    row = Trajectory(
        prompt_id="p",
        prompt=X,
        gold="g",
        source="s",
        sample=0,
        initial="y1",
        principle="z",
        refined="y2",
        initial_score=0.0,
        score=1.0,
        weight=1.0,
    )
    learned = training_conversation(row, "z", t, TrainSettings())
    assert [m["content"] for m in learned.messages[:4]] == ["Say {it}.", "No.", "why?", "it."]
    assert [learned.messages[i]["content"] for i in learned.turns] == ["z", "y2"]


@pytest.fixture
def at_home(lineage: Path, workplace: Path) -> ExperimentSettings:
    """The finished experiment of the small loop, in a folder of its own."""
    copy_finished(lineage, workplace)
    return load_settings("lineage.yaml")


def digests(settings: ExperimentSettings) -> dict[str, str]:
    record = open_experiment(settings).record
    return {
        stage: record.needs(stage, 1).digest for stage in ("mine", "filter", "train", "evaluate")
    }


def test_the_content_counts_and_the_place_does_not(at_home: ExperimentSettings) -> None:
    """An experiment with the terse wording from a file has the bytes of one with "terse"."""
    named = with_changes(at_home, {"policy.templates": "terse", "experiment": "named"})
    file = Path("turns.yaml")
    changes = {"policy.templates": str(written(file)), "experiment": "given"}
    given = with_changes(at_home, changes)
    for settings in (named, given):
        note_settings(settings)
        run(settings)
    assert digests(named) == digests(given) != digests(at_home)

    written(Path("elsewhere.yaml"))
    file.unlink()
    moved = with_changes(at_home, {**changes, "policy.templates": "elsewhere.yaml"})
    assert all(state.standing == "finished" for state in stage_states(moved).values())
    recorded = recorded_settings("given")  # the file is not needed
    assert recorded == given and "better: {gold} why?" in dump_settings(recorded)

    written(Path("elsewhere.yaml"), propose="but why?")
    edited = with_changes(at_home, {**changes, "policy.templates": "elsewhere.yaml"})
    states = stage_states(edited)
    assert "the prompt templates changed" in states["mine", 1].since
    assert states["prompts", 1].standing == "finished"


def test_what_follows_keeps_what_its_file_holds(tmp_path: Path) -> None:
    then = {"policy": {"templates": str(written(tmp_path / "turns.yaml"))}}
    settings = load_settings("staple-then-sami", [f"then={json.dumps(then)}"])
    assert settings.then["policy"]["templates"]["hint"] == TERSE.hint


def test_one_stage_takes_a_file_and_keeps_what_it_holds(
    at_home: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.stages.running_server", nullcontext)
    monkeypatch.setattr("flows.stages.one_stage", lambda *_: None)  # it would start Prefect
    file = written(Path("turns.yaml"))
    run_stage("lineage", "mine", 1, {"policy.templates": str(file)})
    file.unlink()
    states = stage_states(recorded_settings("lineage"))
    assert "the prompt templates changed" in states["mine", 1].since
    long = [{"user": "u" * 7_999}, {"assistant": "a" * 99}]
    written(file, examples={"hint": long})
    with pytest.raises(UserError, match=r"at most 8,000 characters.*staple run EXPERIMENT"):
        run_stage("lineage", "mine", 1, {"policy.templates": str(file)})
