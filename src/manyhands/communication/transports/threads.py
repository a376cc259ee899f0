"""Workers are threads of one process: "Method 1" of a parallel-SGD course project of 2018.

    world = ThreadsWorld(4)
    losses = world.run(worker, task)        # worker(comm, task) on four threads

Nothing is copied to start a worker, anything may be handed to one (a model that cannot be imported, say), and common
memory is simply one tensor. The price: Python's interpreter lock lets one worker at a time run Python, so it pays only
when operations are large; and all workers share torch's one global random generator, so a model that draws random
numbers is not reproducible here.

Ranks run freely. Each sleeps on a condition of its own; all conditions share one lock, which is never held while data
moves. Every wait has a deadline and ends at once when the world is aborted.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from manyhands.communication.transports.events import Event, Group, Operation
from manyhands.communication.transports.inprocess import InProcessCommunicator, World
from manyhands.errors import DeadlineExceeded


class ThreadsCommunicator(InProcessCommunicator):
    """One worker's end; made by `ThreadsWorld.communicator`."""

    transport = "threads"


class ThreadsWorld(World):
    """``size`` ranks on threads. Either `run` starts them, or one's own threads take a `communicator` each.

    In the second case, call `abort` from a thread that fails, so that its peers need not wait for their deadline.
    """

    def __init__(self, size: int, *, timeout_s: float = 60.0) -> None:
        super().__init__(size, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._conditions = [threading.Condition(self._lock) for _ in range(size)]
        self._stamps = itertools.count()

    def join(self, group: Group, index: int) -> ThreadsCommunicator:
        """Rank ``index``'s end of ``group``."""
        return ThreadsCommunicator(self, group, index)

    def exclusive(self) -> AbstractContextManager[object]:
        """Hold the world's lock."""
        return self._lock

    def now(self, rank: int) -> float:
        """Wall time."""
        return time.perf_counter()

    def charge(self, operation: Operation, ranks: Sequence[int]) -> tuple[float, float]:
        """Operations take the time they take; the result only numbers them, so that messages arrive in order."""
        return float(next(self._stamps)), 0.0

    def wake(self, ranks: Sequence[int]) -> None:
        """Let ``ranks`` look again."""
        for rank in ranks:
            self._conditions[rank].notify_all()

    def wait(self, comm: InProcessCommunicator, event: Event) -> None:
        """Sleep until ``event`` is due, the world is aborted or the deadline has passed."""
        with self._lock:
            if event.due() is not None:
                return
            end = time.monotonic() + comm.timeout_s
            with comm._waiting():
                while event.due() is None:
                    if self.failure is not None:
                        raise self.lost(comm, str(event))
                    left = end - time.monotonic()
                    if left <= 0:
                        event.give_up(comm.world_rank)
                        raise DeadlineExceeded(comm.world_rank, event.missing(), comm.step, comm.timeout_s, str(event))
                    self._conditions[comm.world_rank].wait(left)
