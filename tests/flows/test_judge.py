"""`staple judge`: two response files and a real server behind a judge whose rule is known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from brief_judge import Judge, judging, size
from chat_model import build_chat_model
from command import Ran, staple

from models.judges.rubrics import PRINCIPLE
from models.policy import Message, PolicySettings
from tasks.judging.length_control import length_controlled
from tasks.judging.winrate import win_rate
from tasks.rows import from_table
from tasks.sami.responses import COLUMNS, JudgedRow, ResponseRow, read_responses

Rows = Sequence[ResponseRow]


def write(path: Path, rows: Rows) -> None:
    """A response file of these rows."""
    columns = {name: {row.key: getattr(row, name) for row in rows} for name in COLUMNS}
    path.write_text(json.dumps(columns))


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judging() as found:
        yield found


@pytest.fixture
def run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *arguments: staple(capsys, "judge", *map(str, arguments))


@pytest.fixture
def files(sami_responses: tuple[Path, Path], workplace: Path) -> tuple[Path, Path]:
    """The first 40 published pairs."""
    places = workplace / "trained.json", workplace / "base.json"
    for source, place in zip(sami_responses, places, strict=True):
        write(place, read_responses(source).rows[:40])
    return places


def made(folder: Path, n: int = 6) -> tuple[Path, Path]:
    """Files of our own: ours is shorter in every third row."""
    places = folder / "ours.json", folder / "theirs.json"
    for ours, place in ((True, places[0]), (False, places[1])):
        rows = [
            ResponseRow(
                key=f"row {i}",
                question=f"What is {i}?",
                constitution="1. Be brief.\n2. Be kind.",
                response="x" * (10 + i + (ours and (-5 if i % 3 == 0 else 5))),
            )
            for i in range(n)
        ]
        write(place, rows)
    return places


def expected(ours: Rows, theirs: Rows) -> list[float]:
    pairs = [(size(a.response), size(b.response)) for a, b in zip(ours, theirs, strict=True)]
    return [float(a < b) + (a == b) / 2 for a, b in pairs]


# Judging -------------------------------------------------------------------------------------


def test_the_published_responses_are_judged_by_their_constitutions(
    run: Callable[..., Ran], judge: Judge, files: tuple[Path, Path], workplace: Path
) -> None:
    ran = run(*files, *judge.options(), "--seed", 3, "--out", "out.parquet")
    assert ran.code == 0, ran.err
    ours, theirs = (read_responses(path).rows for path in files)
    outcomes = expected(ours, theirs)
    rate = win_rate(outcomes, seed=3)
    characters = [[len(row.response) for row in side] for side in (ours, theirs)]
    controlled = length_controlled(outcomes, *characters, seed=3, resamples=10_000)
    assert rate.rate > controlled.rate > 0.4, "shorter answers won by their length"
    for said in (
        "pairwise:principle:judge",
        f"{rate.wins} / {rate.ties} / {rate.losses}",
        f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]",
        f"{controlled.rate:.3f} [{controlled.low:.3f}, {controlled.high:.3f}]",
        f"{sum(characters[0]) / 40:,.1f} ours, {sum(characters[1]) / 40:,.1f} theirs",
        "position bias",
        "consistency of orders",
    ):
        assert said in ran.out, said
    rows = from_table(pq.read_table("out.parquet"), JudgedRow)
    assert [(row.key, row.outcome) for row in rows] == [
        (row.key, outcome) for row, outcome in zip(ours, outcomes, strict=True)
    ]
    assert [row.constitution for row in rows] == [row.constitution for row in ours]


def test_the_judge_reads_constitution_and_rubric_and_is_not_asked_twice(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    first = run(*files, *judge.options())
    assert first.code == 0, first.err
    assert len(judge.asked) == 12
    for text in judge.asked:
        assert "###Principle:\n> 1. Be brief.\n> 2. Be kind.\n" in text
        assert PRINCIPLE.criterion in text
    second = run(*files, *judge.options())
    assert len(judge.asked) == 12 and second.out == first.out
    run(*files, *judge.options(), "--force")
    assert len(judge.asked) == 24
    run(*files, *judge.options(**{"judge.temperature": 0.5}))
    assert len(judge.asked) == 36, "another judge"
    write(files[1], [*read_responses(files[1]).rows[:5], read_responses(files[0]).rows[5]])
    run(*files, *judge.options())
    assert len(judge.asked) == 46, "other responses, one of which needs no judge"


def test_swapped_files_give_one_minus_the_rate(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    one, other = run(*files, *judge.options()), run(*reversed(files), *judge.options())
    assert "2 / 0 / 4" in one.out and "0.333" in one.out
    assert "4 / 0 / 2" in other.out and "0.667" in other.out


def test_a_killed_run_goes_on_at_the_first_missing_shard(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    options = judge.options(shard_size=2)
    judge.proxy.plan = lambda i, body: "hang" if len(judge.asked) > 8 else None
    command = [sys.executable, "-m", "flows.commands.cli", "judge", *map(str, files), *options]
    with subprocess.Popen(command, cwd=workplace) as process:
        while len(judge.asked) <= 8:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        process.kill()
    judge.proxy.plan = lambda i, body: None
    judge.proxy.bodies.clear()
    ran = run(*files, *options)
    assert ran.code == 0 and "2 / 0 / 4" in ran.out
    assert len(judge.asked) == 4, "the last of three shards"


def test_a_reward_model_reads_the_constitution_in_the_request(
    run: Callable[..., Ran], workplace: Path
) -> None:
    from models.judges.reward import load_reward_model

    files, model = made(workplace), reward_model(workplace / "reward")
    given = {"model": model, "dtype": "float32", "device": "cpu", "quantization": "none"}
    options = [p for k, v in given.items() for p in ("--set", f"judge.policy.{k}={v}")]
    ran = run(*files, "--set", "judge.kind=reward", *options, "--out", "out.json")
    assert ran.code == 0, ran.err
    assert "reward:reward" in ran.out and "position bias" not in ran.out
    reward = load_reward_model(PolicySettings.model_validate(given | {"model": str(model)}))
    for row in json.loads(Path("out.json").read_text()):
        asked: Message = {"role": "user", "content": f"{row['constitution']}\n\n{row['question']}"}
        scores = [g.score for g in reward.score([((asked,), row[k]) for k in ("ours", "theirs")])]
        assert [row["our_score"], row["their_score"]] == pytest.approx(scores, abs=1e-5)


def reward_model(directory: Path) -> Path:
    """A small random classifier."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    build_chat_model(directory, "llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = AutoConfig.from_pretrained(directory, num_labels=1)
        AutoModelForSequenceClassification.from_config(shape).save_pretrained(directory)
    return directory


