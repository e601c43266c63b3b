"""Why a request to an OpenAI-compatible server got no reply, and what a person can do about it."""

from __future__ import annotations

import email.utils
import json
import re
from datetime import UTC, datetime

BUSY = frozenset({408, 425, 429})
TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|sequence|input) length|max_new_tokens` must"
    r"|`inputs` must have less|(prompt|input|request)\b.{0,20} too (long|large)|reduce the length",
    re.IGNORECASE,
)
"""How vLLM, SGLang, TGI, llama.cpp and hosted servers say that a request is too long: they have no
common error code."""


class Fault(Exception):
    """Why there is no reply.

    Args:
        status: the HTTP status; None where none arrived.
        again: whether the same request may succeed later.
        after: seconds that the server asks to wait.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, again: bool = False, after: float = 0.0
    ) -> None:
        self.reason, self.status, self.again, self.after = reason, status, again, after
        super().__init__(reason)

    @property
    def too_long(self) -> bool:
        """Whether the request exceeds the model's context (a 429 counts tokens per minute)."""
        return self.status not in (None, 429) and TOO_LONG.search(self.reason) is not None

    @property
    def unauthorised(self) -> bool:
        """Whether the server refuses the key, or a request without one."""
        return self.status in (401, 403)

    @property
    def bad_request(self) -> bool:
        """Whether the server refuses a field of the request: another request may succeed."""
        return self.status in (400, 422)

    @property
    def advice(self) -> str:
        """What a person can do, as a clause."""
        named = "policy.served_model (or policy.model) is a name that it serves"
        if self.status == 429:
            return "its rate limit or quota is used up: wait or raise it, then run this again"
        if self.again:
            return f"see that it runs, is reachable from here, and that {named}; its log says more"
        if self.status in (301, 302, 303, 307, 308, 404, 405):
            return f"check the endpoint's address, and that {named}"
        return f"check that {named}, and what its log says"


def error_of(status: int, raw: bytes) -> tuple[int, str]:
    """The status and the server's message; some servers send an error with the status 200."""
    text = raw[:10_000].decode(errors="replace")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return status, text
    if not isinstance(data, dict):
        return status, text
    error = data.get("error")
    inside = error if isinstance(error, dict) else {}
    if status == 200 and error:
        code = inside.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    message = inside.get("message") or data.get("message") or data.get("detail") or error
    kinds = [inside.get(name) for name in ("code", "type")]  # "context_length_exceeded"
    kind = next((f" ({k})" for k in kinds if isinstance(k, str)), "")
    return status, f"{message}{kind}" if message else text


def retry_after(value: str) -> float:
    """The seconds that a Retry-After header (a number or a date) asks to wait; 0 for any other."""
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value.strip()):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
