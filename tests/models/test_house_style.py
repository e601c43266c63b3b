"""The house-style world: its rules, prompts and lessons, and what the oracle reads back."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from constitutions.errors import UserError
from models.house_style import HOUSE_STYLE, house, lessons, oracle, skills, world
from models.house_style.answers import ANSWERS, MOST_TOKENS, SAMPLES, answers, first_answer
from models.house_style.requests import LENGTH, base_requests
from models.house_style.rules import content_words, fill, sentences, stem, vocabulary
from models.worlds.registry import WORLDS
from tasks.judging.truth import behaviour_by_effect

PLAIN = [answer for kept in answers().values() for answer in kept]
"""The model's own first answers, which obey no rule but by chance."""
TWO = [answer for answer in PLAIN if len(sentences(answer)) == 2]
SEEDS = range(5)


@cache
def edits(name: str) -> list[tuple[str, str]]:
    """Forty plain answers that do not obey a rule, each with its edit, which differs."""
    rule = house.RULES.get(name) or skills.RULES[name]
    rng = random.Random(name)
    made = [(answer, rule.edit(answer, rng)) for answer in TWO[:200] if not rule.check(answer)]
    return rng.sample([(before, after) for before, after in made if before != after], 40)


def test_there_are_enough_rules_of_both_kinds() -> None:
    assert WORLDS["house-style"] is HOUSE_STYLE
    assert len(house.RULES) == 24 and len(skills.RULES) >= 40
    assert not set(house.RULES) & set(skills.RULES)
    for rules in (house.RULES, skills.RULES):
        assert 0.2 < sum(rule.form for rule in rules.values()) / len(rules) < 0.5
    for rule in house.RULES.values():
        assert len(rule.wordings) >= 4 and len(rule.cues) >= 2 and rule.means


def test_no_lesson_has_a_word_of_a_house_rule() -> None:
    kept = vocabulary(house.RULES)
    assert {"pric", "cost", "dollar", "risk", "environment", "bullet", "bold"} <= kept
    assert not vocabulary(skills.RULES) & kept
    for seed in SEEDS:
        for lesson in lessons.sample_lessons(500, seed):
            texts = (lesson.prompt, lesson.initial, lesson.gold, lesson.principle, lesson.refined)
            assert not content_words(texts) & kept, lesson


def test_no_lesson_does_what_a_house_rule_asks_but_by_an_answers_shortness() -> None:
    """Also without a word: a star or a heart is no emoji."""
    for seed in SEEDS:
        for lesson in lessons.sample_lessons(1000, seed):
            obeyed = oracle.shown(lesson.refined) - oracle.shown(lesson.initial)
            assert obeyed <= {"concise"}, lesson


def test_no_lesson_names_a_house_rule_by_the_oracles_words() -> None:
    for rule in skills.RULES.values():
        for wording in rule.wordings:
            assert not [r.name for r in house.RULES.values() if r.meant_by(wording)], wording


def test_words_are_compared_without_their_endings() -> None:
    assert len({stem(word) for word in ("cost", "costs", "costing", "costly")}) == 1
    assert content_words(["It costs ten dollars."]) == {"cost", "dollar"}
    assert not content_words(["Say something about it at the end."])


@pytest.mark.parametrize("name", house.RULES)
def test_a_checker_passes_what_its_own_rule_makes(name: str) -> None:
    rule = house.RULES[name]
    assert all(rule.check(made) for _, made in edits(name))
    for sentence in rule.said:
        for seed in range(30):
            said = fill(sentence, random.Random(seed))
            whole = f"{said} Use a soft cloth." if rule.opens else f"Use a soft cloth. {said}"
            whole = rule.edit("Use a soft cloth.", random.Random(seed)) if rule.form else whole
            assert rule.check(whole), whole


@pytest.mark.parametrize("name", skills.RULES)
def test_a_skills_checker_passes_what_its_rule_makes(name: str) -> None:
    rule = skills.RULES[name]
    assert all(rule.check(made) for _, made in edits(name))


@pytest.mark.parametrize("name", house.RULES)
def test_a_checker_fails_on_plain_answers(name: str) -> None:
    """At most one plain answer in ten, of "concise", and one in thirty of any other."""
    obeyed = sum(map(house.RULES[name].check, PLAIN)) / len(PLAIN)
    assert obeyed <= (0.1 if name == "concise" else 1 / 30)


@pytest.mark.parametrize("name", house.RULES)
def test_a_checker_fails_on_the_edits_of_other_rules(name: str) -> None:
    """At most one edit in twenty of any other rule, house or skill, taken together."""
    others = {*house.RULES, *skills.RULES} - {name}
    check = house.RULES[name].check
    free = [made for other in others for plain, made in edits(other)[:5] if not check(plain)]
    passed = list(map(check, free))
    assert sum(passed) / len(passed) <= 0.05


