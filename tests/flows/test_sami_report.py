"""`staple report` on an experiment of SAMI."""

from __future__ import annotations

import math
import re

from command import words
from small_loop import run

from flows.commands.report import gather
from flows.experiment import note_settings, record_of
from flows.publish import iteration_metrics, log_figures
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from tasks.record.record import SUMMARY
from tasks.report.document import page
from tasks.rows import Prompt, Response
from tasks.sami.draw import pool_of

ABSENT = ("map of principles", "movement", "efinement rate", "iscovery rate", "efined answer")
"""What the report says of STaPLe alone."""


def test_the_page_shows_what_was_measured(taught: ExperimentSettings) -> None:
    e = gather(taught)
    text = page([e], {})
    shown = words(text)
    record = record_of("taught")
    figures = iteration_metrics({s: record.needs(s, 1) for s in ("sample", "train", "evaluate")})
    for rate in ("constitution_vs_0", "principles_vs_0", "antitheses_vs_0", "held_out_vs_0"):
        value = f"{100 * figures[f'win_rate/{rate}']:.1f} %"
        low = f"{100 * figures[f'win_rate/{rate}_low']:.1f}"
        assert f"{value} [{low}" in shown, rate
    assert f"{figures['mi/per_token']:.3f} ± {figures['mi/per_token_error']:.3f}" in shown
    assert f"log C = {math.log(2):.3f}" in shown
    for t in (0, 1):
        lengths = record.needs("evaluate", t).metrics
        assert f"{lengths['answers/antitheses_characters']:,.0f}" in shown
    assert f"{figures['generated_tokens']:,.0f}" in shown
    assert not [part for part in ABSENT if part in shown]
    assert "missing" not in shown and "Not drawn" not in shown
    stages = re.findall(r'<tr><th scope="row">(\w+)</th><td class="figure">', text)
    assert stages[:5] == ["prompts", "write", "sample", "train", "evaluate"]


def test_two_measures_are_not_one(taught: ExperimentSettings) -> None:
    """The held-out win rate is of answers without a constitution, as every other method's."""
    metrics = dict(gather(taught).history[1])
    metrics |= {"win_rate/plain_vs_0": 0.123, "win_rate/constitution_vs_0": 0.877}
    e = gather(taught)
    shown = words(page([type(e)(**{**vars(e), "history": {0: e.history[0], 1: metrics}})], {}))
    row = shown[shown.index("SAMI taught 1") :]
    assert row.index("12.3 %") < row.index("87.7 %"), "held-out win rate, then follows"
    (headline,) = re.findall(r"After iteration 1, answers with a constitution.*?parity\.", shown)
    assert "87.7 %" in headline and "12.3 %" not in headline
    assert "Without constitution, against the initial policy's answers: 12.3 %" in shown


def test_constitution_and_examples(taught: ExperimentSettings) -> None:
    shown = words(page([gather(taught)], {}))
    pool = pool_of(record_of("taught").needs("write", 0))
    assert len(pool.held_out) == 1 and len(pool.trained) == 3
    for p in pool.trained:
        assert f"{p.text} {p.antithesis} trained" in shown
    assert f"{pool.held_out[0].text} {pool.held_out[0].antithesis} held out" in shown
    record = record_of("taught")
    prompts = record.needs("prompts", 0).read("prompts", Prompt)
    part = shown[shown.index("Before and after The policy of iteration 1") :]
    assert part.count("Trained policy’s response") == len(prompts), "fewer than ten: all"
    for arm in ("principles", "antitheses", "held-out principles", "held-out antitheses"):
        assert f", with {arm} " in part, "in turn"
    responses = {
        t: {
            (r.prompt_id, r.arm): " ".join(r.response.split())
            for r in record.needs("evaluate", t).read("responses", Response)
        }
        for t in (0, 1)
    }
    first = min(prompts, key=lambda p: p.prompt_id).prompt_id
    before, after = (responses[t][first, "principles"] for t in (0, 1))
    assert before in part and after in part


def test_beside_staple(taught: ExperimentSettings, at_home: ExperimentSettings) -> None:
    text = page([gather(at_home), gather(taught)], {})
    shown = words(text)
    assert "STaPLe, constrained lineage 1" in shown and "SAMI taught 1" in shown
    assert 'id="e1-map"' in text and 'id="e2-map"' not in text
    assert 'id="e2-constitution"' in text and 'id="e1-constitution"' not in text
    assert "not to be compared with it" in shown
    alone = words(page([gather(at_home)], {}))
    assert "SAMI" not in alone and "Follows its constitution" not in alone


def test_its_pictures_are_logged(taught: ExperimentSettings) -> None:
    e, record = gather(taught), record_of("taught")
    log_figures(record, e.history, constitutional=e.constitutional)
    files = {f.path for f in record.client.list_artifacts(record.iteration_run(SUMMARY))}
    assert {"win_rate.png", "information.png", "lengths.png", "tokens.png"} <= files
    assert "constitution.png" not in files


def test_before_anything_is_trained(taught: ExperimentSettings) -> None:
    settings = with_changes(taught, {"experiment": "untaught", "iterations": 0})
    note_settings(settings)
    run(settings)
    shown = words(page([gather(settings)], {}))
    assert "no trained policy was evaluated yet" in shown and "SAMI untaught 0 initial" in shown
    assert "Not drawn. The experiment has no iteration" in shown
