"""What a stage notes of its judge: the model's files, the wording, the device."""

from __future__ import annotations

import os
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import pytest
from chat_model import build_chat_model

from constitutions.errors import UserError
from models.judges import llm as llm_judge
from models.judges.registry import JudgeSettings
from models.policy import PolicySettings
from tasks.evaluate import EvaluateSettings, noted_judges
from tasks.judging.judge import check_judge, judge_notes, noted
from tasks.record.code import code_versions
from tasks.record.record import Record
from tasks.record.slot import Slot
from tasks.score import ScoreSettings

ENGINE = PolicySettings(model="owner/judge", revision="abc", device="cuda")
HUB = JudgeSettings(kind="absolute", policy=ENGINE)
ABOUT_PRINCIPLES = HUB.about_principles()
REMOTE = JudgeSettings(  # type: ignore[call-arg]
    kind="pairwise", policy=ENGINE, endpoint="http://localhost:8000/v1"
)


def at(model: Path | str, device: str = "cpu") -> JudgeSettings:
    policy = PolicySettings.model_validate({"model": str(model), "device": device})
    return JudgeSettings(kind="absolute", policy=policy)


def test_a_judge_without_a_model_has_no_notes(tmp_path: Path) -> None:
    for judge in (JudgeSettings(), JudgeSettings(kind="oracle")):
        assert judge_notes(judge, tmp_path) == {}


def test_a_model_elsewhere_is_known_by_its_name(tmp_path: Path) -> None:
    notes = judge_notes(HUB, tmp_path)
    assert notes.pop("rubric") != judge_notes(ABOUT_PRINCIPLES, tmp_path)["rubric"]
    assert notes == {"judge": "owner/judge@abc", "judge_wording": llm_judge.WORDING}
    assert judge_notes(REMOTE, tmp_path)["judge"] == "owner/judge"


def test_a_directory_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    model, home = build_chat_model(tmp_path / "model", "llama"), tmp_path / "home"
    before = judge_notes(at(model), home)
    assert before == judge_notes(at(model), tmp_path / "another"), "in any home"
    os.utime(model / "model.safetensors", (1, 1))
    assert judge_notes(at(model), home) == before
    build_chat_model(model, "llama", seed=1)
    assert judge_notes(at(model), home)["judge"] != before["judge"]
    reward = at(model).model_copy(update={"kind": "reward"})
    assert judge_notes(reward, home) == {"judge": judge_notes(at(model), home)["judge"]}


def test_only_the_chosen_kind_s_code_counts(tmp_path: Path) -> None:
    slot = Slot(Record("an-experiment", tmp_path), 1, seed=0)

    def counted(**chosen: Any) -> KeysView[str]:
        settings = EvaluateSettings.model_validate(chosen)
        uses = noted_judges(slot, settings, ScoreSettings()).uses
        return code_versions("tasks.evaluate", *uses).keys()

    plain, judged = counted(judge="oracle"), counted(judge=HUB)
    assert "models.judges.oracle" in plain and "models.judges.llm" not in plain
    assert {"models.judges.absolute", "models.judges.llm"} <= judged
    assert "models.judges.pairwise" not in judged and "tasks.benchmarks.ifeval.run" not in judged
    checked = counted(judge="oracle", benchmarks={"ifeval": {"prompts": "p"}})
    assert checked - plain >= {"tasks.benchmarks.ifeval.run", "tasks.benchmarks.ifeval.data"}


def test_a_judge_in_this_process_holds_its_device(tmp_path: Path) -> None:
    slot = Slot(Record("an-experiment", tmp_path), 1, seed=0, notes={"base": "b"})
    assert noted(slot, None) is slot
    assert noted(slot, HUB).device == "cuda"
    assert noted(slot, HUB).notes == {"base": "b", **judge_notes(HUB, tmp_path)}
    assert noted(slot, REMOTE).device == "cpu"
    held = Slot(Record("an-experiment", tmp_path), 1, seed=0, device="cuda")
    assert noted(held, REMOTE).device == "cuda", "the policy's stays held"


def test_a_model_that_is_not_there_is_reported_as_the_judge_s(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge: .*there is no such directory"):
        check_judge(at(tmp_path / "nowhere"), opens=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"judge: .*lacks safetensors weights"):
        judge_notes(at(tmp_path / "empty"), tmp_path)
    assert check_judge(REMOTE) == "owner/judge at http://localhost:8000/v1"


def test_a_missing_key_is_an_error_before_the_judge_is_asked() -> None:
    locked = JudgeSettings(  # type: ignore[call-arg]
        kind="pairwise", policy=ENGINE, endpoint="http://localhost:1", key_variable="NO_SUCH_KEY"
    )
    with pytest.raises(UserError, match=r"judge: .*NO_SUCH_KEY is not set"):
        check_judge(locked)
