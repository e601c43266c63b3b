"""Held-out answers without gold, comparisons joined by prompt, and the figures made of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted import compare, turns_of

from constitutions.errors import UserError
from models.judges.base import Grade, Judge, Judgement, Pair, Resources
from models.judges.oracle import OracleJudge
from models.judges.similarity import GoldSimilarity
from models.planted import oracle
from models.planted.oracle import TRUTH
from models.planted.world import BEHAVIOURS, PlantedExample, arrange, sample_examples
from models.policy import Completion, Message, Progress, Request, Scoring
from models.prompts import CHAT
from tasks.evaluate import EvaluateSettings
from tasks.judging.rates import source_metrics, win_rate_metrics, win_rates
from tasks.judging.truth import faithfulness_metrics, truth_metrics
from tasks.policies.answers import Generation, answer_metrics
from tasks.rows import (
    Answer,
    Candidate,
    Comparison,
    Labelled,
    Mined,
    Prompt,
    from_table,
    prompt_id,
    to_table,
)

SETTINGS = EvaluateSettings(max_response_tokens=40, max_principle_tokens=9)


class ScriptedPolicy:
    """Answers by rule: y1 echoes the prompt, z counts the turns, y2 quotes both."""

    def __init__(self, finish: str = "stop") -> None:
        self.batches: list[list[Request]] = []
        self.finish = finish

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.batches.append(list(requests))
        if progress:
            progress(len(requests))
        return [[self._complete(turns_of(r))] for r in requests]

    def _complete(self, messages: Sequence[Message]) -> Completion:
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        question = messages[0]["content"]
        text = [f"y1({question})", f"z({question})", f"y2({' '.join(said)})"][len(said)]
        finish = self.finish if len(said) == 2 else "stop"
        return Completion(text=text, tokens=len(said) + 1, logprob=-1.0, finish=finish)

    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        raise AssertionError("evaluation does not score responses")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("evaluation reads no hidden states")


class LongerWins(Judge):
    """The longer answer wins; on the prompts in `stumped` it has no opinion."""

    name = "length"

    def __init__(self, stumped: Sequence[str] = ()) -> None:
        self.stumped = stumped

    @classmethod
    def open(cls, settings: Any, given: Resources) -> Judge:
        return cls()

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        return [self._judge(pair) for pair in pairs]

    def _judge(self, pair: Pair) -> Judgement:
        if pair.prompt[-1]["content"] in self.stumped:
            return Judgement(outcome=None, failure="no opinion")
        margin = len(pair.ours) - len(pair.theirs)
        return Judgement(outcome=0.5 + 0.5 * ((margin > 0) - (margin < 0)))


def ask(text: str, gold: str = "GOLD") -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Prompt(prompt_id=prompt_id(messages), prompt=messages, gold=gold, source=text)


PROMPTS = [ask(f"question {i}") for i in range(6)]


def answers(
    iteration: int,
    refined: Callable[[int], str],
    initial: Callable[[int], str] = lambda i: "plain",
) -> list[Answer]:
    return [
        Answer(
            prompt_id=p.prompt_id,
            iteration=iteration,
            initial=initial(i),
            principle="Be brief",
            refined=refined(i),
            finish="stop",
            tokens=3,
        )
        for i, p in enumerate(PROMPTS)
    ]


# --- answers


def generation(seed: int = 0, iteration: int = 0) -> Generation:
    return Generation(templates=CHAT, settings=SETTINGS, seed=seed, iteration=iteration)


def test_answer_takes_three_batches_and_chains_the_turns() -> None:
    policy = ScriptedPolicy()
    done: list[int] = []
    rows = generation(seed=3, iteration=2).ask(policy, PROMPTS, done.append)
    assert [len(batch) for batch in policy.batches] == [6, 6, 6]
    assert sum(done) == 18
    assert [r.prompt_id for r in rows] == [p.prompt_id for p in PROMPTS]
    first = rows[0]
    assert (first.initial, first.principle) == ("y1(question 0)", "z(question 0)")
    assert first.refined == "y2(y1(question 0) z(question 0))"
    assert (first.iteration, first.tokens, first.finish) == (2, 1 + 2 + 3, "stop")


def test_answer_never_shows_the_gold_response() -> None:
    policy = ScriptedPolicy()
    generation().ask(policy, PROMPTS)
    shown = [m["content"] for batch in policy.batches for r in batch for m in turns_of(r)]
    assert not any("GOLD" in text for text in shown)


def test_noise_depends_on_seed_and_prompt_but_not_on_the_iteration() -> None:
    def keys(seed: int, iteration: int) -> list[str]:
        policy = ScriptedPolicy()
        generation(seed, iteration).ask(policy, PROMPTS)
        return [r.key for batch in policy.batches for r in batch]

    assert keys(0, 1) == keys(0, 3)
    assert len(set(keys(0, 1))) == 18
    assert not set(keys(0, 1)) & set(keys(1, 1))


def test_answer_obeys_its_settings_and_reports_a_cut() -> None:
    policy = ScriptedPolicy(finish="length")
    rows = generation().ask(policy, PROMPTS)
    assert [batch[0].max_tokens for batch in policy.batches] == [40, 9, 40]
    assert {r.temperature for batch in policy.batches for r in batch} == {0.0}
    assert {row.finish for row in rows} == {"length"}


# --- compare


def test_rows_are_joined_by_prompt_whatever_their_order() -> None:
    ours = answers(1, refined=lambda i: "long answer" if i < 4 else "no")
    theirs = answers(0, refined=lambda i: "medium")
    shuffled = random.Random(0).sample(theirs, len(theirs))
    assert compare(ours[::-1], shuffled, PROMPTS, LongerWins()) == compare(
        ours, theirs, PROMPTS, LongerWins()
    )
    rates = win_rates(compare(ours[::-1], shuffled, PROMPTS, LongerWins()), seed=0)
    assert rates["refined_vs_0"].rate == pytest.approx(4 / 6)
    assert rates["initial_vs_0"].ties == 6


def test_each_arm_is_compared_with_its_own_reference() -> None:
    zero = answers(0, refined=lambda i: "x" * 5, initial=lambda i: "x" * 3)
    two = answers(2, refined=lambda i: "x" * 4, initial=lambda i: "x" * 4)
    three = answers(3, refined=lambda i: "x" * 4, initial=lambda i: "x" * 2)
    rows = [
        row
        for reference in (zero, two, three)
        for row in compare(three, reference, PROMPTS, LongerWins())
    ]
    rates = {name: rate.rate for name, rate in win_rates(rows, seed=0).items()}
    assert rates == {
        "refined_vs_0": 0.0,
        "initial_vs_0": 0.0,
        "refined_vs_initial_0": 1.0,
        "refined_vs_previous": 0.5,
        "initial_vs_previous": 0.0,
        "refined_vs_own_initial": 1.0,
    }
    assert len(rows) == 6 * len(PROMPTS)


def test_at_iteration_1_the_previous_policy_is_the_initial_one() -> None:
    one, zero = answers(1, lambda i: "longer"), answers(0, lambda i: "short")
    rates = win_rates(compare(one, zero, PROMPTS, LongerWins()), seed=0)
    assert rates["refined_vs_previous"] == rates["refined_vs_0"]


def test_a_missing_answer_and_a_failed_judgement_are_rows_that_do_not_count() -> None:
    ours, theirs = answers(1, lambda i: "longer"), answers(0, lambda i: "short")
    rows = compare(ours, theirs[1:], PROMPTS, LongerWins(stumped=["question 3"]))
    refined = [r for r in rows if (r.answer, r.reference) == ("refined", "refined")]
    assert [r.prompt_id for r in refined] == [p.prompt_id for p in PROMPTS]
    assert refined[0].outcome is None and refined[0].failure == "their answer: there is none"
    assert refined[3].outcome is None and refined[3].failure == "no opinion"
    rate = win_rates(rows, seed=0)["refined_vs_0"]
    assert (rate.rate, rate.n, rate.failed) == (1.0, 4, 2)


def test_an_empty_answer_loses_but_an_overflow_is_a_failure() -> None:
    ours = answers(1, refined=lambda i: " " if i < 2 else "long answer")
    ours[1] = replace(ours[1], finish="overflow")
    theirs = answers(0, refined=lambda i: "" if i == 2 else "short")
    ours[3] = replace(ours[3], refined="")
    theirs[3] = replace(theirs[3], refined="\n")
    shorter = GoldSimilarity(lambda gold, texts: [Grade(1 / (1 + len(t))) for t in texts], "short")
    outcomes = [r.outcome for r in compare(ours, theirs, PROMPTS, shorter)[:6]]
    assert outcomes == [0.0, None, 1.0, 0.5, 0.0, 0.0]


def test_when_every_judgement_fails_the_error_gives_the_reason() -> None:
    speechless = GoldSimilarity(lambda gold, texts: [Grade(None, "no words left")] * 2, "rouge_l")
    rows = compare(answers(1, lambda i: "a"), answers(0, lambda i: "b"), PROMPTS, speechless)
    with pytest.raises(UserError, match=r"all 6 judgements failed.*no words left"):
        win_rates(rows, seed=0)


@pytest.mark.parametrize("fault", ["mixed", "twice", "none"])
def test_answers_of_two_iterations_or_twice_to_a_prompt_are_refused(fault: str) -> None:
    good = answers(1, lambda i: "a")
    bad = {"mixed": [*good[1:], replace(good[0], iteration=2)], "twice": [*good, good[0]]}
    with pytest.raises(ValueError, match="one answer a prompt"):
        compare(bad.get(fault, []), good, PROMPTS, LongerWins())


def test_comparisons_survive_arrow() -> None:
    rows = compare(answers(1, lambda i: "aa"), answers(0, lambda i: "b")[1:], PROMPTS, LongerWins())
    assert from_table(to_table(rows, Comparison), Comparison) == rows


# --- figures


def test_win_rate_figures_have_their_interval_beside_them() -> None:
    ours = answers(1, refined=lambda i: "long answer" if i < 4 else "no")
    rates = win_rates(compare(ours, answers(0, lambda i: "same"), PROMPTS, LongerWins()), seed=0)
    figures = win_rate_metrics(rates)
    low, high = figures["win_rate/refined_vs_0_low"], figures["win_rate/refined_vs_0_high"]
    assert figures["win_rate/refined_vs_0"] == pytest.approx(4 / 6)
    assert low < 4 / 6 < high
    assert figures["win_rate/refined_vs_0_failed"] == 0
    assert all(isinstance(value, float) for value in figures.values())


def test_each_source_of_prompts_has_its_own_win_rate() -> None:
    mixed = [replace(p, source=f"{'ab'[i % 2]}/x.jsonl:{i}") for i, p in enumerate(PROMPTS)]
    ours = answers(1, refined=lambda i: "longer" if i % 2 else "s")
    rows = compare(ours, answers(0, refined=lambda i: "short"), mixed, LongerWins())
    figures = source_metrics(rows, mixed, seed=0)
    assert figures["win_rate/a-x.jsonl/refined_vs_0"] == 0.0
    assert figures["win_rate/b-x.jsonl/refined_vs_0"] == 1.0
    assert figures["win_rate/b-x.jsonl/initial_vs_0_low"] == 0.5
    failed = [replace(r, outcome=None) if r.prompt_id == mixed[1].prompt_id else r for r in rows]
    assert source_metrics(failed, mixed, seed=0)["win_rate/b-x.jsonl/refined_vs_0"] == 1.0
    assert source_metrics(rows, [replace(p, source="one:1") for p in mixed], seed=0) == {}


def test_answer_figures_by_hand() -> None:
    rows = answers(1, refined=lambda i: ["plain", "plain", "", "a" * 10, "a" * 10, "a" * 10][i])
    rows[0] = replace(rows[0], finish="length")
    assert answer_metrics(rows) == pytest.approx(
        {
            "answers/initial_characters": 5,
            "answers/refined_characters": 40 / 6,
            "answers/kept_initial": 2 / 6,
            "answers/empty": 1 / 6,
            "answers/truncated": 1 / 6,
            "answers/tokens": 3,
        }
    )


# --- the planted world, where the truth is known

EXAMPLES = sample_examples(40, seed=5, split="eval", combinations="any")
WORLD = [ask(example.prompt, example.gold) for example in EXAMPLES]


def wording(behaviour: str, number: int = 0) -> str:
    return BEHAVIOURS[behaviour].wordings[number].format("cost")


def response(example: PlantedExample, behaviours: Sequence[str]) -> str:
    return arrange(example.chore.core, {b: BEHAVIOURS[b].forms[0] for b in behaviours})


def one_needed(example: PlantedExample) -> str:
    return min(example.needed)


def labelled(
    label: Callable[[PlantedExample], str], cluster: Callable[[str], int]
) -> list[Labelled]:
    """Trajectories that show the behaviour which their principle names, under any label."""
    rows = []
    for i, (p, example) in enumerate(zip(WORLD, EXAMPLES, strict=True)):
        behaviour = one_needed(example)
        rows.append(
            Labelled(
                prompt_id=p.prompt_id,
                prompt=p.prompt,
                gold=p.gold,
                source=p.source,
                sample=0,
                initial=example.chore.core,
                principle=wording(behaviour, i % 3),
                refined=response(example, [behaviour]),
                initial_score=0.1,
                score=0.2,
                weight=1.0,
                label=label(example),
                cluster=cluster(behaviour),
                replaced=True,
            )
        )
    return rows


def planted_answers(
    iteration: int, behaviours: Callable[[PlantedExample], Sequence[str]]
) -> list[Answer]:
    return [
        Answer(
            prompt_id=p.prompt_id,
            iteration=iteration,
            initial=example.chore.core,
            principle=wording(one_needed(example)),
            refined=response(example, behaviours(example)),
            finish="stop",
            tokens=1,
        )
        for p, example in zip(WORLD, EXAMPLES, strict=True)
    ]


def test_the_oracle_prefers_what_the_prompt_calls_for() -> None:
    right = planted_answers(1, lambda e: [one_needed(e)])
    wrong = planted_answers(0, lambda e: ["joke"])
    rates = win_rates(compare(right, wrong, WORLD, OracleJudge(oracle)), seed=0)
    assert rates["refined_vs_0"].rate == 1.0
    assert rates["refined_vs_initial_0"].rate == 1.0
    assert rates["initial_vs_0"].ties == len(WORLD)


def test_faithfulness_tells_right_labels_from_wrong_ones() -> None:
    rows = labelled(label=lambda e: wording("joke"), cluster=lambda b: 0)
    figures = faithfulness_metrics(oracle, labelled=rows, answers=planted_answers(1, lambda e: []))
    assert figures == {
        "faithfulness/original": 1.0,
        "faithfulness/label": 0.0,
        "faithfulness/answers": 0.0,
    }


def test_a_principle_that_names_no_behaviour_is_followed_by_nothing() -> None:
    rows = labelled(label=lambda e: "any", cluster=lambda b: 0)
    assert faithfulness_metrics(oracle, labelled=rows, answers=[]) == {
        "faithfulness/original": 1.0,
        "faithfulness/label": 0.0,
    }


def planted(rows: Sequence[Labelled], principles: Sequence[str]) -> dict[str, float]:
    mined = [
        Mined(
            prompt_id=r.prompt_id,
            prompt=r.prompt,
            gold=r.gold,
            source=r.source,
            initial=r.initial,
            initial_finish="stop",
            initial_tokens=1,
            candidates=tuple(
                Candidate(
                    sample=i,
                    principle=z,
                    critique="",
                    refined=r.refined,
                    finish="stop",
                    tokens=1,
                )
                for i, z in enumerate((r.principle, wording("joke"), "not a principle", "be nice"))
            ),
        )
        for r in rows
    ]
    answers_ = planted_answers(1, lambda e: [one_needed(e)])
    found = {"mined": mined, "labelled": rows, "prompts": WORLD, "answers": answers_}
    return truth_metrics("planted", oracle, principles=principles, **found)  # type: ignore[arg-type]


def test_perfect_clusters_agree_with_the_truth_and_arbitrary_ones_do_not() -> None:
    names = list(BEHAVIOURS)
    perfect = planted(labelled(lambda e: "", names.index), [wording("warn")])
    assert perfect["planted/nmi"] == pytest.approx(1.0)
    assert perfect["planted/ari"] == pytest.approx(1.0)
    halves = planted(labelled(lambda e: "", lambda b: names.index(b) % 2), [wording("warn")])
    assert halves["planted/nmi"] < 0.7 and halves["planted/ari"] < 0.5
    assert perfect["planted/malformed"] == 0


def test_precision_recall_and_duplicates_by_hand() -> None:
    constitution = [
        wording("warn"),
        wording("warn", 1),
        wording("cite"),
        wording("joke"),
        "be nice",
    ]
    figures = planted(labelled(lambda e: "", lambda b: 0), constitution)
    assert figures["planted/precision"] == pytest.approx(3 / 5)
    assert figures["planted/duplicates"] == 1
    assert figures["planted/recall"] == pytest.approx(2 / len(TRUTH))
    everything = planted(labelled(lambda e: "", lambda b: 0), [wording(b) for b in TRUTH])
    assert everything["planted/recall"] == everything["planted/precision"] == 1.0


def test_a_constitution_is_also_read_by_what_its_trajectories_do() -> None:
    """Whatever the words of its entries: here each behaviour's trajectories have a letter."""
    names = sorted({one_needed(e) for e in EXAMPLES})
    rows = labelled(lambda e: f"letter {names.index(one_needed(e))}", lambda b: 0)
    letters = [f"letter {n}" for n in range(len(names))]
    figures = planted(rows, [*letters, "of no trajectory"])
    assert figures["planted/recall"] == 0.0
    assert figures["planted/recall_by_effect"] == pytest.approx(len(names) / len(TRUTH))
    assert figures["planted/precision_by_effect"] == pytest.approx(len(names) / (len(names) + 1))
    assert figures["planted/duplicates_by_effect"] == 0


def test_shares_of_right_principles_and_of_surviving_content() -> None:
    figures = planted(labelled(lambda e: "", lambda b: 0), [])
    assert figures["planted/hinted_right"] == pytest.approx(1 / 4)
    assert figures["planted/kept_right"] == figures["planted/invented_right"] == 1.0
    assert figures["planted/core_initial"] == figures["planted/core_refined"] == 1.0
    assert "planted/precision" not in figures and figures["planted/recall"] == 0.0


def test_a_principle_that_the_first_answer_already_follows_is_not_right() -> None:
    rows = [replace(r, initial=r.refined) for r in labelled(lambda e: "", lambda b: 0)]
    figures = planted(rows, [])
    assert figures["planted/kept_right"] == figures["planted/hinted_right"] == 0.0
