"""Folders and files for this user alone: nobody else's is used, and no link is followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from constitutions.errors import UserError


def folder(path: Path) -> Path:
    """The folder, made where it is missing, for its owner alone.

    Raises:
        UserError: it is a link, a file or another user's; it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(
            f"this folder cannot be used: {error.strerror}",
            where=str(path),
            expected="a folder of your own, not a link",
            fix="see what stands there, and move it away",
        ) from None
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid():
            raise UserError(
                f"this folder belongs to another user (id {found.st_uid})",
                where=str(path),
                expected="a folder of your own",
                fix="move it away, or set STAPLE_HOME or HOME to a folder of your own",
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(opened, 0o700)
    finally:
        os.close(opened)
    return path


def opener(path: str, flags: int) -> int:
    """For `open`: a new file is its owner's alone, and a link is not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
