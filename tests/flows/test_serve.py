"""`staple serve`: OpenAI's own client, this project's client and a shell's signals against it.

The answers are those that evaluation recorded; what is asked at the same time is answered together.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_loop
from command import staple
from openai_server import BASE, app_over, serving
from pydantic import SecretStr
from servers import free_port

from constitutions.errors import UserError
from flows.commands.serve import open_chat_server, place
from flows.experiment import open_experiment
from flows.schema import ExperimentSettings
from flows.settings import with_changes
from models.endpoint.server import open_server
from models.engine.local import load_policy
from models.policy import Message, PolicySettings, Request
from models.serving.protocol import parse_body
from tasks.policies.answers import Generation
from tasks.rows import Answer, Prompt

openai = pytest.importorskip("openai", reason="the official client comes with the extra 'dev'")
ROOT = Path(__file__).parent.parent.parent
KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[tuple[str, ExperimentSettings]]:
    """The address of a server of "lineage", and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("STAPLE_HOME", str(made / ".staple"))
        settings = small_loop.finished()
        with open_chat_server(settings) as service, serving(service.app) as address:
            yield address, settings


@pytest.fixture
def client(served: tuple[str, ExperimentSettings]) -> Any:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def recorded(
    served: tuple[str, ExperimentSettings], made: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Prompt, Answer]]:
    """The held-out prompts, and what evaluation recorded of them."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("STAPLE_HOME", str(made / ".staple"))
    experiment = open_experiment(served[1])
    prompts = experiment.needs("prompts", 0).read("prompts", Prompt)
    answers = experiment.needs("evaluate", 1).read("answers", Answer)
    assert [p.prompt_id for p in prompts] == [a.prompt_id for a in answers] and len(prompts) == 4
    return list(zip(prompts, answers, strict=True))


def body(text: str = "What is 3?", **more: Any) -> dict[str, Any]:
    return {"model": "lineage", "messages": [{"role": "user", "content": text}], **more}


# Answers ---------------------------------------------------------------------------------------


def test_answers_are_those_that_evaluation_recorded(
    client: Any, recorded: list[tuple[Prompt, Answer]]
) -> None:
    for prompt, answer in recorded:
        reply = client.chat.completions.create(model="lineage", messages=list(prompt.prompt))
        (choice,) = reply.choices
        assert choice.message.content == answer.refined
        assert choice.message.staple == {
            "mode": "refine",
            "first_answer": answer.initial,
            "principle": answer.principle,
        }
        assert reply.usage.completion_tokens == answer.tokens, "of all turns"
        first = client.chat.completions.create(
            model="lineage", messages=list(prompt.prompt), extra_body={"mode": "first"}
        )
        assert first.choices[0].message.content == answer.initial
        assert first.choices[0].message.staple == {"mode": "first"}
        assert first.usage.prompt_tokens * 3 < reply.usage.prompt_tokens
    assert len({answer.refined for _, answer in recorded}) > 1


def test_a_seed_gives_what_evaluation_gives_with_it(
    client: Any, served: tuple[str, ExperimentSettings], recorded: list[tuple[Prompt, Answer]]
) -> None:
    source, settings = open_experiment(served[1]).policy(1), served[1]
    generation = Generation(
        templates=source.templates, settings=settings.evaluate, seed=5, iteration=1
    )
    prompts = [prompt for prompt, _ in recorded]
    wanted = generation.ask(source.load(), prompts, temperature=1.0)
    for prompt, answer in zip(prompts, wanted, strict=True):
        reply = client.chat.completions.create(
            model="lineage", messages=list(prompt.prompt), temperature=1.0, seed=5
        )
        message = reply.choices[0].message
        told = (message.staple["first_answer"], message.staple["principle"], message.content)
        assert told == (answer.initial, answer.principle, answer.refined)
    assert len({answer.refined for answer in wanted}) == len(prompts)


def test_a_stream_tells_the_same_turn_by_turn(
    client: Any, recorded: list[tuple[Prompt, Answer]]
) -> None:
    prompt, answer = recorded[0]
    stream = client.chat.completions.create(
        model="lineage",
        messages=list(prompt.prompt),
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == answer.refined
    told = [delta.staple for delta in deltas if hasattr(delta, "staple")]
    assert told == [{"first_answer": answer.initial}, {"principle": answer.principle}]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage.completion_tokens == answer.tokens


def test_another_server_may_answer_for_the_model(
    served: tuple[str, ExperimentSettings], recorded: list[tuple[Prompt, Answer]]
) -> None:
    model, here = served[1].policy.model, served[1].policy
    behind = app_over(
        load_policy(here, model, None), lambda adapter: load_policy(here, model, adapter)
    )
    with serving(behind) as endpoint:
        changes = {"policy.endpoint": endpoint, "policy.served_model": BASE}
        settings = with_changes(served[1], changes)
        with open_chat_server(settings) as service, serving(service.app) as url:
            for prompt, answer in recorded:
                given = {"model": "lineage", "messages": list(prompt.prompt)}
                reply = httpx.post(f"{url}/v1/chat/completions", json=given, timeout=600).json()
                assert reply["choices"][0]["message"]["content"] == answer.refined


def test_choices_differ_and_seeds_repeat_them(client: Any) -> None:
    def texts(**how: Any) -> list[str]:
        given = body(n=3, temperature=1.5, max_tokens=16, extra_body={"mode": "first"}, **how)
        reply = client.chat.completions.create(**given)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.message.content for choice in reply.choices]

    first = texts(seed=7)
    assert len(set(first)) == 3 and texts(seed=7) == first != texts(seed=8)
    assert texts() != texts(), "without a seed nothing repeats"
    streamed = ["", "", ""]
    given = body(n=3, temperature=1.5, max_tokens=16, seed=7, stream=True)
    for chunk in client.chat.completions.create(**given, extra_body={"mode": "first"}):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == first


def test_stop_and_max_tokens_end_the_answer(client: Any) -> None:
    def ask(**how: Any) -> Any:
        given = body(temperature=1.0, seed=3, **how)
        return client.chat.completions.create(**given, extra_body={"mode": "first"})

    whole = ask(max_tokens=24)
    short = ask(max_tokens=5)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 5
    assert (
        ask(max_completion_tokens=5).choices[0].message.content == short.choices[0].message.content
    )
    text = whole.choices[0].message.content
    mark = text[len(text) // 2]
    cut = ask(max_tokens=24, stop=[mark, "never"])
    assert cut.choices[0].message.content == text[: text.index(mark)].strip()
    assert cut.choices[0].finish_reason == "stop"


def test_this_projects_client_reads_it(served: tuple[str, ExperimentSettings]) -> None:
    settings = PolicySettings(model="unused", endpoint=served[0], served_model="lineage")
    policy = open_server(settings)
    assert policy.support.n and policy.support.seed and policy.support.varies
    asked = Request(messages=(Message(role="user", content="What is 3?"),), key="a", n=2)
    (found,) = policy.generate([asked])
    assert len({completion.text for completion in found}) == 2
    assert all(completion.tokens > 0 for completion in found)
    (again,) = policy.generate([asked])
    assert [completion.text for completion in again] == [completion.text for completion in found]


# Who and what is refused -------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "other"}, 404, "model", "expected 'lineage'"),
    ({"mode": "gated"}, 400, "mode", "'first' or 'refine'"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 65}, 400, "n", "less than or equal to 64"),
    ({"n": "2"}, 400, "n", "a valid integer"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ({"messages": []}, 400, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'assistant'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "is the user's"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing"),
    ({"logprobs": True}, 400, "logprobs", "not served"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not served"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not served"),
    ({"max_token": 3}, 400, "max_token", "not known"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "'text'"),
]


@pytest.mark.parametrize(("change", "status", "param", "said"), WRONG, ids=lambda v: str(v)[:40])
def test_a_bad_request_is_told_which_field_and_what_is_expected(
    served: tuple[str, ExperimentSettings],
    change: dict[str, Any],
    status: int,
    param: str,
    said: str,
) -> None:
    reply = httpx.post(f"{served[0]}/v1/chat/completions", json=body() | change)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert said in error["message"] and error["type"] == "invalid_request_error"


def test_bodies_that_are_none(served: tuple[str, ExperimentSettings]) -> None:
    nan = json.dumps(body(temperature=float("nan"))).encode()
    url, json_type = f"{served[0]}/v1/chat/completions", {"Content-Type": "application/json"}
    for raw, said in ((b"{", "not valid JSON"), (b"[]", "the body"), (nan, "a finite number")):
        reply = httpx.post(url, content=raw, headers=json_type)
        assert reply.status_code == 400 and said in reply.json()["error"]["message"]
    assert httpx.post(url, content=json.dumps(body())).status_code == 415, "a form of a web page"
    long = httpx.post(url, json=body("x" * 2**22))
    assert long.status_code == 413 and "at most 4,194,304 bytes" in long.text
    nowhere = httpx.get(f"{served[0]}/v1/nowhere")
    assert nowhere.status_code == 404 and "/v1/models" in nowhere.json()["error"]["message"]
    assert httpx.get(url).status_code == 405


def test_a_prompt_that_is_too_long_is_told_so(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as told:
            client.chat.completions.create(**body("why? " * 5000), stream=stream)
        assert told.value.code == "context_length_exceeded"
        assert "first answer" in told.value.message and "shorter" in told.value.message


def test_without_the_key_nobody_is_answered(
    served: tuple[str, ExperimentSettings], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("STAPLE_HOME", str(made / ".staple"))
    with (
        open_chat_server(served[1], 0, "first", SecretStr(KEY)) as service,
        serving(service.app) as url,
    ):
        with pytest.raises(openai.AuthenticationError, match="key is wrong or missing"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").chat.completions.create(**body())
        for path in ("/metrics", "/v1/models"):
            assert httpx.get(url + path).status_code == 401
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        known = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
        assert [model.id for model in known.models.list()] == ["lineage"]
        assert known.chat.completions.create(**body()).choices[0].message.staple == {
            "mode": "first"
        }


def test_a_page_that_rebinds_its_name_is_refused(served: tuple[str, ExperimentSettings]) -> None:
    evil = httpx.get(f"{served[0]}/v1/models", headers={"Host": "evil.example"})
    assert evil.status_code == 403 and "loopback" in evil.json()["error"]["message"]
    for name, code in (("127.0.0.2:80", 200), ("[::1]:80", 200), ("0.0.0.0", 403), ("[", 403)):
        got = httpx.get(f"{served[0]}/v1/models", headers={"Host": name})
        assert got.status_code == code, name


def test_no_request_gets_more_tokens_than_the_server_gives(
    at_home: ExperimentSettings,
) -> None:
    with open_chat_server(at_home, 0, most_tokens=1) as service:
        assert service.defaults.most_tokens == at_home.evaluate.max_response_tokens
        asked = service._asked(parse_body(json.dumps(body(max_tokens=1 << 20)).encode()))
        assert asked.max_tokens == at_home.evaluate.max_response_tokens


def test_of_two_that_load_at_the_same_time_the_later_one_is_told() -> None:
    where = place("127.0.0.1", free_port(), "")
    with where.bound() as one, where.bound() as other:
        where.listening(one)
        with pytest.raises(UserError, match=r"cannot listen there.*choose another --port"):
            where.listening(other)


def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_door = staple(capsys, "serve", "lineage", "--host", "0.0.0.0")
    assert open_door.code == 2 and "nobody is asked for a key" in open_door.err
    unset = staple(capsys, "serve", "lineage", "--key-variable", "NO_SUCH_KEY")
    assert unset.code == 2 and "NO_SUCH_KEY is not set" in unset.err
    mode = staple(capsys, "serve", "lineage", "--mode", "gated")
    assert mode.code == 2 and "first or refine" in mode.err
    assert staple(capsys, "serve", "nothing").code == 2


def test_a_policy_of_sami_answers_once(taught: ExperimentSettings) -> None:
    with open_chat_server(taught) as service, serving(service.app) as url:
        plain = httpx.post(f"{url}/v1/chat/completions", json=body() | {"model": "taught"})
        assert plain.json()["choices"][0]["message"]["staple"] == {"mode": "first"}
        refused = httpx.post(
            f"{url}/v1/chat/completions", json=body() | {"model": "taught", "mode": "refine"}
        )
        assert refused.status_code == 400 and "expected 'first'" in refused.text


# Many at once ----------------------------------------------------------------------------------


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_many_clients_with_cancels_are_answered_once_and_in_batches(
    served: tuple[str, ExperimentSettings], recorded: list[tuple[Prompt, Answer]]
) -> None:
    url = served[0]
    before = {name: metric(url, name) for name in NAMES}
    answered = Counter[str]()

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            for turn in range(4):
                prompt, answer = recorded[(number + turn) % 4]
                given = {"model": "lineage", "messages": list(prompt.prompt)}
                if (number + turn) % 4 == 3:  # gone before its answer: a timeout, a closed tab
                    asked = {**given, "stream": bool(turn % 2)}
                    with pytest.raises(httpx.TimeoutException):
                        await http.post("/v1/chat/completions", json=asked, timeout=PATIENCE)
                    continue
                reply = await http.post("/v1/chat/completions", json=given)
                assert reply.json()["choices"][0]["message"]["content"] == answer.refined
                answered[reply.json()["id"]] += 1

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(8)))

    asyncio.run(all_of_them())
    assert set(answered.values()) == {1} and answered.total() == 24
    settle(lambda: metric(url, "staple_waiting_requests") == 0)
    gained = {name: metric(url, name) - before[name] for name in NAMES}
    assert gained[NAMES[0]] == 24
    assert gained[NAMES[2]] < gained[NAMES[1]] / 2, "turns are answered together"


PATIENCE = 0.01
"""Seconds after which a client of that test goes: less than a refined answer takes."""
NAMES = (
    'staple_answers_total{outcome="answered"}',
    "staple_turns_total",
    "staple_batch_requests_count",
)


def settle(is_so: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# The process -----------------------------------------------------------------------------------

SLOW = """
import sys, time
from models.engine.local import LocalPolicy
generate = LocalPolicy.generate
def slowly(self, requests, progress=None):
    time.sleep(1.0)
    return generate(self, requests, progress)
LocalPolicy.generate = slowly
from flows.commands.program import main
main()
"""
"""The program, with an engine slow enough to be met at work."""


def test_sigterm_finishes_what_streams_and_refuses_what_is_new(
    at_home: ExperimentSettings, made: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "serve", "lineage", "--port", str(port)],
        cwd=made,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        settle(lambda: process.poll() is not None or up(url), 120)
        assert process.poll() is None, process.communicate()[0]
        lines = list[str]()

        def read() -> None:
            given = body(stream=True)
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=given, timeout=60
            ) as reply:
                lines.extend(reply.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        settle(lambda: metric(url, "staple_turns_total") > 0)
        process.send_signal(signal.SIGTERM)
        settle(lambda: not up(url), 5)
        assert process.poll() is None, "it still answers"
        reader.join(60)
        assert lines[-2:] == ["data: [DONE]", ""]
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"]
        assert process.wait(30) == 0
        assert "All that was asked is answered." in process.communicate()[0]
    finally:
        process.kill()
        process.wait()


def up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
