"""Chat messages in data sets: lists of roles and contents, which may be written as text.

`tasks.corpus.formats` reads them. A list in a text is JSON, or Python's own form (as pandas writes
it), and the whole text must be the list. ShareGPT's turns are recognised by their keys, contents in
parts by their type.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from models.policy import Message
from tasks.corpus.rows import Record, RowError, wrong_type

LONGEST_LITERAL = 2**18
"""Characters of a list in Python's form; that of JSON is bounded by the row."""
DEEPEST_LITERAL = 8

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names for the roles."""

_BEGINS = re.compile(r"(?:array\()?[\[\s]*\{")
_KEYS = [
    (re.compile(r"""['"]role['"]\s*:"""), re.compile(r"""['"]content['"]\s*:""")),
    (re.compile(r"""['"]from['"]\s*:\s*['"](?:human|gpt)"""), re.compile(r"""['"]value['"]\s*:""")),
]
"""Of a message, and of ShareGPT's: without its roles, JSON about a transfer would look alike."""
_LITERAL = re.compile(
    r"""\s++|'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+"|[\[\]{}:,]|None|True|False|-?\d++(?:\.\d++)?+"""
)


def unpacked(text: str, field: str) -> list[Any] | None:
    """The messages of a text that is a list of messages; None for any other text.

    Raises:
        RowError: it looks like messages, and cannot be read as such.
    """
    stripped = text.strip()
    if not _BEGINS.match(stripped):
        return None
    if not any(one.search(stripped) and other.search(stripped) for one, other in _KEYS):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        value, end = _literal(stripped)
        if value is None and 0 < end < len(stripped) and stripped[-1] not in "]})":
            return None  # prose that begins with a message
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        keys = [set(turn) for turn in value]
        if all({"role", "content"} <= names or {"from", "value"} <= names for names in keys):
            return value
    raise RowError(
        "messages as text",
        "the text looks like chat messages that were written as text, but cannot be read as such",
        field=field,
        expected="a list of messages, as it is or as the whole text in JSON or in Python's form",
    )


def _literal(text: str) -> tuple[Any, int]:
    """The value of plain literals in Python's form, or None; and where the first list closes.

    Only what is checked here reaches Python's parser, which deep nesting can bring down.
    """
    at, depth, closed = 0, 0, 0
    while at < len(text) and (found := _LITERAL.match(text, at)):
        token, at = found[0], found.end()
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if depth == 0 and token in ("]", "}") and not closed:
            closed = at
        if depth > DEEPEST_LITERAL or depth < 0:
            return None, closed
    if at < len(text) or depth or len(text) > LONGEST_LITERAL:
        return None, closed
    try:
        return ast.literal_eval(text), closed
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None, closed


# Turns ----------------------------------------------------------------------------------------


def turns_of(record: Record, field: str) -> list[Message]:
    """The messages of a column, each with its role and text.

    Raises:
        RowError: there is no message, or one that a policy cannot read (a tool's, an image).
    """
    found = value_of(record, field)
    value = unpacked(found, field) if isinstance(found, str) else found
    if not isinstance(value, list):
        raise wrong_type(found, field, "a list of chat messages")
    if not value:
        raise RowError("empty", "there are no messages", field=field, expected="chat messages")
    return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: object, field: str) -> Message:
    if not isinstance(turn, dict):
        raise wrong_type(turn, field, 'a message {"role": …, "content": …}')
    shared = "role" not in turn and {"from", "value"} <= turn.keys()
    keys = ("from", "value") if shared else ("role", "content")
    parts = {f"{field}.{name}": value for name, value in turn.items()}
    role = text_of(parts, f"{field}.{keys[0]}")
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise RowError(
            "unknown role",
            f"the role is {role[:40]!r}",
            field=field,
            expected='"system", "user" or "assistant"',
        )
    if turn.get("tool_calls"):
        what = "the message calls tools, which no stage here does"
        raise RowError("tools", what, field=field, expected="a message of text")
    content = turn.get(keys[1])
    if isinstance(content, list):
        content = _joined(content, f"{field}.{keys[1]}")
        parts[f"{field}.{keys[1]}"] = content
    return {"role": role, "content": text_of(parts, f"{field}.{keys[1]}")}


def _joined(content: list[Any], field: str) -> str:
    """The text of a content in parts, `[{"type": "text", "text": …}]`."""
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(text_of({f"{field}[{i}].text": part.get("text")}, f"{field}[{i}].text"))
            continue
        kind = str(part.get("type"))[:40] if isinstance(part, dict) else type(part).__name__
        raise RowError(
            "no text",
            f"a part of the content is of type {kind}",
            field=f"{field}[{i}]",
            expected='text, or parts {"type": "text", "text": …}',
        )
    return "\n".join(texts)


# Fields ---------------------------------------------------------------------------------------


def value_of(record: Record, field: str) -> Any:
    """The value of a column.

    Raises:
        RowError: the row has no such column.
    """
    if field not in record:
        columns = ", ".join(str(name)[:100] for name in list(record)[:20])
        columns = columns if len(columns) <= 100 else f"{columns[:98]} …"
        raise RowError(
            "missing field",
            f"the field is missing (fields here: {columns or 'none'})",
            field=field,
            expected="a field of this name, or set prompt_column, gold_column or format",
        )
    return record[field]


def text_of(record: Record, field: str) -> str:
    """The text of a column.

    Raises:
        RowError: there is no such column, or its value is not a text, is empty or is not Unicode.
    """
    value = value_of(record, field)
    if not isinstance(value, str):
        raise wrong_type(value, field, "a text")
    return filled(value, field)


def filled(text: str, field: str) -> str:
    """The text itself, checked.

    Raises:
        RowError: it is only white space, or cannot be written as UTF-8.
    """
    writable(text, field)
    if not text.strip():
        raise RowError("empty", "the text is empty", field=field, expected="a non-empty text")
    return text


def writable(text: str, field: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
        RowError: it has broken bytes (which `open_text` reads as lone surrogates) or NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
        raise RowError(
            "broken text",
            f"{what} at character {error.start + 1} is not valid UTF-8",
            field=field,
            expected="text in UTF-8, or UTF-16 or UTF-32 with a byte order mark",
        ) from None
    if "\0" in text:
        raise RowError(
            "broken text",
            f"character {text.index(chr(0)) + 1} is NUL",
            field=field,
            expected="text without NUL characters",
        )
