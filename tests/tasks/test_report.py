"""The table of methods by benchmarks, and a page that shows only what there is."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from command import words

from tasks.judging.gate import GatePoint
from tasks.record.record import Attempt
from tasks.report.document import best_iteration, budget, page, results, table
from tasks.report.headline import headline
from tasks.report.recorded import Recorded, RecordedStage

WIN = "win_rate/refined_vs_initial_0"
HISTORY: dict[int, dict[str, float]] = {
    0: {WIN: 0.5, "seconds/evaluate": 1.0, "prompts": 10.0, "answers/tokens": 2.0},
    1: {
        WIN: 0.9,
        f"{WIN}_low": 0.85,
        f"{WIN}_high": 0.95,
        "mt_bench/score": 7.714,
        "generated_tokens": 1000.0,
        "train/trained_tokens": 40.0,
        "train/tokens": 90.0,
        "prompts": 30.0,
        "answers/tokens": 3.0,
        "seconds/evaluate": 2.0,
    },
    2: {WIN: 0.8, "generated_tokens": 500.0, "seconds/evaluate": 3.0},
}


def attempt(stage: str, t: int) -> Attempt:
    return Attempt(stage, t, f"run-{t}", "f" * 64, "d" * 64, {}, {}, 1.0, True, None)  # type: ignore[arg-type]


def recorded(history: dict[int, dict[str, float]], **changes: Any) -> Recorded:
    attempts = {t: {"evaluate": attempt("evaluate", t)} for t in history}
    values: dict[str, Any] = {
        "name": "small",
        "method": "STaPLe, constrained",
        "about": "It refines.",
        "model": "models/small",
        "data": "rows.jsonl",
        "found": headline(WIN, history, compared="refined answers", judge="oracle"),
        "caveat": "The judge is an oracle.",
        "first_answers": "Training teaches to refine.",
        "outdated": "",
        "headline": WIN,
        "settings": "seed: 7\n",
        "seed": 7,
        "iterations": 2,
        "stages": [],
        "attempts": attempts,
        "history": history,
        "changes": {},
    }
    return Recorded(**{**values, **changes})


def test_every_evaluated_iteration_has_a_line() -> None:
    rows = results([recorded({**HISTORY, 3: {WIN: 0.7}})])
    assert [(row.iteration, row.marks) for row in rows] == [
        (0, ("initial",)),
        (1, ("best",)),
        (2, ()),
        (3, ("last",)),
    ]
    assert rows[1].cells == (("90.0\u00a0%", "[85.0, 95.0]"), ("7.71", ""))
    assert rows[2].cells == (("80.0\u00a0%", ""), ("–", ""))


def test_the_best_may_be_the_last_and_the_first_of_equals() -> None:
    rising = {0: {WIN: 0.99}, 1: {WIN: 0.6}, 2: {WIN: 0.7}}
    assert [row.marks for row in results([recorded(rising)])][1:] == [(), ("best", "last")]
    assert best_iteration(recorded({1: {WIN: 0.6}, 2: {WIN: 0.6}})) == 1
    assert best_iteration(recorded({0: {WIN: 0.6}})) is None


def test_a_column_appears_where_any_experiment_has_it() -> None:
    other = recorded(
        {0: {}, 1: {"win_rate/initial_vs_0": 0.7, "win_rate/planted-held/initial_vs_0": 0.25}},
        name="golds",
        method="SFT on gold",
        headline="win_rate/initial_vs_0",
    )
    found = {"planted/recall": 0.75, "planted/precision": 0.5, f"{WIN}_length_controlled": 0.6}
    rows = table([recorded({**HISTORY, 1: HISTORY[1] | found}), other])
    assert rows[1]["Held-out win rate at equal lengths"] == "60.0\u00a0%"
    assert rows[1]["Recall (planted world)"] == "75.0\u00a0%"
    assert rows[1]["Precision (planted world)"] == "50.0\u00a0%"
    assert rows[2]["iteration"] == "2 (last)"
    assert rows[1]["MT-Bench"] == "7.71" and rows[-1]["MT-Bench"] == "–"
    assert rows[-1]["Held-out win rate"] == "70.0\u00a0%", "of an SFT, its first answer"
    assert rows[-1]["Held-out win rate, combinations never mined"] == "25.0\u00a0%"
    assert rows[1]["Held-out win rate, combinations never mined"] == "–"
    assert "AlpacaEval win rate" not in rows[0]
    assert (rows[-1]["method"], rows[-1]["iteration"]) == ("SFT on gold", "1 (best, last)")


def test_the_head_says_what_it_is_and_what_was_found() -> None:
    beside = {f"{WIN}_length_controlled": 0.6, "win_rate/initial_vs_0": 0.55}
    e = recorded({**HISTORY, 1: HISTORY[1] | beside, 2: {}}, attempts={})
    text = page([e], {"staple": "1.2.3"}, written="1 May 2026")
    head = words(text[: text.index("</header>")])
    assert "1 May 2026, staple 1.2.3" in head
    assert (
        "It refines. After iteration 1, refined answers have a win rate of 90.0 % [85.0, 95.0] (60.0 % "
        "at equal lengths) on 10 held-out prompts, by the judge oracle; 50 % is parity." in head
    )
    assert "The judge is an oracle." in head
    assert "Model models/small Judge oracle" in head
    assert "Data rows.jsonl: 30 prompts to learn from, 10 held out" in head


def test_budgets_are_sums_of_what_was_recorded() -> None:
    spent = budget(recorded(HISTORY))
    assert (spent.prompts, spent.generated, spent.trained, spent.read) == (30, 1500, 40, 90)
    assert (spent.answered, spent.seconds) == (50, 6)


@pytest.fixture
def missing() -> str:
    stages = [
        RecordedStage("prompts", 1, "finished", "", None),
        RecordedStage("mine", 1, "failed", "OSError: <b>no & space</b>", None),
        RecordedStage("cluster", 1, "missing", "", None),
    ]
    outdated = "Not all of it is current: 1 failed, 1 missing."
    return page([recorded({}, stages=stages, attempts={}, outdated=outdated)], {"Python": "3.11"})


def test_what_is_missing_is_named_with_its_reason(missing: str) -> None:
    assert "There is no map. Stage “cluster” of iteration 1 is missing." in missing
    assert "The method, STaPLe, constrained, has no stage “evaluate”." in missing
    head = missing[: missing.index("</header>")]
    assert "Not all of it is current: 1 failed, 1 missing." in head
    assert "mine of iteration 1 is failed: OSError: &lt;b&gt;no &amp; space&lt;/b&gt;" in head
    assert "No policy was evaluated yet." in missing
    nothing = recorded({}, iterations=0, stages=[])
    assert "has no iteration (iterations = 0)" in page([nothing], {})


def test_the_page_names_nothing_outside_of_itself(missing: str) -> None:
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", missing)
    assert links and all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    assert not re.search(r"url\(|@import", missing)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)', missing)
    assert policy and policy[1].startswith("default-src &#39;none&#39;; img-src data:;")
    assert "unsafe" not in policy[1]


def test_the_curve_of_a_gate_is_shown_where_there_is_one(missing: str) -> None:
    point = GatePoint(threshold=0.25, kept=0.4, tokens=12.34, win_rate=0.8, low=0.7, high=0.9)
    tables: dict[str, list[Any]] = {"gate": [point]}
    evaluated: Any = SimpleNamespace(
        read=lambda name, _: tables.get(name, []), provenance=lambda: SimpleNamespace(notes={})
    )
    history = {1: HISTORY[1] | {"gate/win_rate": 0.8}}
    shown = page([recorded(history, attempts={1: {"evaluate": evaluated}})], {})
    cells = ("0.250", "40 %", "12.3", "0.800 [0.700, 0.900]")
    assert "".join(f'<td class="figure">{cell}</td>' for cell in cells) in shown
    assert 'href="#e1-gate"' in shown and "The gate" not in missing


def test_a_setting_of_one_iteration_is_among_the_commands() -> None:
    changed = recorded(HISTORY, attempts={}, changes={1: {"cluster.representative": "it's"}})
    text = page([changed], {}).replace("&#34;", '"').replace("&#39;", "'")
    assert (
        "staple stage cluster --experiment small --iteration 1 --set 'cluster.representative="
        in text
    )
    assert "staple run small --resume" in text
