"""Thoughts are no answers: from a model in process, from servers with odd replies, at a judge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from chat_model import build_chat_model
from openai_server import Proxy, serving
from real_templates import CHATML, QWEN35
from starlette.responses import JSONResponse

from models.endpoint.client import Limits
from models.endpoint.server import ServerPolicy, open_server
from models.engine.local import LocalPolicy, load_policy
from models.judges.base import Pair
from models.judges.pairwise import PairwiseJudge
from models.judges.registry import JudgeSettings
from models.policy import Completion, Message, PolicySettings, Request
from models.thoughts import KNOWN, Tags, split_text, split_unseen_text

HERE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "quantization": "none"}
QUICK = Limits(timeout=10, patience=2, start=2, backoff=0.02)
USER: tuple[Message, ...] = ({"role": "user", "content": "Name a fruit."},)


# Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "answer", "whole"),
    [
        ("<think>\nhm\n</think>\n\nFig.", False, "<think>\nhm\n</think>\n\n", "Fig.", True),
        ("hm\n</think>\n\nFig.", True, "hm\n</think>\n\n", "Fig.", True),
        ("\n\n<think></think>Fig.", False, "\n\n<think></think>", "Fig.", True),
        ("<think>\nhm", False, "<think>\nhm", "", False),
        ("hm", True, "hm", "", False),
        ("Fig.", False, "", "Fig.", True),
        ("Write </think> to close.", False, "", "Write </think> to close.", True),
        ("<think>a</think>b</think>c", False, "<think>a</think>", "b</think>c", True),
        ("<think>hm</think>", False, "<think>hm</think>", "", True),
    ],
)
def test_thoughts_and_answer_together_are_the_text(
    text: str, opened: bool, thoughts: str, answer: str, whole: bool
) -> None:
    told = split_text(text, Tags("<think>", "</think>"), opened=opened)
    assert told == (thoughts, answer, whole)
    assert told.thoughts + told.answer == text


def test_a_text_whose_prompt_is_not_seen() -> None:
    assert split_unseen_text("hm</think>\nFig.") == ("hm</think>\n", "Fig.", True)
    assert split_unseen_text("[THINK]hm[/THINK]Fig.").answer == "Fig."
    assert split_unseen_text("Fig.") == ("", "Fig.", True)
    assert split_unseen_text("hm</think>Fig.", ()) == ("", "hm</think>Fig.", True)
    assert len({tags.close for tags in KNOWN}) == len(KNOWN)


# In process ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its template ends turns with a token that no configuration names, and opens a thought."""
    from transformers import AutoTokenizer

    path = build_chat_model(tmp_path_factory.mktemp("model"), "qwen2", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = QWEN35
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((path / name).read_text())
        values["eos_token_id"] = tokenizer.eos_token_id
        (path / name).write_text(json.dumps(values))
    return path


def policy_of(directory: Path, **more: Any) -> LocalPolicy:
    return load_policy(PolicySettings(model=str(directory), **HERE, **more), directory, None)


def copy_with(directory: Path, to: Path, template: str | None = None, eos: Any = None) -> Path:
    shutil.copytree(directory, to)
    if template:
        (to / "chat_template.jinja").write_text(template)
    if eos is not None:
        file = to / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": eos}))
    return to


def test_the_templates_end_stops_an_answer_whatever_the_configuration_names(
    directory: Path, tmp_path: Path
) -> None:
    policy = policy_of(copy_with(directory, tmp_path / "chatml", CHATML))
    end, configured = (
        policy.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    )
    assert policy.stop == {end, configured} == policy.decoder.decoding.stop
    assert policy.chat.answered(USER, "Fig.").answer[-1] == end


def test_log_probabilities_score_the_templates_end_not_the_smallest_id(
    directory: Path, tmp_path: Path
) -> None:
    """A generation configuration may list its ends in any order."""
    plain = policy_of(copy_with(directory, tmp_path / "plain", CHATML))
    listed = policy_of(copy_with(directory, tmp_path / "listed", CHATML, eos=[7, 0, 2, 1]))
    assert {0, 7} < listed.stop
    pair = (USER, "Fig.")
    assert listed.logprobs([pair]) == plain.logprobs([pair])


def test_a_thought_that_the_prompt_opened_is_no_answer(directory: Path) -> None:
    """A random model never closes it: there is no answer, whatever it says."""
    policy = policy_of(directory)
    requests = [Request(messages=USER, key=str(i), n=4, max_tokens=12) for i in range(3)]
    found = [c for some in policy.generate(requests) for c in some]
    assert {(c.text, c.finish) for c in found} == {("", "length")}
    assert all(c.thoughts and c.tokens for c in found)
    (raw,) = policy.generate([Request(messages="Name", key="k", max_tokens=5)])
    assert raw[0].text and not raw[0].thoughts, "a text that is continued has none"

    off = policy_of(directory, template_arguments={"enable_thinking": False})
    assert all(c.text and not c.thoughts for some in off.generate(requests) for c in some)
    room = policy_of(directory, thought_tokens=5)
    assert max(c.tokens for some in room.generate(requests) for c in some) == 17


def test_an_end_that_is_spelt_in_words_stops_an_answer(directory: Path, tmp_path: Path) -> None:
    """No token of its own ends a turn: the end is found in the text, and is not in the answer."""
    policy = policy_of(copy_with(directory, tmp_path / "chatml", CHATML))
    request = Request(messages=USER, key="k", temperature=0.0, max_tokens=24)
    ((whole,),) = policy.generate([request])
    mark = re.findall("[a-z]{3,6}", whole.text)[-1]
    said = "<|im_start|>assistant\n{{ m['content'] }}"
    endless = CHATML.replace(f"{said}<|im_end|>", said + mark)
    policy.chat = type(policy.chat)(policy.tokenizer)
    policy.chat.template = endless
    assert policy.chat.stop_texts == (mark,) and not policy.chat.stop_tokens
    ((cut,),) = policy.generate([request])
    assert (cut.text, cut.finish) == (whole.text.partition(mark)[0].strip(), "stop")
    assert policy.tokenizer.decode(policy.chat.answered(USER, "Fig.").answer) == "Fig." + mark


def test_an_answer_about_the_tags_is_not_cut_in_silence(directory: Path) -> None:
    """Templates drop what stands before a closing tag in an earlier answer."""
    policy = policy_of(directory, template_arguments={"enable_thinking": False})
    again = {"role": "user", "content": "Again."}
    quoting = {"role": "assistant", "content": "Write </think> to close."}
    thinking = {"role": "assistant", "content": "<think>hm</think>Fig."}
    for said, finish in ((quoting, {"refused"}), (thinking, {"length", "stop"})):
        messages = (*USER, said, again)
        ((found,),) = policy.generate([Request(messages=messages, key="k", max_tokens=4)])  # type: ignore[arg-type]
        assert {found.finish} <= finish


def test_a_given_response_is_scored_after_an_empty_thought(directory: Path) -> None:
    policy = policy_of(directory)
    prompt, answer = policy.chat.answered(USER, "Fig.")
    assert cast(str, policy.tokenizer.decode(prompt)).endswith("<think>\n\n</think>\n\n")
    scored = policy.logprobs([(USER, "Fig.")])[0]
    assert scored.tokens == len(answer)
    off = policy_of(directory, template_arguments={"enable_thinking": False})
    assert off.logprobs([(USER, "Fig.")])[0].tokens == len(answer)


# Servers ---------------------------------------------------------------------------------------

ODD: dict[str, tuple[dict[str, Any], str, tuple[str, str, str]]] = {
    "inline": (
        {"content": "<think>\nhm\n</think>\n\nFig."},
        "stop",
        ("Fig.", "<think>\nhm\n</think>\n\n", "stop"),
    ),
    "opened by the server's template": (
        {"content": "hm\n</think>\n\nFig."},
        "stop",
        ("Fig.", "hm\n</think>\n\n", "stop"),
    ),
    "never closed": ({"content": "<think>\nhm"}, "length", ("", "<think>\nhm", "length")),
    "never closed, it says": ({"content": "<think>\nhm"}, "stop", ("", "<think>\nhm", "length")),
    "reasoning_content": (
        {"content": "\n\nFig.", "reasoning_content": "hm"},
        "stop",
        ("Fig.", "hm", "stop"),
    ),
    "reasoning": ({"content": "Fig.", "reasoning": "hm"}, "stop", ("Fig.", "hm", "stop")),
    "thoughts alone": (
        {"content": None, "reasoning_content": "hm"},
        "length",
        ("", "hm", "length"),
    ),
    "thoughts alone, it says": (
        {"content": None, "reasoning_content": "hm"},
        "stop",
        ("", "hm", "length"),
    ),
    "null": ({"content": None}, "stop", ("", "", "stop")),
    "parts": (
        {"content": [{"type": "text", "text": "Fi"}, {"type": "text", "text": "g."}]},
        "stop",
        ("Fig.", "", "stop"),
    ),
    "parts with thoughts": (
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "Fig."},
            ]
        },
        "stop",
        ("Fig.", "hm", "stop"),
    ),
    "other kinds of null": (
        {"content": "Fig.", "reasoning_content": None, "reasoning": {"x": 1}},
        "stop",
        ("Fig.", "", "stop"),
    ),
}