def test_where_one_side_is_always_longer_there_is_no_length_controlled_rate(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    rows = read_responses(files[0]).rows
    write(files[1], [replace(row, response=row.response + "!") for row in rows])
    ran = run(*files, *judge.options())
    assert ran.code == 0 and "– (our answer is shorter in every pair)" in ran.out


def test_rows_of_one_side_only_are_named(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    write(files[1], read_responses(files[1]).rows[2:])
    ran = run(*files, *judge.options())
    assert ran.code == 0 and "2 rows are in no pair" in ran.out
    assert "ours.json:row 0: no counterpart" in ran.out and "ours.json:row 1" in ran.out
    assert "1 / 0 / 3" in ran.out


# The user's mistakes -------------------------------------------------------------------------


def test_mismatched_files_are_refused_before_anything_is_judged(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    files = made(workplace)
    rows = list(read_responses(files[1]).rows)
    rows[3] = replace(rows[3], constitution="1. Be long.")
    write(files[1], rows)
    ran = run(*files, *judge.options())
    assert ran.code == 2 and not judge.proxy.bodies and "Traceback" not in ran.err
    assert "key 'row 3'" in ran.err and "Be long" in ran.err and "theirs.json" in ran.err


def test_published_rows_under_the_wrong_keys_are_refused(
    run: Callable[..., Ran], judge: Judge, files: tuple[Path, Path]
) -> None:
    """Both have 40 responses: by position they would be paired."""
    rows = read_responses(files[1]).rows
    shifted = [replace(b, key=a.key) for a, b in zip(rows, [*rows[1:], rows[0]], strict=True)]
    write(files[1], shifted)
    ran = run(*files, *judge.options())
    assert ran.code == 2 and not judge.proxy.bodies
    assert "the question is another one" in ran.err


def test_every_mistake_is_said_at_once(run: Callable[..., Ran], workplace: Path) -> None:
    (workplace / "bad.json").write_text('{"response": {}}')
    ran = run(
        "nowhere.json", "bad.json", "--out", "out.xlsx",
        "--set", "judge.kind=pairwise", "--set", "judge.polcy.model=x",
    )  # fmt: skip
    assert ran.code == 2 and "Traceback" not in ran.err
    for named in (
        "nowhere.json: there is no such file",
        "column 'constitution'",
        "out.xlsx",
        "setting 'judge.polcy'",
        "did you mean 'policy'?",
    ):
        assert named in ran.err, named


@pytest.mark.parametrize("kind", ["similarity", "oracle", "auto", None])
def test_a_judge_that_needs_a_gold_is_refused(
    run: Callable[..., Ran], workplace: Path, kind: str | None
) -> None:
    options = ["--set", f"judge.kind={kind}"] if kind else []
    ran = run(*made(workplace), *options)
    assert ran.code == 2 and "gold" in ran.err and "pairwise or absolute or reward" in ran.err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("judge.kind", "key=value"),
        ("benchmarks.ifeval.prompts=x", "one of judge, max_failed, resamples, shard_size"),
        ("resamples=3", "setting 'resamples'"),
        ("judge.show_gold=true", "no gold to show"),
        ("judge.policy.model=./nowhere", "no such directory"),
    ],
)
def test_a_wrong_setting_is_named(
    run: Callable[..., Ran], workplace: Path, override: str, named: str
) -> None:
    options = ["--set", "judge.kind=absolute", "--set", "judge.policy.model=a/b"]
    ran = run(*made(workplace), *options, "--set", override)
    assert ran.code == 2 and named in ran.err and "Traceback" not in ran.err


def test_a_judge_that_fails_too_often_gives_no_rate(
    run: Callable[..., Ran], judge: Judge, workplace: Path
) -> None:
    judge.script.say = lambda messages: "I cannot say."
    ran = run(*made(workplace), *judge.options())
    assert ran.code == 2 and "all 6 judgements failed" in ran.err and "win rate" in ran.err
