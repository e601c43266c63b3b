"""benchmarks/house_style.py: what it asks, and how it counts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.house_style import (
    FOLLOWED,
    SAMPLES,
    SHOTS,
    Trial,
    bootstrap,
    outcomes,
    report,
    trials,
)
from benchmarks.house_style_clusters import figures, variants
from benchmarks.house_style_gate import figures as figures_of_gate
from benchmarks.house_style_methods import Figures, answered, is_idle
from benchmarks.house_style_methods import report as report_methods
from benchmarks.house_style_shuffled import shuffled
from benchmarks.house_style_turns import FILLER, Asker, outcome, ways
from benchmarks.house_style_turns import report as report_ways
from benchmarks.planted_runs import add
from models.house_style import HOUSE_STYLE, house, oracle
from models.house_style.answers import answers
from models.policy import Completion, Messages, Progress, Request, Scoring, user
from tasks.cluster import ClusterSettings
from tasks.rows import Answer, Labelled, Prompt, Trajectory
from tasks.score import ScoreSettings
from tasks.similarity.registry import open_similarity


class Obedient:
    """A policy that names "price" whenever it is hinted, and follows it whatever it is told."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.asked += requests
        return [[_say(self._text(r))] * r.n for r in requests]

    def _text(self, request: Request) -> str:
        if _contents(request)[-1].startswith("A better answer:"):
            return "Mention the price.\nAnd more."
        return "Use a soft cloth and let it dry in the sun for as long as you can. It costs a lot."

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        raise AssertionError("the benchmark asks for texts alone")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("the benchmark asks for texts alone")


def _contents(request: Request) -> list[str]:
    assert not isinstance(request.messages, str)
    return [message["content"] for message in request.messages]


def _say(text: str) -> Completion:
    return Completion(text=text, tokens=1, logprob=0.0, finish="stop")


def test_trials_depend_on_the_seed_and_cover_every_rule() -> None:
    found = list(trials(0, 2))
    assert found == list(trials(0, 2)) != list(trials(1, 2))
    assert [t.rule for t in found] == [name for name in house.RULES for _ in range(2)]
    for trial in found:
        rule = house.RULES[trial.rule]
        assert rule.check(trial.gold) and not rule.check(trial.initial)
        assert any(cue in trial.prompt for cue in rule.cues) and trial.name in rule.wordings


@pytest.mark.parametrize("arm", ["short", "shots"])
def test_a_policy_that_knows_one_rule_is_counted_for_that_rule_alone(arm: str) -> None:
    given: list[Trial] = list(trials(0, 2))
    policy = Obedient()
    found = outcomes(policy, arm, given, "key")
    for one in found:
        right = one.trial.rule == "price"
        assert one.principles == ["Mention the price."] * SAMPLES
        assert one.named == [right] * SAMPLES
        assert one.done == one.followed == [right] * FOLLOWED
    row = next(line for line in report({arm: found}).splitlines() if line.startswith(f"| {arm} |"))
    assert row.count("1 of 24") == 2 and "0.04" in row
    before = {len(r.messages) for r in policy.asked}
    longer = {"short": 0, "shots": 1}[arm] * SHOTS
    assert before == {3 + 4 * longer, 5 + 6 * longer}


def test_the_gold_is_shown_where_a_principle_is_asked_for_and_nowhere_else() -> None:
    policy = Obedient()
    given = list(trials(3, 1))
    outcomes(policy, "short", given, "key")
    for request in policy.asked:
        text = " ".join(_contents(request))
        shown = any(f"A better answer: {trial.gold}\n" in text for trial in given)
        assert shown == ("/name/" in request.key)


def test_the_intervals() -> None:
    assert bootstrap([0.5] * 20) == (0.5, 0.5)
    assert 0.2 < bootstrap([0.0, 1.0] * 20)[0] < 0.5 < bootstrap([0.0, 1.0] * 20)[1] < 0.8


def test_seeds_are_added_to_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    for seeds in ({"a": {"1": [1], "2": [2]}}, {"a": {"2": [3]}, "b": {"1": [4]}}):
        add(seeds, file)
    assert json.loads(file.read_text()) == {"a": {"1": [1], "2": [3]}, "b": {"1": [4]}}


class Sure(Obedient):
    """The same, to whom a longer response is likelier."""

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        return [Scoring(logprob=float(len(text)), tokens=1) for _, text in pairs]


