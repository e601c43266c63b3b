"""SAMI's sampling, training set and evaluation: what is drawn, compared, left out and estimated."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_model import build_chat_model
from scripted import Script, decide_all

from constitutions.constitution import Principle
from constitutions.errors import UserError
from models.judges.base import Pair, listed, numbered
from models.judges.oracle import OracleJudge
from models.planted import oracle
from models.policy import Message
from models.prompts import CHAT_CONSTITUTION, under_constitution
from models.training.bases import load_tokenizer
from models.training.encoding import Encoder
from tasks.evaluate import EvaluateSettings
from tasks.judging.truth import obedience_metrics
from tasks.prompts import PromptSettings, prompt_sets
from tasks.rows import Comparison, Draw, Prompt, Response, Sampled, prompt_id
from tasks.sami.draw import PrinciplePool, draw
from tasks.sami.evaluate import (
    ARMS,
    asks,
    bound,
    check_followed,
    response_metrics,
    response_pairs,
    together,
)
from tasks.sami.sample import SampleSettings, sample
from tasks.sami.train import groups_of
from tasks.score import ScoreSettings

POOL = tuple(
    Principle(id=name, text=f"Be {name}.", antithesis=f"Never be {name}.")
    for name in ("short", "kind", "formal", "funny", "exact")
)
ONE_SIDED = Principle(id="honest", text="Be honest.")


def prompt(text: str) -> Prompt:
    turns = (Message(role="user", content=text),)
    return Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source="test:1")


PROMPTS = [prompt(f"What is {n}?") for n in range(12)]


# Drawing -------------------------------------------------------------------------------------


def test_constitutions_of_a_query_mix_the_same_principles() -> None:
    rng = random.Random(0)
    orders, sides = set(), Counter[bool]()
    for _ in range(200):
        drawn = draw(POOL, constitutions=4, principles=3, rng=rng)
        names = [
            frozenset(id.split()[1] for id in constitution.identifiers) for constitution in drawn
        ]
        assert len(set(names)) == 1 and len(names[0]) == 3
        assert len({frozenset(constitution.identifiers) for constitution in drawn}) == 4, (
            "no two are alike"
        )
        for constitution in drawn:
            orders.add(tuple(id.split()[1] for id in constitution.identifiers))
            for id, text in zip(constitution.identifiers, constitution.principles, strict=True):
                side, name = id.split()
                sides[side == "pos"] += 1
                assert text == f"{'Be' if side == 'pos' else 'Never be'} {name}."
    assert len(orders) == 5 * 4 * 3, "every order of every three"
    assert 0.45 < sides[True] / sides.total() < 0.55


def test_a_principle_without_antithesis_stands_as_it_is() -> None:
    rng, seen = random.Random(1), Counter[str]()
    for _ in range(100):
        for constitution in draw((*POOL[:2], ONE_SIDED), constitutions=4, principles=3, rng=rng):
            seen.update(constitution.identifiers)
    assert seen["pos honest"] == 400 and "neg honest" not in seen
    assert draw(POOL[:1], constitutions=2, principles=5, rng=rng), "fewer where there are fewer"


@pytest.mark.parametrize("pool", [(ONE_SIDED,), (POOL[0], ONE_SIDED), ()])
def test_too_few_antitheses_are_an_error(pool: tuple[Principle, ...]) -> None:
    with pytest.raises(UserError, match=r"have an antithesis.*expected at least 2"):
        draw(pool, constitutions=3, principles=2, rng=random.Random(0))


def test_more_constitutions_than_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="5 constitutions need more than 2 principles"):
        SampleSettings(constitutions=5, principles=2)
    assert SampleSettings(constitutions=4, principles=2).constitutions == 4


# Sampling ------------------------------------------------------------------------------------


def follower(messages: Sequence[Message]) -> str:
    """Repeats what it reads."""
    system = messages[0]["content"].partition("\n\n")[2]
    return f"{messages[-1]['content']} {system}" if messages[0]["role"] == "system" else "plain"


def test_every_query_has_its_own_constitutions_in_any_shard() -> None:
    settings = SampleSettings(constitutions=2, principles=2, temperature=0.7)
    script, ticks = Script(follower), list[int]()
    rows = sample(settings, CHAT_CONSTITUTION, POOL, "3/1", script, PROMPTS, ticks.append)
    assert [row.prompt_id for row in rows] == [p.prompt_id for p in PROMPTS]
    assert sum(ticks) == 24 and len({request.key for request in script.asked}) == 24
    for row in rows:
        for drawn in row.draws:
            assert all(text in drawn.response for text in drawn.principles)
    assert len({row.draws[0].identifiers for row in rows}) > 4

    halves = [
        row
        for part in (PROMPTS[6:], PROMPTS[:6])
        for row in sample(settings, CHAT_CONSTITUTION, POOL, "3/1", Script(follower), part)
    ]
    assert sorted(halves, key=lambda r: r.prompt_id) == sorted(rows, key=lambda r: r.prompt_id)
    other = sample(settings, CHAT_CONSTITUTION, POOL, "3/2", Script(follower), PROMPTS)
    assert [r.draws for r in other] != [r.draws for r in rows], "fresh ones in each iteration"


def test_a_system_turn_of_the_prompt_is_kept() -> None:
    given = (Message(role="system", content="You are Ada."), Message(role="user", content="Hi"))
    system, user = under_constitution(CHAT_CONSTITUTION, ["Be kind.", "Be short."], given)
    assert system["role"] == "system" and system["content"].endswith("\n\nYou are Ada.")
    assert "1. Be kind.\n2. Be short." in system["content"] and user == given[1]


# The training set ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = build_chat_model(tmp_path_factory.mktemp("model"), "llama3")
    return Encoder(load_tokenizer(folder), 2048)


def sampled(*responses: str, finish: str = "stop") -> Sampled:
    drawn = draw(POOL, constitutions=2, principles=2, rng=random.Random(0))
    draws = tuple(
        Draw(
            identifiers=t.identifiers, principles=t.principles, response=r, finish=finish, tokens=1
        )
        for t, r in zip(drawn, responses, strict=True)
    )
    row = PROMPTS[0]
    fields = {"prompt_id": row.prompt_id, "prompt": row.prompt, "gold": "", "source": row.source}
    return Sampled(**fields, draws=draws)  # type: ignore[arg-type]


def test_queries_that_tell_nothing_are_left_out_with_their_reason(encoder: Encoder) -> None:
    rows = [
        sampled("Yes.", "No."),
        sampled("Yes.", "Yes."),
        sampled("Yes.", " "),
        sampled("Yes.", "no " * 3000),
    ]
    found = groups_of(rows, encoder, CHAT_CONSTITUTION, end_token=True)
    assert len(found.groups) == 1 and len(found.skipped) == 3
    details = [row.detail for row in found.skipped]
    assert "the same under all" in details[0] and "empty" in details[1]
    assert "more than max_tokens" in details[2]
    assert {row.source for row in found.skipped} == {"test:1"}


def test_a_cut_response_has_no_end_to_count(encoder: Encoder) -> None:
    def lengths(row: Sampled, *, end_token: bool) -> list[int]:
        (group,) = groups_of([row], encoder, CHAT_CONSTITUTION, end_token=end_token).groups
        return [len(response) for response in group.responses]

    whole, cut = (
        sampled("Yes, of course.", "No."),
        sampled("Yes, of course.", "No.", finish="length"),
    )
    ended = lengths(whole, end_token=True)
    assert lengths(whole, end_token=False) == [n - 1 for n in ended]
    assert lengths(cut, end_token=True) == lengths(whole, end_token=False)


# Evaluation ----------------------------------------------------------------------------------


def test_every_policy_has_the_same_constitutions_in_every_arm() -> None:
    pool = PrinciplePool(POOL[:3], POOL[3:])
    found = asks(PROMPTS, pool, 2, seed=5)
    assert found == asks(PROMPTS, pool, 2, seed=5) != asks(PROMPTS, pool, 2, seed=6)
    arms = Counter(ask.arm for ask in found)
    assert arms == dict.fromkeys(ARMS, len(PROMPTS))
    for ask in found:
        names = {id.split()[1] for id in ask.constitution.identifiers}
        signs = {id.split()[0] for id in ask.constitution.identifiers}
        apart = {p.id for p in pool.held_out}
        assert (names <= apart) == ("held_out" in ask.arm or ask.arm == "plain")
        assert signs == ({"neg"} if "antitheses" in ask.arm else {"pos"}) or ask.arm == "plain"
    one_sided = {ask.arm for ask in asks(PROMPTS, PrinciplePool((ONE_SIDED,), ()), 2, seed=5)}
    assert one_sided == {"principles", "plain"}, "arms without principles are not there"


CHORE = "please repair the red button of my printer."
CORE = "repair the printer via its red button."
GREET, JOKE = "greet people before noise", "be funny around time"
HELLO, HAHA = "hello there, dear friend.", "haha, what a clown!"


def test_the_oracle_judges_by_the_constitution() -> None:
    constitution = [GREET, f"never {JOKE}"]
    best = oracle.obedience(CHORE, constitution, f"{HELLO} {CORE}")
    assert best == 2
    assert oracle.obedience(CHORE, constitution, CORE) == 0
    assert oracle.obedience(CHORE, constitution, f"{CORE} {HAHA}") == -2
    stray = f"{HELLO} {CORE} good luck, goodbye now."
    assert oracle.obedience(CHORE, constitution, stray) == 1.5
    assert oracle.obedience(CHORE, constitution, HELLO) == 0, "the content is gone"
    assert oracle.obeyed(constitution, f"{HELLO} {CORE} {HAHA}") == 0.5
    assert oracle.obedience(CHORE, ["always win", GREET], f"{HELLO} {CORE}") == 1
    assert oracle.obeyed(["always win"], CORE) is None, "a platitude asks for nothing"

    (judged,) = OracleJudge(oracle).compare(
        [
            Pair(
                prompt=(Message(role="user", content=CHORE),),
                gold="",
                ours=f"{HELLO} {CORE}",
                theirs=CORE,
                principle=numbered(constitution),
            )
        ]
    )
    assert (judged.outcome, judged.our_score, judged.their_score) == (1, 2, 0)
    assert (
        listed(numbered(constitution)) == constitution
        and listed(numbered(constitution[:1])) == constitution[:1]
    )


def response(arm: str, text: str, *principles: str, iteration: int, of: Prompt) -> Response:
    return Response(
        prompt_id=of.prompt_id,
        iteration=iteration,
        arm=arm,
        identifiers=tuple(f"pos {p}" for p in principles),
        principles=principles,
        response=text,
        finish="stop",
        tokens=2,
    )


def test_responses_are_paired_by_constitution_and_never_by_position() -> None:
    rows = [prompt(CHORE), prompt(CHORE.replace("red", "cold"))]
    ours, theirs = (
        [
            response("principles", f"{said} {n}", GREET, iteration=iteration, of=row)
            for n, row in enumerate(rows)
        ]
        for iteration, said in ((2, "ours"), (0, "theirs"))
    )
    pairs = response_pairs(ours, theirs[::-1], rows)
    assert [(m.ours.text, m.theirs.text) for m in pairs] == [
        ("ours 0", "theirs 0"),
        ("ours 1", "theirs 1"),
    ]
    assert {(m.principle, m.answer, m.iteration, m.against) for m in pairs} == {
        (GREET, "principles", 2, 0)
    }
    (half,) = (m for m in response_pairs(ours, theirs[:1], rows) if m.theirs.missing)
    (row,) = decide_all([half], OracleJudge(oracle))
    assert row.outcome is None and "there is none" in (row.failure or "")
    other = [response("principles", "x", JOKE, iteration=0, of=row) for row in rows]
    with pytest.raises(UserError, match="under other constitutions"):
        response_pairs(ours, other, rows)


def comparison(arm: str, outcome: float | None, of: Prompt) -> Comparison:
    values: dict[str, Any] = {
        "prompt_id": of.prompt_id,
        "iteration": 1,
        "answer": arm,
        "against": 0,
        "reference": arm,
        "judge": "j",
        "ours": "abc",
        "theirs": "de",
        "our_score": None,
        "their_score": None,
        "outcome": outcome,
        "failure": None if outcome is not None else "no result",
    }
    return Comparison(**values)


def test_arms_together_count_a_prompt_once_and_lose_no_failure() -> None:
    a, b = PROMPTS[:2]
    rows = [
        comparison("principles", 1.0, a),
        comparison("antitheses", 0.0, a),
        comparison("plain", 0.0, a),
        comparison("principles", None, b),
        comparison("antitheses", 1.0, b),
    ]
    first, second = together(rows, "constitution", ("principles", "antitheses"))
    assert (first.outcome, first.answer, first.reference) == (0.5, "constitution", "constitution")
    assert (len(first.ours), len(first.theirs)) == (3 + 2 + 3, 2 + 2 + 2)
    assert (second.outcome, second.failure) == (None, "no result")


def test_lengths_and_obedience_are_reported_by_arm() -> None:
    row = prompt(CHORE)
    rows = [
        response("principles", f"{HELLO} {CORE}", GREET, JOKE, iteration=1, of=row),
        response("antitheses", CORE, f"never {GREET}", iteration=1, of=row),
        response("plain", "", iteration=1, of=row),
    ]
    found = response_metrics(rows, prompts=1)
    assert found["answers/antitheses_characters"] == len(CORE)
    assert found["answers/plain_characters"] == 0 and found["answers/tokens"] == 6
    assert found["answers/empty"] == pytest.approx(1 / 3)
    truth = obedience_metrics("planted", oracle, rows, [row])
    assert truth["planted/obeyed_principles"] == 0.5 and truth["planted/obeyed_antitheses"] == 1
    assert truth["planted/core_principles"] == 1 and truth["planted/core_plain"] == 0
    assert "planted/obeyed_plain" not in truth


def test_the_bound_is_the_losss() -> None:
    assert bound([[0.0, 0.0], [0.0, 0.0]]) == pytest.approx(0)
    assert bound([[0.0, -60.0], [-60.0, 0.0]]) == pytest.approx(math.log(2))
    assert bound([[-9.0, 0.0], [0.0, -9.0]]) < -8, "misled: below 0"


@pytest.mark.parametrize("judge", ["auto", {"kind": "reward", "policy": {"model": "m"}}])
def test_judges_that_read_no_constitution_are_refused(judge: Any) -> None:
    settings = EvaluateSettings(judge=judge)
    with pytest.raises(UserError, match="reads no constitution"):
        check_followed(settings, ScoreSettings(), None)
    check_followed(EvaluateSettings(), ScoreSettings(), oracle)
    check_followed(EvaluateSettings.model_validate({"judge": "similarity"}), ScoreSettings(), None)


def test_an_experiment_that_goes_on_leaves_out_what_was_mined(corpora: Path) -> None:
    sources = [{"path": str(corpora / "tldr_first300.csv")}]
    for source in ("planted", sources):
        sizes = {"sources": source, "first": 20, "later": 10, "held_out": 12}
        before = PromptSettings.model_validate(sizes)
        after = PromptSettings.model_validate({**sizes, "skip": 30})
        ids = [{r.prompt_id for r in prompt_sets(before, 4, t).rows} for t in range(3)]
        then = [{r.prompt_id for r in prompt_sets(after, 4, t).rows} for t in range(3)]
        assert then[0] == ids[0] and len(then[1]) == 20 and len(then[2]) == 10
        assert not (then[1] | then[2]) & (ids[0] | ids[1] | ids[2])