def test_the_false_positive_rate_of_all_checkers_is_small() -> None:
    rates = [sum(map(rule.check, PLAIN)) / len(PLAIN) for rule in house.RULES.values()]
    assert sum(rates) / len(rates) < 0.01


def test_answers_are_those_that_the_mechanical_rule_keeps() -> None:
    head, *rows = map(json.loads, ANSWERS.read_text(encoding="utf-8").splitlines())
    asked = {request.text for request in base_requests()}
    assert head["requests"] == len(asked) and head["kept"] == len(PLAIN)
    assert head["model"] == "SmolLM2-135M-Instruct.Q4_1.gguf" and len(head["sha256"]) == 64
    assert ANSWERS.stat().st_size < 400_000
    assert {row["request"] for row in rows} <= asked and len(rows) > 0.7 * len(asked)
    for row in rows:
        assert 1 <= len(row["answers"]) <= SAMPLES
        for answer in row["answers"]:
            assert first_answer(answer) == answer and len(answer.split()) <= MOST_TOKENS


def test_the_page_has_the_worlds_figures() -> None:
    page = (Path(__file__).parents[2] / "docs/house_style.md").read_text(encoding="utf-8")
    wordings = sum(len(rule.wordings) for rule in skills.RULES.values())
    for figure in (
        f"requests | {len(list(base_requests()))}:",
        f"answers | {len(PLAIN):,}, a small chat model's own, to {len(answers())} of",
        f"{len(skills.RULES)} others, of which {sum(r.form for r in skills.RULES.values())} change",
        f"{wordings} wordings",
        f"{len(vocabulary(house.RULES))} stems",
        f"passes {100 * sum(map(house.RULES['concise'].check, PLAIN)) / len(PLAIN):.1f} %",
    ):
        assert figure in page, figure


def test_an_answer_is_its_first_two_complete_sentences() -> None:
    assert first_answer("Use a cloth. Rub it dry. Then wait") == "Use a cloth. Rub it dry."
    assert first_answer("Use a cloth. Rub it") == "Use a cloth."
    assert first_answer("Use a cloth") is None
    assert first_answer("Use a cloth. Use a cloth.") is None
    assert first_answer("Sure! Use a cloth.") is None
    assert first_answer("1. Use a cloth.\n2. Rub it.") is None
    assert first_answer('Say "thank you".') is None


def test_prompts_depend_on_the_seed_alone() -> None:
    for seed in SEEDS:
        found = world.sample_examples(120, seed)
        assert len({example.prompt for example in found}) == 120
        assert found == world.sample_examples(120, seed)
        assert found[:50] == world.sample_examples(50, seed)
        assert found != world.sample_examples(120, seed + 1)
        assert lessons.sample_lessons(60, seed)[:20] == lessons.sample_lessons(20, seed)
        assert lessons.sample_lessons(60, seed) != lessons.sample_lessons(60, seed + 1)


def test_a_seed_draws_rules_of_both_kinds() -> None:
    drawn = [world.drawn(seed) for seed in range(30)]
    assert len(set(drawn)) > 20
    assert set().union(*drawn) == set(house.RULES)
    for names in drawn:
        assert len(names) == sum(world.DRAWN)
        assert sum(house.RULES[name].form for name in names) == world.DRAWN[1]
    for seed in SEEDS:
        called = set().union(*(e.needed for e in world.sample_examples(400, seed)))
        assert called == set(world.drawn(seed))


def test_held_combinations_are_never_mined() -> None:
    def pairs(examples: list[world.StyledExample]) -> set[tuple[str, ...]]:
        return {pair for e in examples for pair in combinations(sorted(e.needed), 2)}

    for seed in SEEDS:
        held = world.sample_examples(200, seed, "eval", "held")
        seen = pairs(world.sample_examples(400, seed, "train", "seen"))
        assert not seen & {p for e in held if len(e.needed) == 2 for p in pairs([e])}
        assert all(pairs([e]) - seen for e in held)
        assert {len(e.needed) for e in world.sample_examples(200, seed)} == {1, 2, 3}


def test_pools_share_no_request() -> None:
    tasks = {pool: {r.task for r in base_requests() if r.pool == pool}
             for pool in ("skills", "train", "eval")}  # fmt: skip
    for one, other in combinations(tasks.values(), 2):
        assert one and other and not one & other


