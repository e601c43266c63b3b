"""The validator: what is kept, with what weight, and why the rest is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from filtered import filter_rows

from tasks.filter import FilterSettings, weights
from tasks.rows import Scored, ScoredCandidate

GOLD = "Restart the router first, then wait one minute before you try the page again."


def candidate(sample: int, score: float | None, **change: object) -> ScoredCandidate:
    values: dict[str, object] = {
        "sample": sample,
        "principle": "Say what to do first.",
        "critique": "",
        "refined": "Restart it.",
        "finish": "stop",
        "tokens": 5,
        "score": score,
        "unscored": None if score is not None else "no words",
    }
    return ScoredCandidate(**(values | change))  # type: ignore[arg-type]


def row(*candidates: ScoredCandidate, initial: float | None = 0.4, name: str = "a") -> Scored:
    return Scored(
        prompt_id=name,
        prompt=({"role": "user", "content": "My page does not load."},),
        gold=GOLD,
        source=f"file.jsonl:{name}",
        initial="Try again.",
        initial_finish="stop",
        initial_tokens=3,
        candidates=candidates,
        initial_score=initial,
        initial_unscored=None if initial is not None else "no words",
    )


def test_weights_follow_the_posterior() -> None:
    assert weights([0.5, 0.7, 0.3], 0.4, 1.0) == pytest.approx([0.25, 0.75, 0.0])
    assert weights([0.5, 0.7, 0.3], 0.4, 0.5) == pytest.approx([0.1, 0.9, 0.0])
    assert weights([0.4, 0.1], 0.4, 1.0) == [0.0, 0.0]
    assert weights([0.41, 0.42], 0.4, 1e-6) == pytest.approx([0.0, 1.0])
    assert not any(map(math.isnan, weights([1e-9, 2e-9], 0.0, 0.001)))


def test_best_of_n_keeps_the_best_and_says_why_not_the_others() -> None:
    kept, rejected = filter_rows(
        [row(candidate(0, 0.5), candidate(1, 0.6), candidate(2, 0.4))], FilterSettings(), "0/1"
    )
    assert [(t.sample, t.weight) for t in kept] == [(1, 1.0)]
    assert {r.sample: r.reason for r in rejected} == {0: "not selected", 2: "not better"}


def test_soft_keeps_every_improvement() -> None:
    settings = FilterSettings(selection="soft")
    kept, _ = filter_rows([row(candidate(0, 0.5), candidate(1, 0.7))], settings, "0/1")
    assert [t.weight for t in kept] == pytest.approx([0.25, 0.75])


def test_rejection_draws_by_weight_and_repeats() -> None:
    settings = FilterSettings(selection="rejection")
    rows = [row(candidate(0, 0.5), candidate(1, 0.7), name=str(i)) for i in range(400)]
    kept, _ = filter_rows(rows, settings, "0/1")
    assert kept == filter_rows(rows, settings, "0/1")[0]
    share = sum(t.sample for t in kept) / len(kept)
    assert 0.68 < share < 0.82  # three in four, within three standard errors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"principle": "  "}, "malformed principle"),
        ({"principle": "One.\nTwo."}, "malformed principle"),
        ({"principle": "word " * 41}, "malformed principle"),
        ({"principle": "One\0two."}, "malformed principle"),
        ({"principle": "Say: wait one minute before you try it."}, "gold leak"),
        ({"finish": "length"}, "truncated"),
        ({"finish": "overflow"}, "prompt too long"),
        ({"score": None, "unscored": "no words"}, "unscored"),
        ({"score": 0.4}, "not better"),
    ],
)
def test_each_fault_has_its_reason(change: dict[str, object], reason: str) -> None:
    faulty = candidate(0, 0.9)
    changed = candidate(**({"sample": 0, "score": 0.9} | change))  # type: ignore[arg-type]
    kept, rejected = filter_rows([row(changed)], FilterSettings(), "0/1")
    assert not kept
    assert [(r.sample, r.reason) for r in rejected] == [(0, reason), (None, "no candidate kept")]
    assert reason in rejected[1].detail
    assert filter_rows([row(faulty)], FilterSettings(), "0/1")[0]


def test_from_a_first_response_that_was_cut_nothing_is_learned() -> None:
    """It is easily improved, and training would teach to stop where it was cut."""
    cut = replace(row(candidate(0, 0.9)), initial_finish="length")
    kept, rejected = filter_rows([cut], FilterSettings(), "0/1")
    assert not kept and {r.reason for r in rejected} == {"truncated"}
    assert "cut at its token limit" in {r.detail for r in rejected}
    assert filter_rows([cut], FilterSettings(keep_truncated=True), "0/1")[0]


def test_words_of_the_prompt_are_no_leak() -> None:
    quoting = row(candidate(0, 0.9, principle="Restart the router first, then wait one minute."))
    known = Scored(
        **{name: getattr(quoting, name) for name in Scored.__dataclass_fields__}
        | {"initial": "Restart the router first, then wait one minute."}
    )
    assert not filter_rows([quoting], FilterSettings(), "0/1")[0]
    assert filter_rows([known], FilterSettings(), "0/1")[0]


def test_every_candidate_and_prompt_is_accounted_for() -> None:
    rows = [
        row(candidate(0, 0.5), candidate(1, None), name="a"),
        row(candidate(0, 0.1), candidate(1, 0.2), name="b"),
        row(candidate(0, 0.9), candidate(1, 0.8), initial=None, name="c"),
        row(name="d"),
    ]
    kept, rejected = filter_rows(rows, FilterSettings(), "0/1")
    candidates = [r for r in rejected if r.sample is not None]
    prompts = [r for r in rejected if r.sample is None]
    assert len(kept) + len(candidates) == 6
    assert {t.prompt_id for t in kept} | {r.prompt_id for r in prompts} == set("abcd")
    assert all(r.reason and r.source for r in rejected)