def test_each_way_to_answer_is_asked_as_it_says() -> None:
    prompts = [p.prompt for p in HOUSE_STYLE.held_out(8, 3)]
    policy = Sure()
    assert HOUSE_STYLE.templates
    asker = Asker(policy, HOUSE_STYLE.templates, prompts, "key")
    assert asker.likeliest([["a", "bbb", "cc"], ["dd", "e"]][:1] * 8) == ["bbb"] * 8
    found = {answers.way: answers for answers in ways(asker, prompts, 3)}
    assert len(found) == 11 and all(len(a.texts) == 8 for a in found.values())
    told = found["oracle: a rule that is called for"].principles
    assert all(
        oracle.behaviour_of(z) in oracle.needed(x) for x, z in zip(prompts, told, strict=True)
    )
    skill = found["a skill rule at random"].principles
    assert not any(oracle.behaviour_of(z) for z in (*skill, *FILLER))
    for name in ("first answer", "three refinements without a principle"):
        assert set(found[name].principles) == {""}
    asked = [_contents(r)[-1] for r in policy.asked if "/filler/" in r.key]
    assert all(any(z in text for z in FILLER) for text in asked)


class Voter(Sure):
    """A policy whose every answer differs, and whose eight principles agree, or do not."""

    def __init__(self, *, agrees: bool) -> None:
        super().__init__()
        self.agrees = agrees

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        def said(key: str, number: int) -> str:
            return "Agreed." if self.agrees and "/vote/" in key else f"{key}, {number}"

        return [[_say(said(r.key, number)) for number in range(r.n)] for r in requests]


@pytest.mark.parametrize("agrees", [True, False])
def test_the_first_answer_stands_without_a_majority(agrees: bool) -> None:
    prompts = [p.prompt for p in HOUSE_STYLE.held_out(4, 3)]
    assert HOUSE_STYLE.templates
    asker = Asker(Voter(agrees=agrees), HOUSE_STYLE.templates, prompts, "key")
    found = {answers.way: answers for answers in ways(asker, prompts, 3)}
    first, by_vote = found["first answer"], found["the commonest of eight"]
    assert by_vote.principles[1] == ("Agreed." if agrees else "key/vote/1, 0")
    by_majority = found["if a majority"]
    assert list(by_majority.texts) == list((by_vote if agrees else first).texts)
    assert list(by_vote.texts) != list(first.texts)
    assert set(by_majority.principles) == {"Agreed." if agrees else ""}


def test_a_better_answer_wins_by_the_checkers() -> None:
    prompt, (name,) = next(
        (p.prompt, needed)
        for p in HOUSE_STYLE.mined(100, 0)
        if len(needed := oracle.needed(p.prompt)) == 1
    )
    rule = house.RULES[name]
    plain = next(a for texts in answers().values() for a in texts if not oracle.shown(a))
    better = rule.edit(plain, random.Random(0))
    assert [outcome(prompt, y, plain) for y in (better, plain)] == [1.0, 0.5]
    assert outcome(prompt, plain, better) == 0.0
    rows = report_ways([{"one": [(1.0, 1, 0), (0.0, 0, 2)]}, {"one": [(0.5, 0, 0)] * 2}])
    assert "| one | 0.50 [" in rows and rows.endswith("| 0.25 | 0.50 |")


def test_a_clustering_is_read_by_what_its_labels_mean_and_do() -> None:
    prompts = [
        Prompt(prompt_id=f"{n}", prompt=(user(p.prompt),), gold="", source="house-style/1")
        for n, p in enumerate(HOUSE_STYLE.mined(40, 0))
    ]
    plain = "Use a soft cloth and let it dry in the sun for as long as you can."
    rows = []
    for n, one in enumerate(prompts):
        name = min(oracle.needed(one.prompt[-1]["content"]))
        obeys = n < 10  # of the others the label is right, and the refinement does nothing
        refined = house.RULES[name].edit(plain, random.Random(n)) if obeys else plain
        given = {field: getattr(one, field) for field in ("prompt_id", "prompt", "gold", "source")}
        rows.append(
            Trajectory(
                **given,
                sample=0,
                initial=plain,
                principle=house.RULES[name].wordings[n % 2],
                refined=refined,
                initial_score=0.0,
                score=1.0,
                weight=1.0,
            )
        )
    settings = ClusterSettings(features=("characters",), distance_threshold=0.01, picture="none")
    apart = figures(settings, rows, [], prompts, None)
    assert apart["right"] == apart["house-style/precision"] == 1.0 and apart["rows"] == 40.0
    assert 0.2 <= apart["obeyed"] <= 0.3
    merged = figures(settings.model_copy(update={"max_principles": 1}), rows, [], prompts, None)
    assert merged["principles"] == 1.0 and merged["right"] < 0.5
    assert len(dict(variants())) == 18