@contextmanager
def answering(
    message: dict[str, Any], finish: str = "stop", usage: int | None = 6, **more: Any
) -> Iterator[tuple[ServerPolicy, Proxy]]:
    reply: dict[str, Any] = {"choices": [{"message": message, "finish_reason": finish}]}
    if usage is not None:
        reply["usage"] = {"completion_tokens": usage}
    proxy = Proxy("", lambda i, body: JSONResponse(reply))
    with serving(proxy) as address:
        settings = PolicySettings(model="m", endpoint=address, **HERE, **more)
        yield open_server(settings, limits=QUICK), proxy


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_reply_is_read_for_what_it_is(kind: str) -> None:
    message, finish, expected = ODD[kind]
    with answering(message, finish) as (policy, _):
        ((found,),) = policy.generate([Request(messages=USER, key="k", max_tokens=9)])
    assert (found.text, found.thoughts, found.finish) == expected
    assert found.tokens == 6


def test_tokens_that_a_server_does_not_count_are_estimated() -> None:
    with answering({"content": "Figs are good."}, usage=None) as (policy, _):
        ((found,),) = policy.generate([Request(messages=USER, key="k", max_tokens=9)])
    assert (found.text, found.tokens, found.finish) == ("Figs are good.", 4, "stop")


def test_every_chat_request_tells_the_template_its_arguments() -> None:
    given = {"enable_thinking": False, "budget": 3}
    more: dict[str, Any] = {"template_arguments": given, "thought_tokens": 7}
    with answering({"content": "Fig."}, **more) as (policy, proxy):
        policy.generate([Request(messages=USER, key="k", max_tokens=9)])
    assert {json.dumps(b.get("chat_template_kwargs")) for b in proxy.bodies} == {json.dumps(given)}
    assert proxy.bodies[-1]["max_tokens"] == 16
    with answering({"content": "Fig."}) as (policy, proxy):
        policy.generate([Request(messages=USER, key="k", max_tokens=9)])
    assert all("chat_template_kwargs" not in body for body in proxy.bodies)


