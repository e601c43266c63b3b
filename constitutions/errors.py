"""Errors that a user can correct.

Every layer raises `UserError` for them; the CLI prints the message and exits with 2. Any other
exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from constitutions.untrusted import hide_passwords

LONGEST = 2_000
"""Most characters of a line of a message; the middle of a longer one is left out."""
MOST_LINES = 200
"""Most lines of a message; the rest are counted."""
REPORTED = 50
"""Most mistakes that are shown at once; the rest are counted."""


class UserError(Exception):
    """A mistake in the user's input: what is wrong, where, what is expected, what to do.

    Args:
        what: what is wrong, as a clause without a full stop ("the gold response is empty").
        where: file, row, field or setting ("prompts.jsonl, row 7, field 'gold'").
        expected: what would be right ("a non-empty string").
        fix: the next step, as a command where there is one.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        super().__init__(self._render())

    def _render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        tail = [f"expected {self.expected}"] if self.expected else []
        tail += [self.fix] if self.fix else []
        lines = "; ".join([head, *tail]).split("\n")
        more = len(lines) - MOST_LINES
        lines[MOST_LINES:] = [f"… and {more:,} more lines"] if more > 0 else []
        return "\n".join(map(_clipped, lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the parts of the message: Prefect sends exceptions between processes."""
        return _rebuild, (type(self), self.__dict__.copy())


class UserErrors(UserError):
    """Several mistakes at once: all of a configuration's, or the first rows of a file's.

    Args:
        more: further mistakes, which are only counted.
        within: the name of what they are in, which begins each line.
    """

    def __init__(self, errors: Sequence[UserError], *, more: int = 0, within: str = "") -> None:
        more += max(len(errors) - REPORTED, 0)
        self.errors, self.more = tuple(errors[:REPORTED]), more
        lines = [str(e) for e in self.errors] + ([f"… and {more:,} more"] if more else [])
        if within:
            lines = [f"{within}: {line}" for text in lines for line in text.splitlines()]
        super().__init__("\n".join(lines))


def _clipped(line: str) -> str:
    """A line of limited length without passwords, which are hidden before they can be cut."""
    line = hide_passwords(_cut(line, 10 * LONGEST))
    return _cut(line, LONGEST)


def _cut(line: str, length: int) -> str:
    half = length // 2
    return line if len(line) <= length else f"{line[:half]} … {line[-half:]}"


def _rebuild(kind: type[UserError], state: dict[str, object]) -> UserError:
    error = kind.__new__(kind)
    error.__dict__.update(state)
    Exception.__init__(error, error._render())
    return error
