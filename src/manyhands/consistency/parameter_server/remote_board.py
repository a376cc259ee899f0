"""A board of counters on the first server: how far each worker is, and waiting until they are far enough.

What `communication.board` does in shared memory, over messages: a worker that has to wait is answered late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.communication.board import NEVER
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.requests import ANSWER, REQUEST, Ask, header
from manyhands.errors import DeadlineExceeded, PeerLost

#: Whom a WAIT waits for, if not for one rank.
OTHERS, ANY = -1, -2


def far_enough(counters: Sequence[int], least: int, of: int, me: int) -> bool:
    """Whether the counters of all ``OTHERS`` than ``me``, of ``ANY`` rank, or of rank ``of`` are at least ``least``."""
    if of == ANY:
        return any(least <= c < NEVER for c in counters)
    return all(c >= least for p, c in enumerate(counters) if (p == of if of >= 0 else p != me))


class RemoteBoard:
    """See `communicator.Board`: the counters lie on the first server."""

    def __init__(self, comm: Communicator, number: int) -> None:
        assert comm.servers is not None
        # Workers are numbered as they are now, also when some are gone.
        self._comm, self._world, self._number = comm, comm.servers, number

    def post(self, value: int) -> None:
        """Set this rank's counter."""
        self._ask(header(Ask.POST, self._number, read=value))

    def read(self) -> list[int]:
        """All counters, in rank order."""
        return self._wait(0, OTHERS, "read a board")

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """The least of all counters, once those of the other ranks (or that of ``rank``) are at least ``least``."""
        return min(self._wait(least, OTHERS if rank is None else rank, doing))

    def wait_for_one(self, least: int, doing: str) -> None:
        """Return when one of them is at least ``least``."""
        self._wait(least, ANY, doing)

    def _ask(self, request: Tensor) -> None:
        with self._comm.counting("service"):
            self._world.send(request, self._comm.size, REQUEST).wait()

    def _wait(self, least: int, of: int, doing: str) -> list[int]:
        comm = self._comm
        self._ask(header(Ask.WAIT, self._number, read=least, count=of))
        counters = self._told()
        if far_enough(counters, least, of, comm.rank):
            return counters
        try:
            return self._told()
        except DeadlineExceeded as e:
            behind = [p for p, c in enumerate(counters) if c < least and (p == of if of >= 0 else p != comm.rank)]
            names = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
            raise DeadlineExceeded(e.rank, names, e.step, e.seconds, doing) from e

    def _told(self) -> list[int]:
        counters = torch.zeros(self._comm.size, dtype=torch.int64)
        result: list[int] = self._world.recv(counters, self._comm.size, ANSWER).tensor.tolist()
        return result


class Boards:
    """The server's end of all boards: what workers have posted, and who waits for more."""

    def __init__(self, world: Communicator, workers: int) -> None:
        self._world, self._workers = world, workers
        self._counters: dict[int, list[int]] = {}
        self._waiting: list[tuple[int, int, int, int]] = []
        self._lost: set[int] = set()

    def post(self, worker: int, board: int, value: int) -> None:
        """Note a counter, and tell those who have waited for it."""
        self._of(board)[worker] = value
        self._tell_those_who_waited()

    def wait(self, worker: int, board: int, least: int, of: int) -> None:
        """Tell the counters now, so that whoever waits in vain knows for whom, and once they are far enough."""
        self._tell(worker, board)
        if not far_enough(self._of(board), least, of, worker):
            self._waiting.append((worker, board, least, of))

    def lose(self, worker: int) -> None:
        """Nobody waits for ``worker`` any more, and it waits for nobody."""
        self._lost.add(worker)
        self._waiting = [w for w in self._waiting if w[0] != worker]
        for counters in self._counters.values():
            counters[worker] = NEVER
        self._tell_those_who_waited()

    def _tell_those_who_waited(self) -> None:
        for waiter in [w for w in self._waiting if far_enough(self._of(w[1]), w[2], w[3], w[0])]:
            self._waiting.remove(waiter)
            try:
                self._tell(waiter[0], waiter[1])
            except PeerLost:
                if not self._world.goes_on_without(waiter[0]):
                    raise
                # The server hears of it where it listens, and then calls `lose`; this is about the others.

    def _of(self, board: int) -> list[int]:
        return self._counters.setdefault(board, [NEVER if p in self._lost else 0 for p in range(self._workers)])

    def _tell(self, worker: int, board: int) -> None:
        self._world.send(torch.tensor(self._of(board)), worker, ANSWER).wait()
