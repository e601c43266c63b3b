"""Ends a process with the one that started it, so that none works on for nobody.

It imports almost nothing: a process calls it first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """End this process when its parent, the process that started it, ends for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_die_after, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _die_after(parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
