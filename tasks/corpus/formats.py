"""What the columns of the known corpora mean: a record's prompt, as messages, and gold response.

Read by `tasks.corpus.prompts`. To read another corpus' own format, add an adapter to `ADAPTERS`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from models.policy import Message
from tasks.corpus.messages import filled, text_of, turns_of, unpacked, value_of, writable
from tasks.corpus.rows import Record, RowError, wrong_type

Format = Literal["plain", "chat", "hh-rlhf", "ultrafeedback", "tldr", "hotpotqa"]
Messages = tuple[Message, ...]
Golds = tuple[str, ...]
"""The references of a prompt: the first is shown and learned, the nearest counts."""


class Columns(NamedTuple):
    """The names of the plain format's columns; "" for none."""

    prompt: str = "prompt"
    gold: str = "gold"


Adapter = Callable[[Record, Columns], tuple[Messages, Golds]]
"""From a record to its prompt and gold responses. It raises RowError where a part is missing or
wrong."""


def detected(record: Record, columns: Columns) -> Format | None:
    """The format of a record, by its columns' names and types; None where no format fits."""
    names = set(record)
    if set(filter(None, columns)) <= names:
        return "plain"
    if {"question", "context", "answer"} <= names:
        return "hotpotqa"
    if "query" in names and names & set(_TLDR_GOLD):
        return "tldr"
    if "chosen" in names:
        dialogue = "prompt" not in names and isinstance(record["chosen"], str)
        return "hh-rlhf" if dialogue and not _LIST.match(record["chosen"]) else "ultrafeedback"
    if any(isinstance(record.get(name), list | str) for name in _CHATS):
        return "chat"
    return None


_LIST = re.compile(r"\s*[\[{]")


def _plain(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    prompt = _messages(record, columns.prompt)
    return prompt, _golds(record, columns.gold) if columns.gold else ()


_CHATS = ("messages", "conversations")


def _chat(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    """A dialogue in `messages`, or in ShareGPT's `conversations`; its last answer is the gold."""
    column = next((name for name in _CHATS if name in record), _CHATS[0])
    turns = turns_of(record, column)
    if isinstance(system := record.get("system"), str) and system.strip():
        turns = [_message("system", filled(system, "system")), *turns]
    if not columns.gold and turns[-1]["role"] == "user":
        return _dialogue(turns, column), ()
    gold = _last_answer(turns, column)
    return _dialogue(turns[:-1], column), (gold,) if columns.gold else ()


def _hh_rlhf(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    """A dialogue "\\n\\nHuman: … \\n\\nAssistant: …"; the last turn is the gold response."""
    dialogue = text_of(record, "chosen")
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
    turns = [
        _message("user" if speaker == "Human" else "assistant", text.strip())
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(
            "wrong dialogue",
            "the text is not a dialogue that ends with the assistant's turn",
            field="chosen",
            expected='turns "\\n\\nHuman: …" and "\\n\\nAssistant: …"',
        )
    return _dialogue(turns[:-1], "chosen"), (filled(turns[-1]["content"], "chosen"),)


def _ultrafeedback(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    """`chosen` is the gold response, or messages that end with it; the prompt may be in them."""
    if isinstance(record.get("chosen"), str) and unpacked(record["chosen"], "chosen") is None:
        return _messages(record, "prompt"), (text_of(record, "chosen"),)
    turns = turns_of(record, "chosen")
    gold, before = _last_answer(turns, "chosen"), turns[:-1]
    if not before or before[0]["role"] == "assistant":  # the prompt stands before them
        before = [*_messages(record, "prompt"), *before]
    return _dialogue(before, "chosen"), (gold,)


def _last_answer(turns: Sequence[Message], field: str) -> str:
    if turns[-1]["role"] != "assistant":
        raise RowError(
            "wrong dialogue",
            "the last message is not the assistant's",
            field=field,
            expected="messages that end with the gold response",
        )
    return filled(turns[-1]["content"], field)


_TLDR_GOLD = ("reference_responses", "reference_response")


def _tldr(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    """A post that ends in "TL;DR:", and its summaries."""
    column = next((c for c in _TLDR_GOLD if c in record), _TLDR_GOLD[0])
    golds = _several(record, column) or (text_of(record, column),)
    return _user(text_of(record, "query").strip()), tuple(gold.strip() for gold in golds)


def _hotpotqa(record: Record, columns: Columns) -> tuple[Messages, Golds]:
    """The paragraphs, then the question; `context` in the release's form or the hub's."""
    context = value_of(record, "context")
    try:
        pairs = (
            list(zip(context["title"], context["sentences"], strict=True))
            if isinstance(context, dict)
            else [(title, sentences) for title, sentences in context]
        )
        paragraphs = [f"{title}\n{''.join(sentences).strip()}" for title, sentences in pairs]
    except (KeyError, TypeError, ValueError):
        raise RowError(
            "wrong type",
            "the paragraphs cannot be read",
            field="context",
            expected="pairs of a title and a list of sentences",
        ) from None
    question = "\n\n".join([*paragraphs, f"Question: {text_of(record, 'question').strip()}"])
    writable(question, "context")
    return _user(question), (text_of(record, "answer").strip(),)


ADAPTERS: dict[Format, Adapter] = {
    "plain": _plain,
    "chat": _chat,
    "hh-rlhf": _hh_rlhf,
    "ultrafeedback": _ultrafeedback,
    "tldr": _tldr,
    "hotpotqa": _hotpotqa,
}


# Prompts and golds


def _messages(record: Record, field: str) -> Messages:
    """A prompt as text or as chat messages."""
    value = value_of(record, field)
    if isinstance(value, str) and unpacked(value, field) is None:
        return _user(filled(value, field))
    if not isinstance(value, str | list):
        raise wrong_type(value, field, "a text or a list of chat messages")
    return _dialogue(turns_of(record, field), field)


def _golds(record: Record, field: str) -> Golds:
    """One gold response, or several texts in a list."""
    return _several(record, field) or (_gold(record, field),)


def _several(record: Record, field: str) -> Golds:
    """The texts of a list of texts; none for any other value."""
    value = value_of(record, field)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return ()
    return tuple(filled(text, f"{field}[{i}]") for i, text in enumerate(value))


def _gold(record: Record, field: str) -> str:
    """A gold response as text, or as the one message of the assistant."""
    value = value_of(record, field)
    messages = unpacked(value, field) if isinstance(value, str) else value
    if isinstance(value, str) and messages is None:
        return filled(value, field)
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise wrong_type(
            value, field, "a text, a list of texts, or the assistant's message in a list"
        )
    turns = turns_of(record, field)
    if len(turns) > 1:
        raise RowError(
            "wrong dialogue",
            f"the gold response has {len(turns)} messages",
            field=field,
            expected="one message, the assistant's",
        )
    return _last_answer(turns, field)


def _dialogue(turns: Sequence[Message], field: str) -> Messages:
    """Turns that a policy can answer: none empty, the user's last, same speakers joined."""
    for turn in turns:
        filled(turn["content"], field)
    joined = [
        _message(role, "\n\n".join(turn["content"] for turn in group))
        for role, group in itertools.groupby(turns, key=lambda turn: turn["role"])
    ]
    if not joined or joined[-1]["role"] != "user":
        raise RowError(
            "wrong dialogue",
            "the prompt does not end with the user's turn",
            field=field,
            expected="the last message before the response to have the role user",
        )
    return tuple(joined)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _user(text: str) -> Messages:
    return (_message("user", text),)
