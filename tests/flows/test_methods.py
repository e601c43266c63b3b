"""Methods and stages: what is declared is what runs, and nothing else asks for a method's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from command import staple

from flows.experiment import open_experiment
from flows.methods import METHODS
from flows.schema import ExperimentSettings, MethodName
from flows.states import stage_states
from tasks.record.tables import StoredRows
from tasks.stages import STAGES

ROOT = Path(__file__).parents[2]


def test_every_method_that_settings_can_name_is_registered() -> None:
    assert tuple(METHODS) == get_args(MethodName)


def test_no_other_module_compares_a_methods_name() -> None:
    compared = re.compile(r"\bmethod *(==|!=|not in\b)|\.method in\b")
    modules = [
        p for package in ("flows", "tasks", "models") for p in (ROOT / package).rglob("*.py")
    ]
    assert not [p for p in modules if compared.search(p.read_text("utf-8"))]


@pytest.mark.parametrize("name", ["at_home", "taught"])
def test_a_stage_reads_and_writes_what_it_declares(
    name: str, request: pytest.FixtureRequest
) -> None:
    settings: ExperimentSettings = request.getfixturevalue(name)
    states = stage_states(settings)
    method = METHODS[settings.method]
    for t in range(settings.last + 1):
        ran = tuple(stage for stage, at in states if at == t)
        assert ran == tuple(s for s in method.stages(t) if s not in ("review", "teach"))
    record = open_experiment(settings).record
    for stage, t in states:
        attempt, declared = record.needs(stage, t), STAGES[stage]
        assert {source.stage for source in attempt.inputs.values()} <= {*declared.reads}
        folder = attempt.path("")
        tables = {path.stem for path in folder.glob("*.parquet")}
        assert tables <= {*declared.writes}
        if stage != "evaluate":  # its tables depend on the method and the iteration
            assert tables == {*declared.writes}
        for table in tables:
            list(StoredRows.at(folder / f"{table}.parquet", declared.writes[table]))
        assert all((folder / published).exists() for published in declared.publishes)


def test_the_help_of_stage_lists_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    ran = staple(capsys, "stage", "--help")
    shown = " ".join(ran.out.split())
    assert all(f"- {name}: {stage.about}" in shown for name, stage in STAGES.items())
