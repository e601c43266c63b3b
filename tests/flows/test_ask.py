"""`staple ask` and `staple constitution show` on an experiment of SAMI."""

from __future__ import annotations

import pytest
from command import staple
from small_loop import PAIRS

from flows.experiment import record_of
from flows.schema import ExperimentSettings
from tasks.sami.draw import pool_of


def test_a_policy_answers_with_and_without_a_constitution(
    taught: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    own = staple(capsys, "ask", "taught", "What is 3?")
    assert own.code == 0, own.err
    pool = pool_of(record_of("taught").needs("write", 0))
    assert all(p.text in own.out for p in pool.trained[:2])
    assert pool.trained[2].text not in own.out
    assert "─ with constitution" in own.out and "─ without constitution" in own.out
    given = staple(
        capsys,
        *("ask", "taught", "What is 3?", "--iteration", "0"),
        *("--principle", "Sing.", "--principle", "Dance."),
    )
    assert "1. Sing." in given.out and "2. Dance." in given.out
    assert "the initial policy" in given.out
    empty = staple(capsys, "ask", "taught", "What is 3?", "--principle", " ")
    assert empty.code == 2 and "the principle is empty" in empty.err


def test_another_method_takes_no_principles(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = staple(capsys, "ask", "lineage", "What is 3?", "--principle", "Sing.")
    assert refused.code == 2 and "method staple finds its principle itself" in refused.err


def test_its_constitution_is_shown(
    taught: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    beyond = staple(capsys, "constitution", "show", "taught", "--page", "2")
    assert beyond.code == 2 and "there is no page 2" in beyond.err
    shown = staple(capsys, "constitution", "show", "taught")
    assert shown.code == 0, shown.err
    assert all(pair["antithesis"] in shown.out for pair in PAIRS)
    pool = pool_of(record_of("taught").needs("write", 0))
    (line,) = [line for line in shown.out.splitlines() if "held out" in line]
    assert pool.held_out[0].text in line
