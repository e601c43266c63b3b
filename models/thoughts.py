"""Thoughts told from answers: what a model writes before it answers, between tags.

`models/chat.py` finds a template's tags; `models/engine/local.py` and `models/endpoint/server.py`
tell what was sampled apart. Thoughts are kept as they were sampled, tags and line breaks included,
so that thoughts + answer is the sampled text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands before and after a thought."""

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
    """A sampled text in its two parts; together they are the text.

    `whole` is False where the thought was never closed: there is no answer then.
    """

    thoughts: str
    answer: str
    whole: bool = True


def tell_apart(text: str, tags: Tags, *, opened: bool) -> SplitText:
    """Thoughts and answer of a sampled text: the first closing tag ends the thoughts.

    Args:
        opened: whether the prompt has opened the thought, so that the text begins inside it.
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


def tell_apart_unseen(text: str, known: tuple[Tags, ...] = KNOWN) -> SplitText:
    """As `tell_apart`, of a text whose prompt and template are not seen (a server's): its beginning
    says which tags it has. A closing tag that nothing opened was opened by the prompt.
    """
    for tags in known:
        told = tell_apart(text, tags, opened=False)
        if told.thoughts:
            return told
    for tags in known:
        if tags.close in text and tags.open not in text.partition(tags.close)[0]:
            return tell_apart(text, tags, opened=True)
    return SplitText("", text)
