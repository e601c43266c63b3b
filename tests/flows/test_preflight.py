"""What evaluation needs is checked before any compute is spent, and all of it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from constitutions.errors import UserErrors
from flows.preflight import check
from flows.settings import load_settings

EXAMPLE = {
    "key": 1,
    "prompt": "No commas please.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}


def test_benchmarks_and_judges_are_named(workplace: Path) -> None:
    Path("ifeval.jsonl").write_text(json.dumps(EXAMPLE))
    found = check(load_settings("planted", ["evaluate.benchmarks.ifeval.prompts=ifeval.jsonl"]))
    assert found["evaluate"] == "judge oracle; also ifeval"


def test_a_missing_file_and_a_missing_judge_are_told_together(workplace: Path) -> None:
    judge = "{kind: pairwise, policy: {model: ./nowhere}}"
    grades = "{kind: absolute, policy: {model: ./elsewhere}}"
    settings = load_settings(
        "planted",
        [
            "evaluate.benchmarks.ifeval.prompts=absent.jsonl",
            f"evaluate.principle_judge={judge}",
            "score.similarity=judge",
            f"score.judge={grades}",
        ],
    )
    with pytest.raises(UserErrors) as told:
        check(settings)
    said = [str(error) for error in told.value.errors]
    assert len(said) == 3
    assert "elsewhere" in said[0] and "there is no such directory" in said[0]
    assert "nowhere" in said[1] and "there is no such directory" in said[1]
    assert said[2].startswith("absent.jsonl: there is no such file")


def test_the_oracle_elsewhere_and_a_similarity_that_is_no_judge_are_refused(
    workplace: Path,
) -> None:
    rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = [
        "prompts.sources=[{path: rows.jsonl}]",
        "prompts.first=2",
        "prompts.later=1",
        "prompts.held_out=2",
    ]
    with pytest.raises(UserErrors, match="the oracle knows only the prompts of an embedded world"):
        check(load_settings("planted", [*real, "evaluate.judge=oracle"]))
    grades = "{kind: absolute, policy: {model: m}, endpoint: 'http://localhost:1/v1'}"
    scoring = ["score.similarity=judge", f"score.judge={grades}"]
    with pytest.raises(UserErrors, match=r"evaluate\.judge"):
        check(load_settings("planted", [*real, *scoring]))
    check(load_settings("planted", [*real, *scoring, f"evaluate.judge={grades}"]))


def test_every_model_is_opened_for_what_it_is_used_for(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, str]] = []

    def look(directory: Path, settings: object, use: str) -> str:
        opened.append((directory.name, use))
        return "opened"

    monkeypatch.setattr("tasks.policies.base.check_directory", look)
    monkeypatch.setattr("tasks.policies.base.check_listing", lambda directory: None)
    for name in ("base", "judge", "reward"):
        Path(name).mkdir()
    rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}."} for i in range(9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        "policy.model=base",
        "prompts={sources: [{path: rows.jsonl}], first: 2, later: 1, held_out: 2}",
        "evaluate.judge={kind: reward, policy: {model: reward}}",
        "evaluate.principle_judge={kind: pairwise, policy: {model: judge}}",
    ]
    found = check(load_settings("planted", asked))
    assert found["model"] == "directory base: opened"
    assert opened == [("base", "trained"), ("reward", "reward"), ("judge", "sampled")]
    opened.clear()
    check(load_settings("planted"))
    assert not opened, "the planted models are our own"


def test_packages_that_a_benchmark_measures_with_are_missed_before_anything_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    }
    Path("ifeval.jsonl").write_text(json.dumps(EXAMPLE | asked))
    monkeypatch.setattr("tasks.benchmarks.base.find_spec", lambda name: None)
    with pytest.raises(
        UserErrors, match=r"langdetect, not installed; .*pip install -e '\.\[benchmarks\]'"
    ):
        check(load_settings("planted", ["evaluate.benchmarks.ifeval.prompts=ifeval.jsonl"]))
    Path("ifeval.jsonl").write_text(json.dumps(EXAMPLE))
    check(load_settings("planted", ["evaluate.benchmarks.ifeval.prompts=ifeval.jsonl"]))


def test_an_embedding_model_is_opened(workplace: Path) -> None:
    Path("embedder").mkdir()
    Path("embedder/config.json").write_text("[]")
    asked = ["cluster.features=[sentences]", "cluster.embedding_model=./embedder"]
    with pytest.raises(UserErrors, match=r"embedder/config\.json: holds a list"):
        check(load_settings("planted", asked))


def test_ray_is_named_or_missed_before_anything_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = "{kind: pairwise, policy: {model: m, pool: {kind: ray, address: auto, workers: 2}}}"
    asked = ["policy.pool=ray", f"evaluate.principle_judge={judge}"]
    found = check(load_settings("planted", asked))
    assert found["pool"] == "a worker for each GPU of Ray, on this machine; 2 workers of Ray, auto"
    assert "pool" not in check(load_settings("planted"))
    monkeypatch.setattr("models.pools.opening.find_spec", lambda name: None)
    with pytest.raises(UserErrors, match=r"pip install -e '.\[ray\]'"):
        check(load_settings("planted", asked))
