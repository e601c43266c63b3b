"""Forms: every field may stay empty, says its default, and only what was filled in is a change."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ValidationError

from flows import deployments
from flows.forms import UNSET, changes, form_of
from flows.schema import ExperimentSettings
from flows.settings import load_settings, with_changes
from tasks.cluster import ClusterSettings
from tasks.stages import STAGES


def fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Every property of a JSON schema, by definition and name."""
    found = dict(schema.get("definitions", {}))
    return {
        f"{name}.{field}": facts
        for name, definition in found.items()
        for field, facts in definition["properties"].items()
    }


def test_only_what_was_filled_in_is_a_change() -> None:
    form = form_of(ExperimentSettings)
    assert changes(form()) == {}
    filled = form.model_validate(
        {
            "mine": {"critique": "no", "samples": None, "temperature": ""},
            "cluster": {"distance_threshold": 0.6, "features": []},
            "train": {"loss_on": ["refined"]},
            "prompts": {"sources": [{"path": "rows.jsonl", "rows": 3}]},
        }
    )
    found = changes(filled)
    assert found == {
        "prompts.sources": [{"path": "rows.jsonl", "rows": 3}],
        "mine.critique": False,
        "cluster.distance_threshold": 0.6,
        "train.loss_on": ["refined"],
    }
    settings = with_changes(load_settings("planted"), found)
    assert settings.cluster.distance_threshold == 0.6 and settings.mine.samples == 5


def test_what_is_optional_is_there_once_something_in_it_is_filled_in() -> None:
    judge = {"kind": "pairwise", "policy": {"model": "judge"}}
    filled = form_of(ExperimentSettings).model_validate(
        {"evaluate": {"judge": judge, "also": [judge], "benchmarks": {"ifeval": {"prompts": "f"}}}}
    )
    found = changes(filled)
    assert found == {
        "evaluate.judge.kind": "pairwise",
        "evaluate.judge.policy.model": "judge",
        "evaluate.also": [judge],
        "evaluate.benchmarks.ifeval.prompts": "f",
    }
    settings = with_changes(load_settings("planted"), found).evaluate
    assert settings.judge == settings.also[0]
    assert settings.benchmarks.ifeval and settings.benchmarks.ifeval.prompts == "f"
    assert settings.benchmarks.mt_bench is None


def test_a_judge_without_a_model_is_given_by_one_word() -> None:
    for override in ("evaluate.judge=oracle", "evaluate.judge.kind=oracle"):
        assert load_settings("planted", [override]).evaluate.judge.kind == "oracle"
    also = load_settings("planted", ["evaluate.also=[similarity, {kind: oracle}]"]).evaluate.also
    assert [judge.kind for judge in also] == ["similarity", "oracle"]


@pytest.mark.parametrize(("typed", "value"), [("0.6", 0.6), ("predictive", "predictive")])
def test_a_number_or_a_word_is_typed_into_one_field(typed: str, value: float | str) -> None:
    form = form_of(ClusterSettings)
    facts = form.model_json_schema()["properties"]["distance_threshold"]
    assert facts["type"] == "string" and re.search(facts["pattern"], typed)
    found = changes(form.model_validate({"distance_threshold": typed}), "cluster")
    assert found == {"cluster.distance_threshold": value}
    assert with_changes(load_settings("planted"), found).cluster.distance_threshold == value
    for bad in ("best", "", "1,5"):
        assert not re.search(facts["pattern"], bad)
    for bad in ("best", "3", "-1"):
        with pytest.raises(ValidationError, match="distance_threshold"):
            form.model_validate({"distance_threshold": bad})


