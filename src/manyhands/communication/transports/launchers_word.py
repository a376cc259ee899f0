"""What a launcher says of a worker's process that has ended, where no memory is shared: an empty file in its folder.

``gone-3``: rank 3 was killed and the others go on. ``failed-3``: they do not. A file is there or it is not, so that all
who look after it was written see the same; a connection that breaks is noticed by its two ends alone, at two moments.
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
    """Said and heard in the folder of ``rendezvous``; ranks are those of the world."""

    def __init__(self, rendezvous: str | os.PathLike[str]) -> None:
        self._folder = Path(rendezvous).parent

    def say(self, what: Literal["gone", "failed"], rank: int) -> None:
        """For good."""
        (self._folder / f"{what}-{rank}").touch()

    def gone(self, rank: int) -> bool:
        """Whether the others go on without ``rank``, as far as has been said."""
        return (self._folder / f"gone-{rank}").exists()

    def awaited(self, rank: int) -> bool:
        """`gone`, once there is a word about ``rank``; False where there is none within `PATIENCE_S`."""
        end = time.monotonic() + PATIENCE_S
        while not self.gone(rank):
            if (self._folder / f"failed-{rank}").exists() or time.monotonic() > end:
                return False
            time.sleep(NAP_S)
        return True
