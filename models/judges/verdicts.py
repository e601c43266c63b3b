"""Reads an LLM judge's decision: the words after the last `[RESULT]` of its own text.

Prometheus writes `[RESULT] A`; general models add mark-up, LaTeX, a closing token or a few words
(`**[RESULT]** Response A is better.`). Mark-up is removed, and the rest must match one of the
phrases below as a whole. Any other text has no result, and the judge is asked again: a missing
result is counted and shown, a wrong one would go unnoticed.
"""

from __future__ import annotations

import re

from constitutions.foreign_text import without_trailing_tokens

MARKER = re.compile(r"\[RESULT\b(?:\]|(?=\s*:?\s*[^\s\]]))", re.IGNORECASE)
"""Matches `[RESULT]`, and the beginning of `[RESULT: A]`."""
LONGEST = 200
"""Most characters of a result; a longer text is none."""

_LATEX = re.compile(
    r"\\(?:(?:boxed|text(?:bf|rm|it|tt)?|math(?:bf|rm|it|tt)|bf)(?![a-zA-Z])|[()\[\]])"
)
_CLOSING = re.compile(r"\[/RESULT\]", re.IGNORECASE)
_MARKUP = re.compile(r"[*_`$\"'“”‘’()\[\]{}<>]")
"""Each character becomes a space, so that "4*5" does not become 45."""

_BREAK = r"(?:[:=–—-]\s*){0,2}"
_NAMED = r"(?:response|answer|assistant|option|candidate|choice)"
_VERY = r"(?:clearly|slightly|marginally|significantly|substantially|much|far|overall|the|a)"
_BETTER = rf"(?:better|best|superior|stronger|preferred|preferable|winner)(?:\s+(?:one|{_NAMED}))?"
_CALLED = (
    r"(?:the\s+|my\s+)?(?:(?:final|overall|better|best|preferred|winning)\s+)*"
    rf"(?:{_NAMED}|result|verdict|decision|winner|preference|judge?ment|one)"
    r"(?:\s+is\s*:?|\s*[:=])\s*"
)
_CHOICE = re.compile(
    rf"{_BREAK}(?:{_CALLED}|i\s+(?:choose|prefer|pick|select)\s+)?"
    rf"(?:{_NAMED}\s+)?(?P<choice>a|b)"
    rf"(?:\s+{_NAMED}\s+(?P=choice))?"
    rf"(?:\s+(?:is|was)\s+(?:{_VERY}\s+)*{_BETTER}"
    rf"(?:\s+than\s+(?:{_NAMED}\s+)?(?!(?P=choice)\b)[ab])?|\s+wins)?\s*[.!]?",
    re.IGNORECASE,
)
_TIE = re.compile(
    rf"{_BREAK}(?:{_CALLED})?(?:it\s+(?:is|s)\s+)?(?:a\s+)?tie\s*[.!]?", re.IGNORECASE
)
_SCORE = re.compile(
    r"(?:[:=]\s*)?"
    r"(?:(?:the\s+|my\s+)?(?:(?:final|overall)\s+)*"
    r"(?:score|rating|grade|result|answer)(?:\s+is\s*:?|\s+of|\s*[:=])?\s*)?"
    r"(?P<score>[1-5])(?:\.0{1,3})?"
    r"(?:\s*/\s*5(?:\.0)?|\s+(?:out\s+)?of\s+5|\s+points?|\s+stars?)?\s*\.?",
    re.IGNORECASE,
)


def parse_choice(text: str, *, ties: bool = False) -> str | None:
    """The choice at the end of a judgement: "A", "B", with `ties` also "TIE"; else None."""
    said = _result(text)
    if found := _CHOICE.fullmatch(said):
        return found["choice"].upper()
    return "TIE" if ties and _TIE.fullmatch(said) else None


def parse_score(text: str) -> str | None:
    """The score at the end of a judgement, "1" to "5"; None for any other, such as 4.5."""
    found = _SCORE.fullmatch(_result(text))
    return found["score"] if found else None


def _result(text: str) -> str:
    """The text after the last marker, without mark-up; "" where there is no marker."""
    *_, said = ["", *MARKER.split(text)[1:]]
    if len(said) > LONGEST:
        return ""
    said = without_trailing_tokens(said)
    for markup in (_CLOSING, _LATEX, _MARKUP):
        said = markup.sub(" ", said)
    return " ".join(said.split())