def test_what_may_have_no_value_is_emptied_by_its_name() -> None:
    form = form_of(ExperimentSettings)
    names = form.model_json_schema()["$defs"]["ClusterForm"]["properties"]["unset"]["items"]["enum"]
    assert names == ["max_principles", "constitution_size", "logprob_tolerance"]
    emptied = {"cluster": {"unset": ["constitution_size"]}, "score": {"unset": ["judge"]}}
    found = changes(form.model_validate(emptied))
    assert found == {"cluster.constitution_size": None, "score.judge": None}
    preset = load_settings("llama-3.1-8b")
    assert preset.cluster.constitution_size == 120
    assert with_changes(preset, found).cluster.constitution_size is None
    both = {"cluster": {"unset": ["constitution_size"], "constitution_size": 7}}
    assert changes(form.model_validate(both)) == {"cluster.constitution_size": 7}
    assert changes(form.model_validate({"cluster": {"unset": []}})) == {}
    with pytest.raises(ValidationError, match="unset"):
        form.model_validate({"cluster": {"unset": ["features"]}})


def test_a_stages_form_names_its_settings_in_full() -> None:
    form = form_of(ClusterSettings).model_validate({"picture": "svd"})
    assert changes(form, "cluster") == {"cluster.picture": "svd"}
    assert form.model_dump(mode="json") == {"picture": "svd"}


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"cluster": {"bogus": 1}}, "cluster.bogus"),
        ({"cluster": {"max_principles": 0}}, "cluster.max_principles"),
        ({"cluster": {"representative": "best"}}, "cluster.representative"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_what_the_settings_refuse_the_form_refuses(given: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as refused:
        form_of(ExperimentSettings).model_validate(given)
    (error,) = refused.value.errors()
    assert ".".join(map(str, error["loc"])) == place


@pytest.mark.parametrize("name", ["experiment", "cluster", "filter"])
def test_the_ui_is_told_of_every_field_and_of_no_default(name: str) -> None:
    schema = parameter_schema(getattr(deployments, name)).model_dump_for_openapi()
    assert schema["properties"]["settings"]["default"] == {}
    assert all(facts.get("description") for facts in schema["properties"].values())
    for place, facts in fields(schema).items():
        assert "default" not in facts, place
        assert "anyOf" not in facts, f"{place}: the UI would send one of its types"
        assert facts["description"], place
        assert facts["title"] == place.split(".")[1]
    assert all(d["additionalProperties"] is False for d in schema["definitions"].values())


def test_prefect_deploys_every_stage_that_a_person_can_run_by_itself() -> None:
    text = deployments.PREFECT_FILE.read_text("utf-8")
    assert text == deployments.prefect_yaml(text), "run: python -m flows.deployments"
    entries = {entry["name"]: entry for entry in yaml.safe_load(text)["deployments"]}
    assert set(entries) == {"experiment", *STAGES} - {"review"}
    assert {entries[name]["work_pool"]["name"] for name in ("mine", "train")} == {"gpu"}
    for entry in entries.values():
        assert load_flow_from_entrypoint(entry["entrypoint"]).name == entry["name"]


def test_choices_are_drop_downs_and_defaults_are_said() -> None:
    schema = form_of(ExperimentSettings).model_json_schema()["$defs"]
    critique = schema["MineForm"]["properties"]["critique"]
    assert critique["enum"] == ["yes", "no"] and "Default: yes." in critique["description"]
    features = schema["ClusterForm"]["properties"]["features"]
    assert features["items"]["enum"] == ["effect", "characters", "sentences", "hidden"]
    assert "Default: effect, characters." in features["description"]
    assert schema["TrainForm"]["properties"]["lora_rank"]["minimum"] == 1


def test_every_setting_has_its_field() -> None:
    def names(model: type[BaseModel], prefix: str = "") -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if get_origin(kind) is dict:
                continue  # Prefect's page sends something for a mapping that was left empty
            if type(None) in get_args(kind):  # X | None
                kind = get_args(kind)[0]
            inner = isinstance(kind, type) and issubclass(kind, BaseModel)
            found |= names(kind, f"{prefix}{name}.") if inner else {prefix + name}
        return {name for name in found if name.rpartition(".")[2] != UNSET}

    assert names(form_of(ExperimentSettings)) == names(ExperimentSettings)
    assert "then" not in form_of(ExperimentSettings).model_fields
