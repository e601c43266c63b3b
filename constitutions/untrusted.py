"""Makes foreign texts safe to print: without terminal controls and passwords in addresses.

Principles, column names, paths and replies of servers are foreign. `constitutions.errors` hides
passwords in every message; `constitutions.terminal` cleans what is printed.
"""

from __future__ import annotations

import re

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but for tab and line feed: ESC, CR, CSI, …
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # order of reading
    "\U000e0000-\U000e007f]"  # tags: invisible text
)
_HALVES = re.compile("[\ud800-\udfff]")
_SCHEME = r"(?<=\w)(:/{1,3})"  # `Path` turns two slashes into one
# bounded, because a text of a million ":/" would take an hour
_USER = re.compile(_SCHEME + r"[^\s/?#'\"<>]{0,400}@")
_TORN_USER = re.compile(_SCHEME + r"[^\s@:'\"<>]{0,200}:[^\s@'\"<>]{0,200}@")
_SECRET = re.compile(
    r"(?i)(?<=[?&;])((?:[\w.-]*(?:password|passwd|secret|token)|pwd|key|api[_-]?key)=)[^&\s'\"#]+"
)


def clean(text: str) -> str:
    """The text without terminal controls, marks that change the reading order, and passwords.

    Half characters (lone surrogates), which a file's name may hold, become "�".
    """
    return hide_passwords(_HALVES.sub("�", _CONTROLS.sub("", text)))


def hide_passwords(text: str) -> str:
    """The text with "***" in place of the users and secrets in its addresses.

    "http://user:PW@host/?token=T" is "http://***@host/?token=***".
    """
    if ":/" not in text:
        return text
    return _SECRET.sub(r"\1***", _TORN_USER.sub(r"\1***@", _USER.sub(r"\1***@", text)))
