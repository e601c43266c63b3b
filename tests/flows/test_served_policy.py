"""A policy behind an endpoint: a whole experiment, what it depends on, and what is refused early.

The server is our own engine behind vLLM's addresses: it loads each iteration's adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import small_loop
from command import staple
from openai_server import BASE, Proxy, app_over, serving

from constitutions.errors import UserError, UserErrors
from flows.experiment import note_settings, record_of
from flows.preflight import ask_server, check
from flows.schema import ExperimentSettings
from flows.settings import load_settings, with_changes
from flows.states import stage_states
from models.endpoint.client import Limits
from models.endpoint.probing import PROBE
from models.engine.local import load_policy
from models.policy import PolicySettings
from tasks.rows import Answer, Mined, Prompt

QUICK = Limits(timeout=20, patience=1, start=1, backoff=0.02, longest_backoff=0.2)


class Served:
    """Our server of the experiment's model, behind a proxy that writes down what is asked."""

    def __init__(self, address: str, proxy: Proxy, engine: Any) -> None:
        self.address, self.proxy, self.engine = address, proxy, engine

    def models(self) -> list[str]:
        """Who was asked, one after the other."""
        asked = [b for b in self.proxy.bodies if b["messages"] != [PROBE]]
        return [name for name, _ in groupby(body["model"] for body in asked)]

    def prompts(self) -> set[str]:
        """The prompts of all conversations."""
        said = [b["messages"] for b in self.proxy.bodies if b["messages"] != [PROBE]]
        return {messages[0]["content"] for messages in said}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    folder = tmp_path_factory.mktemp("served")
    small_loop.make(folder, migrated_database)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    model = folder / "model"
    here = PolicySettings(model=str(model), **small_loop.SETTINGS["policy"])
    app = app_over(
        load_policy(here, model, None), lambda adapter: load_policy(here, model, adapter)
    )
    with serving(app) as upstream:
        proxy = Proxy(upstream, lambda i, body: None)
        with serving(proxy) as address:
            yield Served(address, proxy, app.state.engine)


