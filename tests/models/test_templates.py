"""Real chat templates: what ends a turn, what later turns are shown, what is trained. See
docs/templates.md, which lists them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_model import build_tokenizer
from real_templates import REAL, Real

from constitutions.errors import UserError
from models.chat import Chat
from models.chat_template import ChatError
from models.policy import Message, PolicySettings
from models.prompts import CHAT, ask_refinement
from models.training.encoding import EncodedExample, Encoder, check_template

PROMPT: tuple[Message, ...] = (
    {"role": "system", "content": "Answer in plain words."},
    {"role": "user", "content": "How do I bake bread?"},
)
SAID = ("Mix flour with water.", "Name every quantity.", "Mix 500 g of flour with water.")
TURNS: tuple[Message, ...] = (
    *ask_refinement(CHAT, PROMPT, *SAID[:2]),
    {"role": "assistant", "content": SAID[2]},
)
PRINCIPLE, REFINED = 4, 6
"""Where z and y2 stand in `TURNS`."""
USED = [name for name, real in REAL.items() if not real.refused]
THINKING = [name for name in USED if REAL[name].thoughts]


@cache
def tokenizer_of(name: str) -> Any:
    real = REAL[name]
    made = build_tokenizer(real.template, real.eos, _control(real), bos=real.bos)
    made.add_tokens(list(real.words))
    return made


def _control(real: Real) -> list[str]:
    return [t for t in ((real.bos or ""), *real.control) if t and t != real.eos]


def settings_of(name: str) -> PolicySettings:
    return PolicySettings(template_arguments=REAL[name].arguments)


def chat_of(name: str) -> Chat:
    return Chat(tokenizer_of(name), settings_of(name))


def trained(tokenizer: Any, example: EncodedExample) -> list[int]:
    return [i for i, t in zip(example.ids, example.trained, strict=True) if t]


@pytest.mark.parametrize("name", USED)
def test_a_turn_ends_as_the_template_ends_it(name: str) -> None:
    tokenizer, real = tokenizer_of(name), REAL[name]
    chat = check_template(tokenizer, settings_of(name), CHAT)
    assert tokenizer.decode(chat.end_of_turn).strip() == real.end
    spelt = real.end not in tokenizer.get_vocab()
    ids = set() if spelt else {tokenizer.convert_tokens_to_ids(real.end)}
    assert chat.stop_tokens == ids
    assert chat.stop_texts == ((real.end,) if spelt else ())


@pytest.mark.parametrize("name", [name for name in REAL if REAL[name].refused])
def test_what_cannot_be_used_is_refused_by_name(name: str) -> None:
    with pytest.raises(ChatError, match=REAL[name].refused):
        check_template(tokenizer_of(name), settings_of(name), CHAT)


@pytest.mark.parametrize("name", USED)
def test_what_was_sampled_is_told_apart_shown_and_trained(name: str) -> None:
    """From sampled tokens to columns, to the next prompt and to an example, and nothing changes."""
    tokenizer, real, chat = tokenizer_of(name), REAL[name], chat_of(name)
    sampled = tokenizer.encode(real.thoughts + SAID[2], add_special_tokens=False)
    before = chat.prompt(TURNS[:REFINED])
    opened = chat.opens_thought(before)
    assert opened is (real.thoughts[:3] == "The")
    told = chat.split(sampled, opened=opened)
    assert told == (real.thoughts, SAID[2], True)

    shown = tokenizer.decode(before)
    assert all(text in shown for text in SAID[:2]) and "oven" not in shown

    encoder = Encoder(tokenizer, 4096, settings_of(name))
    thoughts = {PRINCIPLE: "", REFINED: told.thoughts}  # type: ignore[attr-defined]
    *_, last = encoder.encode(TURNS, (PRINCIPLE, REFINED), thoughts=thoughts)
    end = list(chat.end_of_turn)
    if real.thoughts:
        assert list(last.ids) == [*before, *sampled, *end], "token for token"
        assert trained(tokenizer, last)[-len(sampled) - len(end) :] == [*sampled, *end]
    else:
        assert list(last.ids[: len(before)]) == before
        answer = tokenizer.decode(list(last.ids[len(before) :]))
        assert answer.strip().startswith(SAID[2]) and real.end in answer
    assert trained(tokenizer, last)[-1] == end[-1]


@pytest.mark.parametrize("name", USED)
def test_a_principle_is_trained_without_its_thoughts(name: str) -> None:
    """They may quote the gold: it follows the template's own empty thought, which has no loss."""
    tokenizer, real = tokenizer_of(name), REAL[name]
    encoder = Encoder(tokenizer, 4096, settings_of(name))
    (example,) = encoder.encode(TURNS[: PRINCIPLE + 1], (PRINCIPLE,))
    said = tokenizer.decode(trained(tokenizer, example))
    assert said.strip().removesuffix(real.end).strip() == SAID[1]
    prompt = encoder.chat.prompt(TURNS[:PRINCIPLE])
    assert list(example.ids[: len(prompt)]) == prompt
    if encoder.chat.opens_thought(prompt):
        between = tokenizer.decode(example.ids).rpartition("<think>")[2]
        assert between.partition("</think>")[0].strip() == "", "an empty thought"


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_that_is_not_closed_is_no_answer(name: str) -> None:
    tokenizer, real, chat = tokenizer_of(name), REAL[name], chat_of(name)
    half = real.thoughts.partition(" is small")[0]
    ids = tokenizer.encode(half, add_special_tokens=False)
    told = chat.split(ids, opened=chat.opens_thought(chat.prompt(PROMPT)))
    assert told == (half, "", False)


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_a_server_tells_without_tags_are_trained_with_them(name: str) -> None:
    tokenizer, chat = tokenizer_of(name), chat_of(name)
    _, answer = chat.answered(TURNS[:REFINED], SAID[2], "The oven is small.")
    said = tokenizer.decode(answer[: -len(chat.end_of_turn)])
    opened = chat.opens_thought(chat.prompt(TURNS[:REFINED]))
    told = chat.split(answer[: -len(chat.end_of_turn)], opened=opened)
    assert told.thoughts + told.answer == said and told.answer == SAID[2]
    assert "The oven is small." in told.thoughts and told.whole


