"""Makes foreign text harmless before a judge reads it.

A tokenizer turns control tokens that a text spells into real ones; `disarm` breaks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_NAMES = (
    "s|bos|eos|pad|unk|mask|cls|sep|sop|eop|think|tool_calls?|tool_response|start_of_turn"
    "|end_of_turn|start_of_image|end_of_image|unused[0-9]+|begin_of_box|end_of_box"
)
_BRACKETED = (
    "INST|IMG|THINK|g?MASK|CLS|SEP|PAD|UNK|BOS|EOS|ARGS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS"
    "|TOOL_RESULTS|TOOL_CONTENT|MODEL_SETTINGS"
)
_TOKENS = (
    r"<[|\uff5c][^\s<>]{1,64}?[|\uff5c]>"  # <|eot_id|>, <|im_end|>, DeepSeek's full-width bars
    rf"|</?(?:{_NAMES})>"
    r"|<</?SYS>>"
    rf"|\[/?(?:{_BRACKETED})\]"
)
"""The control tokens that common chat templates write between turns."""
_RESULT = r"|\[\s*RESULT\b"
"""The mark after which a judge writes its result."""


def _first_character(pattern: str) -> re.Pattern[str]:
    """Matches the first character of each occurrence; a look-ahead finds overlapping ones, too."""
    return re.compile(rf"(?=(?:{pattern})).", re.IGNORECASE | re.DOTALL)


_AT_END = re.compile(rf"\s*+(?:(?:{_TOKENS})\s*+)*+\Z", re.IGNORECASE)
_TOKEN, _CONTROL = _first_character(_TOKENS), _first_character(_TOKENS + _RESULT)


def without_control_tokens(text: str) -> str:
    """The text with a space inside common control tokens ("<|eot_id|>" → "< |eot_id|>"), for a
    server whose tokenizer would obey them."""
    return _TOKEN.sub(r"\g<0> ", text)


def without_trailing_tokens(text: str) -> str:
    """The text without the control tokens at its end, where servers leave them ("A</s>")."""
    return _AT_END.sub("", text)


def disarm(text: str, control: Iterable[str] = ()) -> str:
    """The text with a space inside control tokens and judges' marks: "<|eot_id|>" → "< |eot_id|>".

    `apply_chat_template` renders a text that is then tokenised, so that control tokens in an answer
    become real ones: it could end its own turn and write the judge's. Nothing is removed, and other
    text stays as it is, mark-up and code included.

    Args:
        control: further strings to break, such as `control_strings` of the judge's tokenizer,
            which a judge behind an endpoint does not show.
    """
    text = _CONTROL.sub(r"\g<0> ", text)
    exact = sorted({c for c in control if len(c) > 1}, key=len, reverse=True)
    if exact:
        # a look-ahead, to break each of the occurrences that overlap
        text = re.sub(rf"(?s)(?=(?:{'|'.join(map(re.escape, exact))})).", r"\g<0> ", text)
    return text


def control_strings(tokenizer: Any) -> frozenset[str]:
    """The strings that a `transformers` tokenizer reads as control tokens anywhere in a text.

    Added tokens that are not special count where they look like mark-up ("<tool_call>"); others are
    mere words.
    """
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(
        t.content for t in added if t.special or re.fullmatch(r"[<\[{|].*[>\]}|]", t.content)
    ) | frozenset(tokenizer.all_special_tokens)