def test_tags_of_a_server_can_be_set() -> None:
    message = {"content": "[hm]Why?[so]<think>Fig."}
    with answering(message, thought_tags=["[hm]", "[so]"]) as (policy, _):
        ((found,),) = policy.generate([Request(messages=USER, key="k")])
    assert (found.text, found.thoughts) == ("<think>Fig.", "[hm]Why?[so]")
    with answering({"content": "<think>Fig."}, thought_tags="none") as (policy, _):
        ((found,),) = policy.generate([Request(messages=USER, key="k")])
    assert (found.text, found.finish) == ("<think>Fig.", "stop")


# A judge ---------------------------------------------------------------------------------------


def test_a_judge_is_read_after_its_thoughts() -> None:
    """A verdict in the thoughts is none, and feedback is what it says, not what it thinks."""
    said = "<think>\n[RESULT] B\n</think>\n\nThe first is shorter. [RESULT] A"
    with answering({"content": said}) as (policy, _):
        settings = JudgeSettings(kind="pairwise", policy=PolicySettings(model="m"), retries=0)
        judge = PairwiseJudge(policy, settings)
        (judged,) = judge.compare([Pair(prompt=USER, ours="Fig.", theirs="A fig.", gold="")])
    assert [v.feedback for v in judged.verdicts] == ["The first is shorter. [RESULT] A"] * 2
    assert [v.outcome for v in judged.verdicts] == [1.0, 0.0], "A in both orders"

    with answering({"content": "<think>\nWell, [RESULT] A"}, finish="stop") as (policy, _):
        (judged,) = PairwiseJudge(policy, settings).compare(
            [Pair(prompt=USER, ours="Fig.", theirs="A fig.", gold="")]
        )
    assert judged.outcome is None and judged.failure


def test_a_completion_without_thoughts_is_as_it_was() -> None:
    assert Completion(text="x", tokens=1, logprob=0.0, finish="stop").thoughts == ""
