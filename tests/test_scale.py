"""`benchmarks.scale` at a tiny size: a row for each stage, measured once, and a table of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import scale
from benchmarks.scale_world import Recombined, World, given_sentences, made_sentences
from models.policy import Request, assistant, user

ROOT = Path(__file__).parents[1]


def measured(folder: Path, *words: str) -> str:
    """What the script prints, as its users start it."""
    where = ["--out", str(folder / "rows.jsonl"), "--folder", str(folder / "work"), "--keep"]
    sizes = ["--sizes", "30", "--samples", "3", "--bytes", "400"]
    command = [sys.executable, "-m", "benchmarks.scale", *sizes, *where, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_stage_has_a_row_that_is_measured_once(tmp_path: Path) -> None:
    measured(tmp_path, "--stages", "mine", "score")
    rows = scale.rows_of(tmp_path / "rows.jsonl")
    assert [(r["size"], r["step"], r["failure"]) for r in rows] == [
        (30, "mine", ""),
        (30, "score", ""),
    ], "the prompts are made, and are not asked for"
    for row in rows:
        assert row["cpu"] > row["start"] > 0
        assert row["cpu"] > row["start"] + row["model"], "the stage itself takes time"
        assert row["own_rss"] > 50e6
        assert not row["reused"]
    mined, scored = (row["figures"] for row in rows)
    assert mined["mined_prompts"] == 30 and mined["mined_candidates"] == 90
    assert rows[0]["model"] > 0 == rows[1]["model"], "texts are recombined in mining alone"
    assert scored["unscored_candidates"] == 0
    assert scored["candidate_similarity"] > scored["initial_similarity"], "there is work to filter"
    assert measured(tmp_path, "--stages", "mine", "score") == "", "finished rows are kept"
    measured(tmp_path, "--stages", "prompts", "--memory", "0.2")
    failed = scale.rows_of(tmp_path / "rows.jsonl")[2:]
    assert [row["step"] for row in failed] == ["prompts"], "a stage that has no memory fails"
    assert failed[0]["failure"]
    table = measured(tmp_path, "--table")
    assert "3 samples, 400 bytes each, made texts, seed 0:\n\n| stage | prompts |" in table
    assert "\n| score | 30 |" in table
    assert "0.2 GB of address space" in table and "failed: " in table


def test_the_exponent_is_of_the_stage_alone(tmp_path: Path) -> None:
    small = {
        **{"size": 500, "step": "score", "samples": 16, "bytes": 3000, "seed": 0, "texts": ""},
        **{"memory": None, "settings": [], "failure": "", "cpu": 9.0, "start": 7.0, "model": 1.0},
        **{"wall": 9.5, "own_rss": 3e8, "child_rss": 0, "written": 1e6},
    }
    large = {**small, "size": 5_000, "cpu": 108.0}
    (tmp_path / "rows").write_text("".join(json.dumps(r) + "\n" for r in (small, large)) + '{"si')
    lines = list(scale.tables(scale.rows_of(tmp_path / "rows")))
    assert "| score | 500 | 9.0 | 1.0 | – | 9.5 | 300 | 0 | 1 |" in lines
    assert "| score | 5,000 | 108.0 | 100.0 | 2.00 | 9.5 | 300 | 0 | 1 |" in lines


def test_answers_are_as_long_as_asked_and_share_words_with_their_gold() -> None:
    world = World(made_sentences(0), 0, 3_000)
    policy = Recombined(world)
    prompts = [world.prompt(number) for number in range(200)]
    principle = world.principle("0/1/x/principle/0")
    asked = (user("why?"), assistant(principle), user("again."))
    initials = [world.answer(prompt, f"0/1/{number}") for number, prompt in enumerate(prompts)]
    requests = [
        Request(messages=(user(prompt), assistant(y1), *asked), key=f"0/1/{number}/0/refined")
        for number, (prompt, y1) in enumerate(zip(prompts, initials, strict=True))
    ]
    answers = [found[0].text for found in policy.generate(requests)]
    assert answers == [found[0].text for found in policy.generate(requests)]
    assert fmean(len(text.encode()) for text in answers) == pytest.approx(3_000, rel=0.15)
    assert len(set(prompts)) == 200
    effect = world.effect(principle)
    assert all(sentence in text for text in answers for sentence in effect)
    shared = [
        sum(s in text for s in world.gold(p)) for p, text in zip(prompts, answers, strict=True)
    ]
    assert fmean(shared) > 2


def test_principles_repeat_in_other_words_and_rare_ones_are_many() -> None:
    world = World(made_sentences(0), 0, 3_000)
    drawn = [world.principle(str(random.Random(i).random())) for i in range(5_000)]
    named = [" ".join(text.split()[1:3]) for text in drawn]
    assert 1_000 < len(set(named)) < 3_000, "of a few thousand, not all are drawn"
    assert len(set(drawn)) > 1.5 * len(set(named)), "one principle has many wordings"
    assert max(map(named.count, set(named))) > 100, "some are frequent"


def test_texts_can_be_given(tmp_path: Path) -> None:
    said = [f"This is sentence number {n} of the file that the user has." for n in range(400)]
    lines = [json.dumps({"turns": [{"role": "user", "content": " ".join(said[:200])}]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in said[200:]))
    assert given_sentences(tmp_path) == said
    (tmp_path / "b.csv").unlink()
    with pytest.raises(SystemExit, match="200 sentences, expected 400 at least"):
        given_sentences(tmp_path)
