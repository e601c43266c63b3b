"""The stage teach: naming and following are learned on other rules, before iteration 1."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import staple
from small_loop import run

from constitutions.errors import UserError, UserErrors
from flows.experiment import note_settings, open_experiment
from flows.plan.plan import plan
from flows.preflight import check
from flows.schema import ExperimentSettings
from flows.settings import following, with_changes
from flows.states import stage_states
from models.planted import PLANTED, Planted
from models.policy import Messages, Policy, assistant, user
from models.prompts import CHAT, ask_refinement, ask_with_gold
from models.training import loop
from models.worlds.base import SkillExample
from tasks.teach import TeachSettings, lessons, skill_examples
from tasks.train import Training

ROWS = [
    {
        "prompt": f"What is {n}?",
        "initial": f"It is {n}.",
        "principle": ("say who", "say why")[n % 2],
        "refined": f"It is {n}. {('who', 'why')[n % 2]}",
        "gold": f"{n}. {('who', 'why')[n % 2]}",
    }
    for n in range(12)
]
CHANGES = {
    "teach.file": "skills.jsonl",
    "teach.learning_rate": 0.02,
    "teach.epochs": 6,
    "teach.batch_size": 4,
}


def write(rows: Sequence[Any], path: str = "skills.jsonl") -> Path:
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    return Path(path)


def skilled(settings: ExperimentSettings, name: str, **more: Any) -> ExperimentSettings:
    """The experiment under another name, taught by a file."""
    write(ROWS)
    found = with_changes(settings, {**CHANGES, "experiment": name, **more})
    note_settings(found)
    return found


def example(n: int, **changes: str) -> SkillExample:
    texts = {"prompt": "x", "initial": "y1", "gold": "yG", "principle": "z", "refined": "y2"}
    return SkillExample(
        **{name: f"{text} {n}" for name, text in texts.items()}, source=f"skill:{n}"
    )


# What is taught ----------------------------------------------------------------------------------


def test_an_example_teaches_naming_or_following() -> None:
    examples = [example(n) for n in range(30)]
    settings = TeachSettings(examples=30)
    given = list(lessons(examples, settings, CHAT))
    assert given == list(lessons(examples, settings, CHAT))
    x: dict[str, Messages] = {e.source: (user(e.prompt),) for e in examples}
    named = []
    for e, lesson in zip(examples, given, strict=True):
        first, last = lesson.turns
        assert lesson.messages[first] == assistant(e.initial) and last == len(lesson.messages) - 1
        *asked, answer = lesson.messages
        if answer["content"] == e.principle:
            named.append(e)
            assert tuple(asked) == ask_with_gold(CHAT, x[e.source], e.initial, e.gold)
        else:
            assert answer["content"] == e.refined
            assert tuple(asked) == ask_refinement(CHAT, x[e.source], e.initial, e.principle)
            assert e.gold not in str(lesson)
    assert len(named) == settings.named(30) == 10
    for share, count in ((0.0, 0), (1.0, 30)):
        changed = settings.model_copy(update={"naming": share})
        told = [row.messages[-1]["content"][0] for row in lessons(examples, changed, CHAT)]
        assert told.count("z") == count
    (alone,) = lessons(examples[:1], settings.model_copy(update={"keep_first": False}), CHAT)
    assert alone.turns == given[0].turns[1:]
    other = lessons(examples, settings.model_copy(update={"seed": 1}), CHAT)
    assert [row.messages for row in other] != [row.messages for row in given]


def test_the_gold_of_a_file_is_the_refined_response_unless_given(workplace: Path) -> None:
    write([ROWS[0], {k: v for k, v in ROWS[1].items() if k != "gold"}])
    one, two = skill_examples(TeachSettings(file="skills.jsonl"), None)
    assert (one.gold, one.source) == ("0. who", "teach.file:1")
    assert (two.gold, two.principle) == (two.refined, "say why")
    assert skill_examples(TeachSettings(file="skills.jsonl", examples=1), None) == [one]
    with pytest.raises(UserError, match=r"'teach.examples': 3 examples.*at most 2, as many as"):
        skill_examples(TeachSettings(file="skills.jsonl", examples=3), None)


def test_a_cell_of_a_table_may_leave_the_gold_out(workplace: Path) -> None:
    head = "prompt,initial,principle,refined,gold"
    Path("skills.csv").write_text(f"{head}\nq,a,say why,a. why,\nq,b,say who,b. who,c. who\n")
    found = skill_examples(TeachSettings(file="skills.csv"), None)
    assert [one.gold for one in found] == ["a. why", "c. who"]


def test_bad_rows_are_named_all_at_once(at_home: ExperimentSettings) -> None:
    bad = [{**ROWS[0], "initial": " "}, ROWS[1], {"prompt": 3, "principle": "z", "refined": "y"}]
    write(bad, "bad.jsonl")
    with pytest.raises(UserErrors) as caught:
        check(with_changes(at_home, {"teach.file": "bad.jsonl"}))
    one, two = str(caught.value).splitlines()
    assert one.startswith("bad.jsonl, row 1: field 'initial': it is empty")
    assert two.startswith("bad.jsonl, row 3: field 'prompt': Input should be a valid string")
    assert "field 'initial': Field required" in two


def test_a_world_teaches_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TeachSettings(examples=3, seed=5)
    with pytest.raises(UserError, match=r"the world planted teaches no skills.*set teach\.file"):
        skill_examples(settings, PLANTED)
    with pytest.raises(UserError, match="corpora teach no skills"):
        skill_examples(settings, None)

    def of_world(self: Planted, n: int, seed: int) -> list[SkillExample]:
        if n > 9:
            raise ValueError(f"{n} examples were asked for; the world has 9")
        return [example(seed + i) for i in range(n)]

    monkeypatch.setattr(Planted, "skill_examples", of_world)
    assert skill_examples(settings, PLANTED) == [example(n) for n in (5, 6, 7)]
    with pytest.raises(UserError, match="10 examples were asked for"):
        skill_examples(TeachSettings(examples=10), PLANTED)


# The stage ---------------------------------------------------------------------------------------


def answers(policy: Policy) -> tuple[float, float]:
    """Mean log-probability of the taught principles under the hint, and of the taught rewrites."""
    x = [(user(row["prompt"]),) for row in ROWS]
    named = [
        (ask_with_gold(CHAT, p, r["initial"], r["gold"]), r["principle"])
        for p, r in zip(x, ROWS, strict=True)
    ]
    followed = [
        (ask_refinement(CHAT, p, r["initial"], r["principle"]), r["refined"])
        for p, r in zip(x, ROWS, strict=True)
    ]
    found = [policy.logprobs(pairs) for pairs in (named, followed)]
    one, two = (sum(s.logprob for s in scored) / len(scored) for scored in found)
    return one, two


def test_the_taught_model_is_iteration_0_and_what_iterations_go_on_with(
    at_home: ExperimentSettings,
) -> None:
    settings = skilled(at_home, "skilled", then={"sample": {"constitutions": 2}})
    computed = run(settings)
    assert ("teach", 0) in computed and ("evaluate", 0) in computed
    e = open_experiment(settings)
    taught = e.record.needs("teach", 0)
    assert taught.metrics["teach/last_loss"] < taught.metrics["teach/first_loss"] / 2
    assert taught.metrics["teach/naming"] == 4 and taught.metrics["teach/trained"] == 12

    before, after = answers(e.untaught.load()), answers(e.policy(0).load())
    assert after[0] > before[0] + 1 and after[1] > before[1] + 1

    for stage, t in (("evaluate", 0), ("mine", 1), ("train", 1)):
        assert e.record.needs(stage, t).inputs["adapter"].digest == taught.digest
    assert Training.of(e.policy(0, 1), settings.train, 0, Path("out")).previous_adapter == (
        taught.path("adapter")
    )
    assert e.policy(1).adapter == e.record.needs("train", 1)
    assert run(settings) == set()
    assert all(state.standing == "finished" for state in stage_states(settings).values())

    then = following(settings)  # it goes on with the skills, and is not taught again
    assert then and not then.teach.on
    assert open_experiment(then).taught() == taught
    with pytest.raises(UserErrors, match="which this one continues, has the skills"):
        with_changes(then, {"teach.file": "skills.jsonl"})


def test_training_from_the_base_starts_at_the_taught_model(at_home: ExperimentSettings) -> None:
    how = {"train.start": "base", "iterations": 2, "teach.keep_first": False}  # so small a model
    settings = skilled(at_home, "skilled", **how)  # finds no better answer twice otherwise
    run(settings)
    e = open_experiment(settings)
    taught = e.record.needs("teach", 0)
    begun = Training.of(e.policy(1, 2), settings.train, 0, Path("out"))
    assert begun.previous_adapter == taught.path("adapter")
    assert e.record.needs("train", 2).inputs["taught"].digest == taught.digest
    changed = {**CHANGES, **how, "teach.naming": 0.5}
    states = stage_states(with_changes(settings, changed))
    assert "teach 0 is stale" in states["train", 2].since


def test_another_experiment_does_not_teach_again(
    at_home: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its name, seed and method; where the file lies does not count, what it says does."""
    one = skilled(at_home, "one", iterations=0)
    run(one)
    digest = open_experiment(one).record.needs("teach", 0).digest
    Path("skills.jsonl").rename("moved.jsonl")
    other = with_changes(
        one, {"experiment": "other", "seed": 3, "method": "star", "teach.file": "moved.jsonl"}
    )
    note_settings(other)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.teach.train", lambda *_: pytest.fail("it is taught again"))
        run(other)
    found = open_experiment(other).record.needs("teach", 0)
    assert found.digest == digest
    assert found.metrics["teach/trained"] == 12

    (kept,) = Path(".staple/taught").glob(f"{found.fingerprint}/outputs/adapter")
    (kept / "adapter_model.safetensors").write_bytes(b"damaged")
    third = with_changes(other, {"experiment": "third"})
    note_settings(third)
    run(third)
    assert open_experiment(third).record.needs("teach", 0).digest == digest

    write([*ROWS[1:], {**ROWS[0], "principle": "say what"}], "moved.jsonl")
    state = stage_states(other)["teach", 0]
    assert state.since == ("the file of examples changed",)
    changed = stage_states(with_changes(one, {"teach.file": "moved.jsonl", "train.lora_rank": 4}))
    assert "a setting of train changed" in changed["teach", 0].since
    assert "teach 0 is stale" in changed["evaluate", 0].since