def test_the_oracle_reads_the_truth_back() -> None:
    for pool, combined in (("train", "seen"), ("eval", "held")):
        for e in world.sample_examples(300, 1, pool, combined):  # type: ignore[arg-type]
            assert oracle.needed(e.prompt) == e.needed
            for gold in (e.gold, *e.other_golds):
                assert e.needed <= oracle.shown(gold), (e.needed - oracle.shown(gold), gold)
            assert e.gold not in e.other_golds
            assert oracle.score(e.prompt, e.gold) > oracle.score(e.prompt, e.plain)
    several = [e for e in world.sample_examples(300, 1) if e.other_golds]
    assert len(several) > 150, "most requests have two answers"
    with pytest.raises(UserError, match="no prompt of the house-style world"):
        oracle.needed("please repair the red button of my printer.")
    with pytest.raises(UserError):
        oracle.score("How do I clean a carpet?", "Use a cloth.")


def test_the_oracle_knows_which_rules_an_experiment_can_find() -> None:
    for seed in SEEDS:
        asked = [prompt.prompt for prompt in HOUSE_STYLE.held_out(200, seed)]
        assert oracle.called(asked) == set(world.drawn(seed)) < oracle.TRUTH


def test_the_oracle_reads_a_principle_by_its_words() -> None:
    for rule in house.RULES.values():
        for wording in rule.wordings:
            assert oracle.behaviour_of(wording) == rule.name, wording
    assert oracle.behaviour_of("Say something about the cost.") == "price"
    assert oracle.behaviour_of("Speak about the dangers.") == "risk"
    assert oracle.behaviour_of("Mention the weather.") is None
    assert oracle.behaviour_of("Mention the price and the risk.") is None, "it means two rules"
    for refusal in ("Do not mention", "Don’t mention", "Say nothing about", "Do it without"):
        assert oracle.behaviour_of(f"{refusal} the price.") is None
    for word in ("lawn", "supper"):
        assert oracle.behaviour_of(f"Mention the {word}.") is None
    assert oracle.known("Use bullet points.") and not oracle.known("Be helpful.")
    assert oracle.obeyed(["Mention the price."], "It costs two dollars.") == 1
    assert oracle.obeyed(["Mention the weather."], "It costs two dollars.") is None


def test_the_oracle_reads_a_principle_by_what_it_does() -> None:
    for name in house.RULES:
        assert behaviour_by_effect(oracle, edits(name)) == name
    same = [(answer, answer) for answer in TWO[:20]]
    assert behaviour_by_effect(oracle, same) is None and behaviour_by_effect(oracle, []) is None
    seldom = edits("price")[:4] + same[:16]
    assert behaviour_by_effect(oracle, seldom) is None, "one in five is below LEAST_EFFECT"
    two = edits("price")[:10] + edits("bold")[:10]
    assert behaviour_by_effect(oracle, two) is None, "two rules rise as much"


def test_the_score_counts_needed_rules_strays_and_the_topic() -> None:
    prompt = f"I have hardly any money. How do I clean a carpet? {LENGTH}"
    plain = "Brush the carpet and rinse it with warm water, then let it dry for a while."
    assert oracle.score(prompt, plain) == 0
    assert oracle.score(prompt, f"{plain} It costs ten euros.") == 1
    assert oracle.score(prompt, f"{plain} It costs ten euros. 😀") == 0.5
    assert (
        oracle.score(prompt, "It costs ten euros, more or less, wherever one buys it or asks.") < 0
    )


def test_the_world_offers_prompts_and_lessons() -> None:
    mined, held_out = HOUSE_STYLE.mined(60, 3), HOUSE_STYLE.held_out(40, 3)
    assert not {p.prompt for p in mined} & {p.prompt for p in held_out}
    assert all(p.prompt.endswith(LENGTH) for p in (*mined, *held_out))
    assert [p.source.split(":")[0] for p in held_out] == ["seen"] * 20 + ["held"] * 20
    taught = HOUSE_STYLE.skill_examples(200, 3)
    assert len({lesson.principle for lesson in taught}) > 100
    other = [x for x in taught if x.gold != x.refined]
    assert 0.2 < len(other) / len(taught) < 0.9, "the hint often shows another answer's edit"
    assert HOUSE_STYLE.templates and "{gold}" in HOUSE_STYLE.templates.hint
    for ask in (HOUSE_STYLE.mined, HOUSE_STYLE.held_out, HOUSE_STYLE.skill_examples):
        with pytest.raises(ValueError, match="up to 100,000"):
            ask(10**6, 0)


def test_other_answers_than_those_of_the_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fingerprints follow code: `DIGEST` ties the file to it."""
    changed = tmp_path / "answers.jsonl"
    changed.write_text(ANSWERS.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    monkeypatch.setattr("models.house_style.answers.ANSWERS", changed)
    with pytest.raises(UserError, match="other answers"):
        answers.__wrapped__()
