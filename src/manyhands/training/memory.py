"""The most memory that this process has held since it was last asked to forget.

A process that trains one plan after another (a study does, with one worker) would else report the largest of all.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_PROCESS = Path("/proc/self")


def forget_peak() -> None:
    """Begin anew from what is held now, where Linux lets us."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_B() -> int:
    """The largest resident set since `forget_peak`, or since the process began where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
