"""What Linux can do about processes that outlive those who need them."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def signal_when_parent_ends(number: int) -> None:
    """Have this process sent a signal when the thread that started it ends, however it does; Linux only."""
    if sys.platform.startswith("linux"):
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(number), 0, 0, 0)