@pytest.fixture
def wanted(folder: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> ExperimentSettings:
    """The experiment, with its policy behind the endpoint."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STAPLE_HOME", str(folder / ".staple"))
    changes = {
        "iterations": 2,
        "policy.endpoint": served.address,
        "policy.served_model": BASE,
        "shard_size": 2,
    }
    settings = with_changes(load_settings("lineage.yaml"), changes)
    note_settings(settings)
    return settings


def test_the_adapter_of_each_iteration_answers_for_it(
    wanted: ExperimentSettings, served: Served
) -> None:
    served.proxy.bodies.clear()
    small_loop.run(wanted)
    record = record_of(wanted.experiment)
    trained = [record.needs("train", t).path("adapter").resolve() for t in (1, 2)]
    paths = [path for path, _ in served.engine.adapters.values()]
    assert paths == trained
    assert served.models() == [BASE, *served.engine.adapters], "nobody answers out of turn"
    for t in (1, 2):
        assert len(record.needs("mine", t).read("mined", Mined)) == {1: 6, 2: 2}[t]
        assert record.needs("train", t).metrics["train/trained"] > 0
    assert len(record.needs("evaluate", 2).read("answers", Answer)) == 4


def test_where_the_server_is_changes_nothing(
    wanted: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_KEY", "sk-0123456789abc")
    moved = {"policy.endpoint": "http://localhost:1", "policy.key_variable": "POLICY_KEY"}
    assert small_loop.run(with_changes(wanted, moved)) == set(), "and nobody is asked"


def test_who_answers_reaches_the_answers_and_no_training_by_itself(
    wanted: ExperimentSettings,
) -> None:
    states = stage_states(with_changes(wanted, {"policy.served_model": "another"}))
    own = {
        place: s.since
        for place, s in states.items()
        if "the model at the endpoint changed" in s.since
    }
    assert set(own) == {(s, t) for s in ("mine", "cluster", "evaluate") for t in (1, 2)} | {
        ("evaluate", 0)
    }
    trained = states["train", 1]
    assert trained.standing == "stale" and trained.since == ("cluster 1 is stale",)
    in_process = stage_states(with_changes(wanted, {"policy.endpoint": None}))
    assert in_process["mine", 1].standing == "stale"


def test_answers_that_a_server_gives_hold_no_device(wanted: ExperimentSettings) -> None:
    from flows.experiment import open_experiment

    on_gpu = with_changes(wanted, {"policy.device": "cuda"})
    experiment = open_experiment(on_gpu)
    source = experiment.policy(0)
    assert source.noted(experiment.slot(1)).device == "cpu"
    assert source.local.noted(experiment.slot(1)).device == "cuda", "training does"


def test_mining_that_lost_its_server_goes_on_at_the_first_unfinished_shard(
    wanted: ExperimentSettings, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.endpoint.client.Limits", lambda: QUICK)
    colder = with_changes(wanted, {"mine.temperature": 0.9})
    prompts = [
        p.prompt[0]["content"]
        for p in record_of("lineage").needs("prompts", 1).read("prompts", Prompt)
    ]
    gone = False

    def dies_in_the_third_shard(i: int, body: dict[str, Any]) -> Any:
        nonlocal gone
        gone = gone or body["messages"][0]["content"] in prompts[4:]
        return "cut" if gone else None

    served.proxy.bodies.clear()
    served.proxy.plan = dies_in_the_third_shard
    with pytest.raises(UserError, match="does not answer"):
        small_loop.run(colder, only=(1, "mine"))
    assert served.prompts() == set(prompts)

    served.proxy.bodies.clear()
    served.proxy.plan = lambda i, body: None
    assert small_loop.run(colder, only=(1, "mine")) == {("mine", 1)}
    assert served.prompts() == set(prompts[4:]), "finished shards are asked for once"
    mined = record_of("lineage").needs("mine", 1).read("mined", Mined)
    assert [m.prompt[0]["content"] for m in mined] == prompts
    assert all(len(m.candidates) == 3 for m in mined)


def test_what_an_endpoint_cannot_give_is_refused_at_once(
    wanted: ExperimentSettings, served: Served
) -> None:
    served.proxy.bodies.clear()
    beyond = {
        "cluster.features": ["hidden", "effect"],
        "cluster.logprob_tolerance": 2.0,
        "policy.key_variable": "NO_SUCH_KEY",
    }
    with pytest.raises(UserErrors) as told:
        check(with_changes(wanted, beyond))
    said = "\n".join(str(error) for error in told.value.errors)
    assert len(told.value.errors) == 3
    for part in ("NO_SUCH_KEY is not set", "cluster.features", "cluster.logprob_tolerance"):
        assert part in said
    check(with_changes(wanted, {**beyond, "policy.key_variable": None, "method": "star"}))
    assert served.proxy.bodies == [], "nobody was asked"


def test_a_server_without_adapters_is_refused_before_anything_is_computed(
    wanted: ExperimentSettings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(
        PolicySettings(model=str(folder / "model"), **small_loop.SETTINGS["policy"]),
        folder / "model",
        None,
    )
    with serving(app_over(policy)) as address:
        elsewhere = with_changes(wanted, {"policy.endpoint": address})
        assert BASE in check(elsewhere)["model"]
        ask_server(with_changes(elsewhere, {"iterations": 0}))
        with pytest.raises(UserError, match="loads no adapters"):
            ask_server(elsewhere)
        ran = staple(
            capsys, "validate", "lineage.yaml",
            "--set", f"policy.endpoint={address}", "--set", f"policy.served_model={BASE}",
        )  # fmt: skip
    assert ran.code == 2 and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in ran.err
    assert "Traceback" not in ran.err
