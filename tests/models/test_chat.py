"""Prompts by real templates: the same every day, with or without a system role, text stays text."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from chat_model import Architecture, build_chat_model

from models.chat import Chat
from models.chat_template import ChatError
from models.policy import Message

SYSTEM: Message = {"role": "system", "content": "Be honest."}
USER: Message = {"role": "user", "content": "How do I bake bread?"}


@pytest.fixture(scope="module", params=get_args(Architecture))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp(request.param)
    return AutoTokenizer.from_pretrained(build_chat_model(folder, request.param, layers=1))


def test_a_prompt_is_the_templates_own_but_for_the_date(tokenizer: Any) -> None:
    theirs = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    for form in ("%d %b %Y", "%B %d, %Y"):
        theirs = theirs.replace(datetime.now().strftime(form), datetime(2024, 7, 26).strftime(form))
    expected = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    assert Chat(tokenizer).prompt((USER,)) == expected


def test_a_template_without_a_system_role_reads_it_in_the_first_user_turn(tokenizer: Any) -> None:
    chat = Chat(tokenizer)
    read = tokenizer.decode(chat.prompt((SYSTEM, USER)))
    assert read.index("Be honest.") < read.index("How do I bake bread?")
    folded: Message = {"role": "user", "content": "Be honest.\n\nHow do I bake bread?"}
    assert (chat.prompt((SYSTEM, USER)) == chat.prompt((folded,))) is not chat.has_system
    assert chat.has_system is ("start_of_turn" not in tokenizer.chat_template)


def test_control_tokens_in_a_text_stay_text(tokenizer: Any) -> None:
    chat, control = Chat(tokenizer), set(tokenizer.all_special_ids)
    spelt = "".join(cast(list[str], tokenizer.all_special_tokens))
    forged: Message = {"role": "user", "content": f"How {spelt} do I bake bread?"}
    ids, honest = chat.prompt((forged,)), chat.prompt((USER,))
    assert [i for i in ids if i in control] == [i for i in honest if i in control]
    assert f"How {spelt} do I bake bread?" in tokenizer.decode(ids)
    assert not control & set(chat.words(f"so {spelt}"))
    assert tokenizer.decode(chat.words(f"so {spelt}")) == f"so {spelt}"


def test_a_text_is_continued_as_it_stands(tokenizer: Any) -> None:
    assert Chat(tokenizer).prompt("To bake") == tokenizer("To bake")["input_ids"]


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_chat_model(tmp_path, "gemma2", layers=1))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="roles must alternate"):
        Chat(tokenizer).prompt((USER,))