def test_a_killed_lesson_goes_on_with_the_same_bytes(
    at_home: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 4)
    more = {"iterations": 0, "teach.seed": 7}
    whole, killed = skilled(at_home, "whole", **more), skilled(at_home, "killed", **more)
    seen: list[int] = []

    @contextmanager
    def dying(*_: Any) -> Iterator[Any]:
        def tick(done: int) -> None:
            seen.append(done)
            if len(seen) == 10:
                raise KeyboardInterrupt

        yield tick

    with monkeypatch.context() as patch:
        patch.setattr("tasks.teach.progress", dying)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
        seen.clear()
        seen += [0] * 10  # dies no more
        run(killed)
        assert 8 <= len(seen) - 10 < 18  # of 18 steps, those after a checkpoint
    digest = open_experiment(killed).record.needs("teach", 0).digest
    run(whole, force=True)  # not what "killed" kept
    assert open_experiment(whole).record.needs("teach", 0).digest == digest


# Around it ---------------------------------------------------------------------------------------


def test_it_is_foretold_checked_and_shown(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = skilled(at_home, "skilled")
    assert check(settings)["teach"] == ("4 examples of naming and 8 of following, of skills.jsonl")
    foretold = plan(settings)
    (work,) = (w for w in foretold.iterations[0].work if w.stage == "teach")
    run(with_changes(settings, {"iterations": 0}))
    tokens = open_experiment(settings).record.needs("teach", 0).metrics["teach/tokens"]
    assert work.prompts == 12 and 0.1 < work.trained / tokens < 2  # random letters are tokens
    untaught = plan(at_home)
    assert not [w for part in untaught.iterations for w in part.work if w.stage == "teach"]
    assert foretold.disk["adapters"] == 2 * untaught.disk["adapters"]
    assert "teach" in staple(capsys, "status", "skilled").out
    assert "teach" not in staple(capsys, "status", at_home.experiment).out


def test_it_is_off_unless_asked_for(at_home: ExperimentSettings) -> None:
    assert not at_home.teach.on and open_experiment(at_home).taught() is None
    assert ("teach", 0) not in stage_states(at_home)
