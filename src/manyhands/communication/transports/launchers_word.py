"""What a launcher says of a worker's process that has ended, where no memory is shared: an empty file.

Its name begins with that of the rendezvous. ``…-gone-3``: rank 3 was killed and the others go on. ``…-failed-3``: they
do not. A file is there or it is not, so that all who look after it was written see the same; a connection that breaks
is noticed by its two ends alone, at two moments.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

#: The launcher notices a death when the worker's pipe closes, which is as soon as its peers do. Own choice.
PATIENCE_S = 2.0
NAP_S = 0.005


class LaunchersWord:
    """Said and heard by those who meet at ``rendezvous``, and not by others in its folder; ranks are the world's."""

    def __init__(self, rendezvous: str | os.PathLike[str]) -> None:
        self._rendezvous = os.fspath(rendezvous)

    def say(self, what: Literal["gone", "failed"], rank: int) -> None:
        """For good."""
        self._file(what, rank).touch()

    def gone(self, rank: int) -> bool:
        """Whether the others go on without ``rank``, as far as has been said."""
        return self._file("gone", rank).exists()

    def awaited(self, rank: int) -> bool:
        """`gone`, once there is a word about ``rank``; False where there is none within `PATIENCE_S`."""
        end = time.monotonic() + PATIENCE_S
        while not self.gone(rank):
            if self._file("failed", rank).exists() or time.monotonic() > end:
                return False
            time.sleep(NAP_S)
        return True

    def _file(self, what: Literal["gone", "failed"], rank: int) -> Path:
        return Path(f"{self._rendezvous}-{what}-{rank}")
