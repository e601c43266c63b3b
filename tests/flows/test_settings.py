"""Settings: presets, files that extend them, overrides, and what comes back from the record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from constitutions.errors import UserError, UserErrors
from flows.settings import (
    completions,
    dump_settings,
    load_settings,
    presets,
    with_changes,
    without_gone,
)


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_name_the_command_that_runs_them(name: str) -> None:
    text = (Path("flows/presets") / f"{name}.yaml").read_text()
    assert text.startswith(f"# staple run {name}")
    assert load_settings(name).experiment == name


def test_the_shell_completes_settings_and_their_words() -> None:
    known = {"seed=", "mine.samples=", "cluster.carried=", "evaluate.judge.policy.model="}
    assert known <= {*completions("")} and "evaluate.judge=" not in completions("")
    assert completions("train.update=") == ["train.update=lora", "train.update=full"]
    assert "evaluate.judge.kind=oracle" in completions("evaluate.judge.kind=o")
    assert completions("review.enabled=") == ["review.enabled=true", "review.enabled=false"]
    assert completions("mine.samples=") == completions("nonsense=") == []
    code = "import sys; sys.argv = ['staple']; from flows.commands.cli import main; main()"
    asked = {"_STAPLE_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "COMP_WORDS": "staple run --set mine.max_p"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.stdout.split() == ["mine.max_principle_tokens="]


def test_the_paper_scale() -> None:
    for name in ("llama-3.1-8b", "granite-3.1-8b", "qwen2.5-7b"):
        settings = load_settings(name)
        assert (settings.prompts.first, settings.prompts.later, settings.last) == (
            50_000,
            10_000,
            4,
        )
        assert [s.rows for s in settings.prompts.sources] == [25_000] * 4  # type: ignore[union-attr]
    scale = [n for n in presets() if load_settings(n).method == "staple" and "sami" not in n]
    assert len({load_settings(n).policy.model for n in scale}) == len(scale) == 5


def test_a_file_extends_a_preset_and_overrides_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: planted\nmine: {samples: 3}\n")
    settings = load_settings(str(file), ["mine.temperature=0.5", "prompts.first=9"])
    assert (settings.mine.samples, settings.mine.temperature) == (3, 0.5)
    assert settings.prompts.first == 9
    assert settings.mine.critique == load_settings("planted").mine.critique


def test_what_is_written_down_reads_back(tmp_path: Path) -> None:
    settings = load_settings("llama-3.1-8b", ["cluster.features=[effect]"])
    file = tmp_path / "settings.yaml"
    file.write_text(dump_settings(settings))
    assert load_settings(str(file)) == settings


def test_all_mistakes_at_once_each_with_its_place() -> None:
    overrides = ["mine.samples=none", "traim.epochs=2", "score.stem", "cluster.features=[a]"]
    with pytest.raises(UserErrors) as caught:
        load_settings("planted", overrides)
    text = str(caught.value)
    for part in ("mine.samples", "did you mean 'train'", "score.stem", "cluster.features"):
        assert part in text
    assert len(caught.value.errors) == 4


def test_settings_of_different_parts_that_contradict_each_other() -> None:
    with pytest.raises(UserErrors, match=r"cannot be trained in nf4.*quantization: none"):
        load_settings("planted", ["train.update=full"])
    settings = load_settings("planted", ["train.update=full", "policy.quantization=none"])
    with pytest.raises(UserErrors, match="cannot be trained in nf4"):
        with_changes(settings, {"policy.quantization": "nf4"})


@pytest.mark.parametrize("content", ["a: [", "- a list", "\xff"], ids=["syntax", "list", "bytes"])
def test_a_file_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_settings(str(file))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("my-key: 1", "setting 'my-key'"),
        ("'': 1", "setting ''"),
        ("train: {learning-rate: 1}", "did you mean 'learning_rate'"),
        ("policy: {pool: {gpu-s: 1}}", "setting 'policy.pool.gpu-s'"),
    ],
)
def test_an_unknown_name_is_shown_as_it_was_written(text: str, named: str) -> None:
    with pytest.raises(UserErrors) as caught:
        load_settings("mine.yaml", text=f"extends: planted\n{text}")
    assert named in str(caught.value) and "unknown setting" in str(caught.value)


def test_a_setting_of_an_optional_part_can_be_set_and_misspelt() -> None:
    judge = ["score.similarity=judge", "score.judge.kind=absolute", "score.judge.policy.model=m"]
    settings = load_settings("planted", judge)
    assert settings.score.judge is not None and settings.score.judge.policy is not None
    with pytest.raises(UserErrors, match="did you mean 'retries'"):
        load_settings("planted", [*judge, "score.judge.retry=1"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 2**40, "at most 4,294,967,295"),
        ("prompts.first", 10**12, "less than or equal to 100000000"),
        ("mine.temperature", float("inf"), "finite"),
        ("policy.model", "a\0b", "control characters"),
        ("policy.model", "a\x1b[31mb", "control characters"),
        ("policy.model", "a\ud800", "half characters"),
        ("policy.model", "x" * 100_001, "at most 100,000 characters"),
        ("policy.endpoint", "http://127.0.0.1:99999", "Port out of range"),
        ("policy.endpoint", "http://127.0.0.1:0", "Port out of range"),
        ("then", {"prompts": {"held_out": "many"}}, "prompts.held_out"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_form_gives_values_that_no_setting_may_have(name: str, value: object, said: str) -> None:
    """Forms of Prefect give JSON, which no parser of ours has read."""
    with pytest.raises(UserErrors) as caught:
        with_changes(load_settings("planted"), {name: value})
    assert name.split(".")[0] in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_extends_itself_is_named(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"extends: {other}\n")
    other.write_text(f"extends: {one}\n")
    with pytest.raises(UserError, match=r"extends itself: .*one\.yaml → .*other\.yaml → .*one"):
        load_settings(str(one))


GONE_SETTINGS = """
mine: {samples: 3, shard_size: 3}
filter: {leak_words: 4}
prompts: {sources: [{path: a.jsonl, max_characters: 5}]}
then: {sample: {shard_size: 3}, prompts: {held_out: 3}}
"""


def test_a_setting_that_is_gone_is_named_with_what_to_do() -> None:
    with pytest.raises(UserErrors) as told:
        load_settings("mine.yaml", ["evaluate.shard_size=3"], text=GONE_SETTINGS)
    said = str(told.value)
    assert said.count("this is no longer a setting") == 4
    assert "setting 'mine.shard_size'" in said and "all stages: shard_size" in said
    assert "'prompts.sources.0.max_characters'" in said and "'filter.leak_words'" in said


def test_a_record_of_an_earlier_version_may_have_settings_that_are_gone() -> None:
    found = load_settings("experiment old", text=GONE_SETTINGS, recorded=True)
    assert found.mine.samples == 3 and found.then == {"sample": {}, "prompts": {"held_out": 3}}
    kept = without_gone({"leak_words": 4, "max_principle_words": 40}, "filter", as_fixed=True)
    assert kept == {"leak_words": 4}, "another value than is fixed now is a difference"
    with pytest.raises(UserErrors, match=r"mine\.shard_size.*no longer a setting"):
        load_settings("experiment old", ["mine.shard_size=3"], text=GONE_SETTINGS, recorded=True)