def test_a_principle_counts_by_what_is_usual() -> None:
    often, seldom = np.log([0.8, 0.2]), np.log([0.4, 0.6])
    found = figures_of_gate(np.array([often, often, often, seldom]) - 7)  # nats that all share
    assert found["p of the likeliest"].argmax() == 0
    assert found["the same, over its usual p"].argmax() == 3
    assert found["the same, over its usual p"][3] == pytest.approx(np.log(0.6 / 0.3))
    assert found["KL from the usual"].argmax() == 3 and (found["KL from the usual"] >= 0).all()


def test_shuffled_labels_are_the_same_labels_on_other_rows() -> None:
    rows = [
        Labelled(
            prompt_id=f"{n}", prompt=(user("x"),), gold="g", source="s", sample=0, initial=f"y1 {n}",
            principle="z", refined=f"y2 {n}", initial_score=0.0, score=1.0, weight=1.0,
            label=f"label {n // 4}", cluster=n // 4, replaced=True,
        )
        for n in range(40)
    ]  # fmt: skip
    dealt = shuffled(rows, 3)
    assert dealt == shuffled(rows, 3) != shuffled(rows, 4)
    assert sorted(row.label for row in dealt) == sorted(row.label for row in rows)
    assert sum(a.label == b.label for a, b in zip(rows, dealt, strict=True)) < 12
    assert [row.refined for row in dealt] == [row.refined for row in rows]


def test_methods_are_compared_prompt_by_prompt() -> None:
    """Where a rule is called for is what STaPLe learned, also in the other methods' lines."""
    ours = [
        Figures(first=0.5, final=1.0, nearer=1.0, called=True),
        Figures(first=0.5, final=0.0, charged=0.0),
    ] * 50
    theirs = [Figures(first=0.5, final=0.5), Figures(first=0.0, final=0.5)] * 50
    lines = report_methods({"STaPLe": ours, "STaR": theirs}).splitlines()
    line, other = (row.split(" | ") for row in lines[2:])
    assert [line[0], line[1], line[7]] == ["| STaPLe", "0.50 [0.50, 0.50]", "– |"]
    assert line[3:5] == ["1.00 [1.00, 1.00]", "0.00 [0.00, 0.00]"]
    assert other[:2] == ["| STaR", "0.25 [0.20, 0.30]"]
    assert other[2:5] == ["0.50 [0.50, 0.50]"] * 3
    assert [line[5][:4], line[6][:4], other[6]] == ["0.25", "0.75", "0.50 [0.50, 0.50]"]
    assert other[7].startswith("0.00 [-0.")


class Stored:
    """An attempt with one file of rows."""

    def __init__(self, *stored: Any) -> None:
        self._stored = stored

    def rows(self, name: str, row_type: type[Any]) -> tuple[Any, ...]:
        return self._stored


def test_the_last_word_of_a_method_is_what_counts() -> None:
    """SFT is judged by its first answer, against the first one of iteration 0."""
    asked = "I have hardly any money. How do I clean a tent? Be brief: two short sentences."
    assert oracle.needed(asked) == {"price"}
    plain, priced = (
        "Use a soft cloth and let it dry.",
        "Use a soft cloth. It costs about five dollars.",
    )
    row = Prompt(prompt_id="p", prompt=(user(asked),), gold=priced, source="s")

    def answer(initial: str, refined: str) -> Stored:
        said = {"initial": initial, "principle": "z", "refined": refined, "finish": "stop"}
        return Stored(Answer(prompt_id="p", iteration=0, tokens=1, **said))  # type: ignore[arg-type]

    before: Any = {"prompts": Stored(row), "evaluate": answer(plain, plain)}
    after: Any = {"evaluate": answer(plain, priced)}
    compare = open_similarity(ScoreSettings())
    (refined,) = answered([before, after], 1, "refined", compare)
    (first,) = answered([before, after], 1, "initial", compare)
    assert refined == Figures(first=0.5, final=1.0, charged=1.0, nearer=1.0)
    assert first == Figures(first=0.5, final=0.5)
    after = {"evaluate": answer(plain, f"{plain} My aunt is good.")}
    (idle,) = answered([before, after], 1, "refined", compare)
    assert (idle.final, idle.charged) == (0.5, 0.0), "the checkers do not see an idle sentence"
    assert not is_idle(priced, plain), "a shorter answer has no idle words"
