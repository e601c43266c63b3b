"""A gated policy from its training to its server: the whole path on the small loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import small_loop
from openai_server import serving

from constitutions.errors import UserError
from flows.commands.serve import open_chat_server
from flows.experiment import note_settings, open_experiment
from flows.settings import with_changes
from models.serving.turns import MODES
from tasks.policies.opening import PolicySource
from tasks.rows import Answer, Labelled, Prompt


def test_a_gate_is_learned_evaluated_and_served(
    lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_loop.copy_finished(lineage, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / ".staple"))
    plain = small_loop.finished()
    assert all(row.keep is None for row in answers(plain))
    with pytest.raises(UserError, match=r"train\.gate"), open_chat_server(plain, mode="gated"):
        pass

    settings = with_changes(plain, {"train.gate": True, "train.first_answer": "distilled"})
    note_settings(settings)
    assert small_loop.run(settings) == {("train", 1), ("evaluate", 1)}
    trained = open_experiment(settings).needs("train", 1)
    assert {"mined", "filtered"} <= {*trained.inputs}
    learned = len(open_experiment(settings).needs("cluster", 1).read("labelled", Labelled))
    assert trained.metrics["train/lessons"] >= 3 * learned > 0, "each also as two first answers"
    rows = answers(settings)
    assert all(row.keep is not None and 0 <= row.keep <= 1 for row in rows)

    prompt = open_experiment(settings).needs("prompts", 0).read("prompts", Prompt)[0]
    with open_chat_server(settings) as service, serving(service.app) as address:
        assert service.modes == MODES and service.defaults.mode == "gated"
        evaluated = open_experiment(settings).needs("evaluate", 1).metrics
        assert service.defaults.threshold == evaluated.get("gate/threshold", 1.0)
        for threshold, content in ((0.0, rows[0].initial), (1.0, rows[0].refined)):
            body: dict[str, Any] = {
                "model": "lineage", "messages": list(prompt.prompt), "threshold": threshold,
            }  # fmt: skip
            reply = httpx.post(f"{address}/v1/chat/completions", json=body).json()
            assert reply["choices"][0]["message"]["content"] == content
            spent = rows[0].tokens if threshold else rows[0].initial_tokens
            assert reply["usage"]["completion_tokens"] == spent

    endpoint = with_changes(settings, {"policy.endpoint": "http://127.0.0.1:1/v1"})
    monkeypatch.setattr(PolicySource, "load", lambda _: None)  # no server is needed to refuse
    with pytest.raises(UserError, match="endpoint"), open_chat_server(endpoint, mode="gated"):
        pass


def answers(settings: Any) -> list[Answer]:
    return open_experiment(settings).needs("evaluate", 1).read("answers", Answer)
