"""What the columns of the known corpora mean: a record's prompt, as messages, and gold response.

Read by `tasks.corpus`. To read another corpus' own format, add an adapter to `ADAPTERS`.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from models.policy import Message
from tasks.corpus_files import Record, RowError, wrong_type

Format = Literal["plain", "hh-rlhf", "ultrafeedback", "tldr", "hotpotqa"]
Messages = tuple[Message, ...]


class Columns(NamedTuple):
    """The names of the plain format's columns; "" for none."""

    prompt: str = "prompt"
    gold: str = "gold"


Adapter = Callable[[Record, Columns], tuple[Messages, str]]
"""From a record to its prompt and gold response; raises RowError where there is none."""


def detected(first: Record, columns: Columns) -> Format:
    """Whose columns these are, by those of the first record."""
    names = set(first)
    if set(filter(None, columns)) <= names:
        return "plain"
    if {"question", "context", "answer"} <= names:
        return "hotpotqa"
    if "query" in names and names & set(_TLDR_GOLD):
        return "tldr"
    if "chosen" in names:
        return "ultrafeedback" if "prompt" in names else "hh-rlhf"
    return "plain"


def _plain(record: Record, columns: Columns) -> tuple[Messages, str]:
    gold = _text(record, columns.gold) if columns.gold else ""
    return _messages(record, columns.prompt), gold


def _hh_rlhf(record: Record, columns: Columns) -> tuple[Messages, str]:
    """A dialogue "\\n\\nHuman: … \\n\\nAssistant: …"; the last turn is the gold response."""
    dialogue = _text(record, "chosen")
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
    turns = [
        _message("user" if speaker == "Human" else "assistant", text.strip())
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowError(
            "wrong dialogue",
            "the text is no dialogue that ends with the assistant's turn",
            field="chosen",
            expected='turns "\\n\\nHuman: …" and "\\n\\nAssistant: …"',
        )
    return _dialogue(turns[:-1], "chosen"), _filled(turns[-1]["content"], "chosen")


def _ultrafeedback(record: Record, columns: Columns) -> tuple[Messages, str]:
    """`chosen` is the gold response, or a list of messages that ends with it."""
    if isinstance(record.get("chosen"), str):
        return _messages(record, "prompt"), _text(record, "chosen")
    turns = _turns(record, "chosen")
    if turns[-1]["role"] != "assistant":
        raise RowError(
            "wrong dialogue",
            "the last message is not the assistant's",
            field="chosen",
            expected="messages that end with the gold response",
        )
    prompt = _dialogue(turns[:-1], "chosen") if len(turns) > 1 else _messages(record, "prompt")
    return prompt, _filled(turns[-1]["content"], "chosen")


_TLDR_GOLD = ("reference_responses", "reference_response")


def _tldr(record: Record, columns: Columns) -> tuple[Messages, str]:
    """A post that ends in "TL;DR:", and its summary (the first, where there are several)."""
    column = next((c for c in _TLDR_GOLD if c in record), _TLDR_GOLD[0])
    gold = record.get(column)
    first = {column: gold[0]} if isinstance(gold, list) and gold else record
    return _user(_text(record, "query").strip()), _text(first, column).strip()


def _hotpotqa(record: Record, columns: Columns) -> tuple[Messages, str]:
    """The paragraphs, then the question; `context` in the release's form or the hub's."""
    context = _value(record, "context")
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
    question = "\n\n".join([*paragraphs, f"Question: {_text(record, 'question').strip()}"])
    _encodable(question, "context")
    return _user(question), _text(record, "answer").strip()


ADAPTERS: dict[Format, Adapter] = {
    "plain": _plain,
    "hh-rlhf": _hh_rlhf,
    "ultrafeedback": _ultrafeedback,
    "tldr": _tldr,
    "hotpotqa": _hotpotqa,
}


# Fields


def _value(record: Record, field: str) -> Any:
    if field not in record:
        columns = textwrap.shorten(", ".join(map(str, record)), 100, placeholder=" …") or "none"
        raise RowError(
            "missing field",
            f"the field is missing (fields here: {columns})",
            field=field,
            expected="a field of this name, or set prompt_column, gold_column or format",
        )
    return record[field]


def _text(record: Record, field: str) -> str:
    value = _value(record, field)
    if not isinstance(value, str):
        raise wrong_type(value, field, "a text")
    return _filled(value, field)


def _filled(text: str, field: str) -> str:
    _encodable(text, field)
    if not text.strip():
        raise RowError("empty", "the text is empty", field=field, expected="a non-empty text")
    return text


def _encodable(text: str, field: str) -> None:
    """Bytes that were no UTF-8 are lone surrogates by now (`surrogateescape`)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
        raise RowError(
            "broken text",
            f"{what} at character {error.start + 1} is not valid UTF-8",
            field=field,
            expected="text in UTF-8",
        ) from None


def _messages(record: Record, field: str) -> Messages:
    """A prompt as text or as chat messages."""
    value = _value(record, field)
    if isinstance(value, str):
        return _user(_filled(value, field))
    if not isinstance(value, list):
        raise wrong_type(value, field, "a text or a list of chat messages")
    return _dialogue(_turns(record, field), field)


def _turns(record: Record, field: str) -> list[Message]:
    value = _value(record, field)
    if not isinstance(value, list):
        raise wrong_type(value, field, "a list of chat messages")
    if not value:
        raise RowError("empty", "there are no messages", field=field, expected="chat messages")
    return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: object, field: str) -> Message:
    if not isinstance(turn, dict):
        raise wrong_type(turn, field, 'a message {"role": …, "content": …}')
    parts = {f"{field}.{name}": value for name, value in turn.items()}
    role, content = _text(parts, f"{field}.role"), _text(parts, f"{field}.content")
    if role not in ("system", "user", "assistant"):
        raise RowError(
            "unknown role",
            f"the role is {role[:40]!r}",
            field=field,
            expected='"system", "user" or "assistant"',
        )
    return _message(role, content)


def _dialogue(turns: Sequence[Message], field: str) -> Messages:
    """Turns that a policy can answer: none empty, the user's last, same speakers joined."""
    for turn in turns:
        _filled(turn["content"], field)
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