def test_tags_of_ones_own_and_none() -> None:
    tokenizer = tokenizer_of("ChatML")
    assert Chat(tokenizer).tags is None
    own = Chat(tokenizer, PolicySettings(thought_tags=("[hm]", "[so]")))
    ids = tokenizer.encode("[hm]Why?[so] Yes.")
    assert own.split(ids, opened=False) == ("[hm]Why?[so] ", "Yes.", True)
    off = Chat(tokenizer_of("Qwen3"), PolicySettings(thought_tags="none"))
    marked = tokenizer_of("Qwen3").encode("<think>Why?</think>Yes.")
    assert off.split(marked, opened=False).answer == "<think>Why?</think>Yes."


def test_a_template_by_its_name() -> None:
    tokenizer = tokenizer_of("Command R")
    default, tools = Chat(tokenizer), Chat(tokenizer, PolicySettings(chat_template="tool_use"))
    assert tokenizer.decode(tools.prompt(PROMPT)) == "TOOLS " + tokenizer.decode(
        default.prompt(PROMPT)
    )
    with pytest.raises(UserError, match="no chat template called 'chat'") as error:
        Chat(tokenizer, PolicySettings(chat_template="chat"))
    assert "default, rag, tool_use" in str(error.value)
    nameless = build_tokenizer({"rag": "x", "tool_use": "y"}, "</s>", [])
    with pytest.raises(UserError, match="none is called 'default'") as error:
        Chat(nameless)
    assert "rag, tool_use" in str(error.value)
    with pytest.raises(UserError, match="no chat template called 'tool_use'"):
        Chat(tokenizer_of("ChatML"), PolicySettings(chat_template="tool_use"))


def test_arguments_reach_the_template_and_cannot_take_its_place() -> None:
    tokenizer = tokenizer_of("Qwen3")
    off = Chat(tokenizer, PolicySettings(template_arguments={"enable_thinking": False}))
    assert tokenizer.decode(off.prompt(PROMPT)).endswith("<think>\n\n</think>\n\n")
    for name in ("messages", "chat_template", "tokenize", "not a name"):
        with pytest.raises(ValueError, match="not a variable that a chat template can be given"):
            PolicySettings(template_arguments={name: True})


def test_a_model_without_any_end_is_named() -> None:
    tokenizer = build_tokenizer(REAL["Vicuna without an end"].template, "</s>", [])
    tokenizer.eos_token = None
    with pytest.raises(ChatError, match="ends no assistant turn"):
        check_template(tokenizer, PolicySettings(), CHAT)


def test_a_small_vocabulary_that_cannot_spell_the_tried_words_is_no_fault_of_the_template() -> None:
    from models.planted import pretrain
    from models.prompts import TERSE

    tokenizer = pretrain.build_tokenizer()  # of lower-case words; all others are <unk>
    chat = check_template(tokenizer, PolicySettings(), TERSE)
    assert tokenizer.decode(list(chat.end_of_turn)) == tokenizer.eos_token


CASES = Path(__file__).parents[3] / "shared" / "cases" / "thinking-templates"


def test_the_templates_of_thinking_models_as_they_are_published() -> None:
    files = sorted(CASES.glob("*.jinja"))
    if not files:
        pytest.skip(f"the published templates are not at {CASES}")
    for file in files:
        text = file.read_text("utf-8")
        control = sorted(set(re.findall(r"<[|｜][^\s<>'\"]{1,40}?[|｜]>", text)))
        end = next(t for t in control if ("end" in t and "sentence" in t) or "im_end" in t)
        tokenizer = build_tokenizer(text, end, [t for t in control if t != end])
        tokenizer.add_tokens(["<think>", "</think>"])
        chat = check_template(tokenizer, PolicySettings(), CHAT)
        assert tokenizer.decode(chat.end_of_turn) == end, file.name
        thoughts = "The oven is small.\n</think>\n\n"
        if not chat.opens_thought(chat.prompt(PROMPT)):
            thoughts = "<think>\n" + thoughts
        prompt, answer = chat.answered(TURNS[:REFINED], SAID[2], thoughts)
        assert prompt == chat.prompt(TURNS[:REFINED])
        assert tokenizer.decode(answer) == thoughts + SAID[2] + end, file.name
