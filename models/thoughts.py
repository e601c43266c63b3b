"""Splits a sampled text into thoughts, which a model writes between tags first, and the answer.

`models/chat.py` finds a template's tags; `models/engine/local.py` and `models/endpoint/server.py`
split samples. Thoughts keep their tags and line breaks: thoughts + answer is the sampled text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Tags:
    """The texts before and after a thought."""

    open: str
    close: str


KNOWN = (
    Tags("<think>", "</think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<thought>", "</thought>"),
    Tags("◁think▷", "◁/think▷"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""Qwen, DeepSeek, GLM, SmolLM and most others; Mistral; Seed-OSS; EXAONE; Kimi; Command A; gpt-oss.
"""


class SplitText(NamedTuple):
    """The two parts of a sampled text; joined they are that text.

    `whole` is False where the thought is not closed; the answer is then empty.
    """

    thoughts: str
    answer: str
    whole: bool = True


def split_text(text: str, tags: Tags, *, opened: bool) -> SplitText:
    """The thoughts and the answer of a sampled text; the first closing tag ends the thoughts.

    Args:
        opened: whether the prompt ends with the opening tag, so that the text begins in a thought.
    """
    start = text.lstrip()
    if not (opened or start.startswith((tags.open, tags.close))):
        return SplitText("", text)
    place = text.find(tags.close)
    if place < 0:
        return SplitText(text, "", whole=False)
    rest = text[place + len(tags.close) :]
    answer = rest.lstrip()
    return SplitText(text[: len(text) - len(answer)], answer)


def split_unseen_text(text: str, known: tuple[Tags, ...] = KNOWN) -> SplitText:
    """`split_text` for a server's text, whose template is unknown: the text itself shows its tags.

    A closing tag without an opening one belongs to a thought that the prompt opened.
    """
    for tags in known:
        parts = split_text(text, tags, opened=False)
        if parts.thoughts:
            return parts
    for tags in known:
        if tags.close in text and tags.open not in text.partition(tags.close)[0]:
            return split_text(text, tags, opened=True)
    return SplitText("", text)
