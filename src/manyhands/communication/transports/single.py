"""One rank alone: every collective is trivially itself, and a message is one to oneself.

The serial program is thus the parallel one with one worker, and needs no branch anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from manyhands.communication.transports.events import Event, Group, Operation
from manyhands.communication.transports.inprocess import InProcessCommunicator, World
from manyhands.errors import Deadlock


class SingleCommunicator(InProcessCommunicator):
    """Rank 0 of 1."""

    transport = "single"

    def __init__(self, *, timeout_s: float = 60.0, within: tuple[World, Group] | None = None) -> None:
        if within is None:
            world = _SingleWorld(1, timeout_s=timeout_s)
            within = world, world.everyone
        super().__init__(*within, 0)


class _SingleWorld(World):
    """Nobody else is there: what is not due now never will be."""

    def __init__(self, size: int, *, timeout_s: float) -> None:
        super().__init__(size, timeout_s=timeout_s)
        self._stamps = itertools.count()

    def join(self, group: Group, index: int) -> InProcessCommunicator:
        return SingleCommunicator(within=(self, group))

    def exclusive(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def now(self, rank: int) -> float:
        return time.perf_counter()

    def charge(self, operation: Operation, ranks: Sequence[int]) -> tuple[float, float]:
        return float(next(self._stamps)), 0.0

    def wake(self, ranks: Sequence[int]) -> None:
        return

    def wait(self, comm: InProcessCommunicator, event: Event) -> None:
        if event.due() is None:
            raise Deadlock(f"rank 0 waits in {event}, and there is no other rank that could end it")
