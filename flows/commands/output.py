"""Where a command may write its file: `--out`."""

from __future__ import annotations

import os
from pathlib import Path

from constitutions.errors import UserError


def check_output(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a place where no file can be written, before anything is computed.

    Args:
        suffixes: the file types that can be written; any where there are none.

    Raises:
        UserError: the file has another type, or cannot be written there.
    """
    if suffixes and path.suffix not in suffixes:
        what = f"files of type {path.suffix or 'none'} are not written"
        raise UserError(what, where=f"--out {path}", expected=" or ".join(suffixes))
    if path.is_dir():
        raise unwritable(path, "this is a folder")
    if not path.absolute().parent.is_dir():
        raise unwritable(path, f"there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise unwritable(path, f"nothing can be written into the folder {path.parent}")


def unwritable(path: Path, why: str) -> UserError:
    """The error about a file that cannot be written."""
    return UserError(why, where=f"--out {path}", expected="a file in a folder that can be written")
