"""Text that somebody else wrote, made harmless before a judge reads it.

A tokenizer turns control tokens in a text into the real ones; `disarm` breaks them.
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
"""What the chat templates in use write between turns."""
_RESULT = r"|\[\s*RESULT\b"
"""Where a judge's own result stands."""


def _first_character(pattern: str) -> re.Pattern[str]:
    """Of each occurrence; a look-ahead, so that of those that overlap each is found."""
    return re.compile(rf"(?=(?:{pattern})).", re.IGNORECASE | re.DOTALL)


_AT_END = re.compile(rf"\s*+(?:(?:{_TOKENS})\s*+)*+\Z", re.IGNORECASE)
_TOKEN, _CONTROL = _first_character(_TOKENS), _first_character(_TOKENS + _RESULT)


def without_control_tokens(text: str) -> str:
    """The text with a space inside the usual control tokens, for a server whose tokenizer would
    read them as such: "<|eot_id|>" → "< |eot_id|>"."""
    return _TOKEN.sub(r"\g<0> ", text)


def without_trailing_tokens(text: str) -> str:
    """The text without the control tokens at its end, as servers leave them there ("A</s>")."""
    return _AT_END.sub("", text)


def disarm(text: str, control: Iterable[str] = ()) -> str:
    """The text with a space inside whatever could act as more than words: "<|eot_id|>" → "< |eot…".

    A tokenizer turns control tokens in a message's text into the real ones (`apply_chat_template`
    renders text, and the text is then tokenised): an answer could end its own turn and speak for
    the judge. Nothing is removed, and other text stays as it is, mark-up and code included.

    Args:
        control: further strings to break, such as `control_strings` of the judge's tokenizer. A
            judge behind an endpoint has none to give: there the usual ones must do.
    """
    text = _CONTROL.sub(r"\g<0> ", text)
    exact = sorted({c for c in control if len(c) > 1}, key=len, reverse=True)
    if exact:
        # a look-ahead: of occurrences that overlap, each is broken
        text = re.sub(rf"(?s)(?=(?:{'|'.join(map(re.escape, exact))})).", r"\g<0> ", text)
    return text


def control_strings(tokenizer: Any) -> frozenset[str]:
    """What a `transformers` tokenizer reads as one token wherever it stands in a text.

    Added tokens that are no special ones count where they look like mark-up ("<tool_call>"): an
    added word is a word.
    """
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(
        t.content for t in added if t.special or re.fullmatch(r"[<\[{|].*[>\]}|]", t.content)
    ) | frozenset(tokenizer.all_special_tokens)
