"""Work units: a job in small parts, of which whoever is free takes the next, and one that dawdles is done twice.

A coordinator's list, without the coordinator (Dean et al. 2012, section 4.2; Dean & Ghemawat 2004, MapReduce, section
3.6 for backup tasks). It lies in memory given from outside and is touched under a lock only:

    own       worker p begins with unit p
    take      the first unit that nobody has begun; if there is none, one that is begun and not finished and has been
              begun least often, at most 1 + ``backups`` times
    finish    the first result of a unit counts; whoever comes later is told so and drops his

Guarantee: of each unit exactly one result counts, whatever the order in which workers come.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class WorkUnits:
    """Which of at most ``most`` units are begun and which are finished; the first ``workers`` have owners."""

    def __init__(
        self,
        most: int,
        workers: int,
        backups: int,
        *,
        allocate: Callable[[int, torch.dtype], Tensor],
        lock: AbstractContextManager[object],
    ) -> None:
        self.most, self._workers, self._backups, self._lock = most, workers, backups, lock
        self._begun = allocate(most, torch.int64).numpy()  # how often
        self._finished = allocate(most, torch.int64).numpy()

    def own(self, rank: int) -> int:
        """Begin with the unit that nobody else takes as long as there are others."""
        with self._lock:
            self._begun[rank] += 1
        return rank

    def take(self, units: int) -> int | None:
        """Begin another of the first ``units``; None: there is nothing left to do."""
        with self._lock:
            free = next((u for u in range(self._workers, units) if not self._begun[u]), None)
            if free is None and self._backups:
                # A unit whose owner has not come yet counts as begun: he is on his way to it.
                late = [u for u in range(units) if not self._finished[u] and self._begun[u] <= self._backups]
                free = min(late, key=lambda u: max(1, self._begun[u]), default=None)
            if free is not None:
                self._begun[free] += 1
            return free

    def finish(self, unit: int) -> bool:
        """Whether this result is the unit's first, and so the one that counts."""
        with self._lock:
            first = not self._finished[unit]
            self._finished[unit] = 1
        return first

    def clear(self) -> None:
        """The next job begins; by one worker, when all have been told that there is nothing left."""
        self._begun[:] = 0
        self._finished[:] = 0
