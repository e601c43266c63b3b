"""On the PYTHONPATH of a Ray node: what lies below $HIDDEN_DISK is not on this node's disk."""

import os
import os.path

_hidden, _is_folder = os.environ["HIDDEN_DISK"], os.path.isdir


def _isdir(path: str) -> bool:
    return not os.fspath(path).startswith(_hidden) and _is_folder(path)


os.path.isdir = _isdir  # type: ignore[assignment]
