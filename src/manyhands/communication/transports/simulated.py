"""Ranks in virtual time: real numbers, priced communication, one rank running at a time.

    world = SimulatedWorld(64, price=lambda op: 1e-5 + op.payload_B / 1e9)
    results = world.run(worker)             # worker(comm), ordinary blocking code
    world.clocks                            # where each rank's virtual clock stands

Ranks are threads, but a turn passes between them: it belongs to the rank whose virtual clock is earliest (ties: the
lowest rank) and changes hands only inside an operation or `elapse`. From this follow

- *determinism*: the order of everything, reads of common memory and receives from anyone included, depends on
  virtual times only. A receive from anyone waits until no rank could still send something that arrives earlier;
- *deadlocks are found at once*: when no rank can take the turn, every rank's operation is known and is named;
- *cause before effect*: what a rank sees at virtual time t was written by ranks whose clocks were at most t.

A collective ends ``price(operation)`` after its last rank has come. A send occupies its sender for the price and
arrives then, so that a rank's messages follow each other on its link and nothing overlaps computing (`overlaps` is
False). Allocation and splitting are set-up and cost nothing. `wait_s` and `communicate_s` count virtual seconds.

Random numbers: every rank starts with a copy of the caller's generator state and goes on with a stream of its own,
swapped with the turn; the caller's state is untouched by a run.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from manyhands.communication.transports.events import Elapsed, Event, Group, Operation, Receive, name_ranks
from manyhands.communication.transports.inprocess import InProcessCommunicator, World
from manyhands.errors import BadInput, CommunicationError, Deadlock

#: Set-up, not part of a step.
FREE = frozenset({"allocate", "split"})


class SimulatedCommunicator(InProcessCommunicator):
    """One rank's end of a `SimulatedWorld`; usable only inside its `run`."""

    transport = "simulated"
    world: SimulatedWorld

    @property
    def now(self) -> float:
        """This rank's virtual clock, in seconds."""
        return self.world.clocks[self.world_rank]

    def elapse(self, seconds: float) -> None:
        """Let virtual time pass on this rank: how computing is priced. Ranks that are then earlier run first."""
        if not seconds >= 0:
            raise BadInput(f"elapse({seconds}): virtual time passes forward only; give seconds from 0.")
        if self.world.failure is not None:
            raise self.world.lost(self, "elapse")
        self.world.wait(self, Elapsed(self.now + seconds, f"elapse({seconds})", seconds))

    def _arrived(self, tag: int) -> bool:
        """By this rank's clock: no other that has the turn later sends anything that is here by now."""
        at = Receive(self.group, self.rank, None, tag).due()
        return at is not None and at <= self.now


class SimulatedWorld(World):
    """``size`` ranks on virtual clocks that start at 0; ``price`` says what an operation costs (None: nothing)."""

    def __init__(self, size: int, price: Callable[[Operation], float] | None = None) -> None:
        super().__init__(size)
        self.price = price
        self.clocks = [0.0] * size
        self._turn = [threading.Lock() for _ in range(size)]
        for lock in self._turn:
            lock.acquire()
        # (when it could go on, rank, how many turns it had had): only the entry of the current count is meant, so an
        # earlier event simply adds an entry and the later one is passed over.
        self._ready: list[tuple[float, int, int]] = []
        self._turns = [0] * size
        self._waits: list[tuple[InProcessCommunicator, Event] | None] = [None] * size
        self._active: set[int] = set()
        self._rng: list[Tensor] = []
        self._callers_rng = torch.empty(0)
        self._deadlock = ""
        self._nothing = contextlib.nullcontext()

    def join(self, group: Group, index: int) -> SimulatedCommunicator:
        """Rank ``index``'s end of ``group``."""
        return SimulatedCommunicator(self, group, index)

    def exclusive(self) -> AbstractContextManager[object]:
        """Nothing to do: one rank runs at a time."""
        return self._nothing

    def now(self, rank: int) -> float:
        """Virtual time."""
        return self.clocks[rank]

    def charge(self, operation: Operation, ranks: Sequence[int]) -> tuple[float, float]:
        """The price, counted from when the last of ``ranks`` has come."""
        cost_s = 0.0 if self.price is None or operation.name in FREE else self.price(operation)
        if not cost_s >= 0:
            raise BadInput(f"the price of {operation} is {cost_s}; a price is a number of seconds from 0.")
        return max(self.clocks[rank] for rank in ranks) + cost_s, cost_s

    def wake(self, ranks: Sequence[int]) -> None:
        """Line up those of ``ranks`` whose event has become due."""
        for rank in ranks:
            waits = self._waits[rank]
            if waits is not None:
                self._line_up(rank, waits[1])

    def wait(self, comm: InProcessCommunicator, event: Event) -> None:
        """Pass the turn on, and come back when ``event`` is due and this rank the earliest."""
        me = comm.world_rank
        before = self.clocks[me]
        self._waits[me] = comm, event
        self._line_up(me, event)
        self._pass_turn(me)
        self._waits[me] = None
        if self.failure is not None:
            raise self.lost(comm, str(event))
        comm.counters.wait_s += max(0.0, self.clocks[me] - before - event.cost_s)  # max: rounding

    def lost(self, comm: InProcessCommunicator, doing: str) -> CommunicationError:
        """A deadlock is everybody's; otherwise the peer that failed."""
        return Deadlock(self._deadlock) if self._deadlock else super().lost(comm, doing)

    def _line_up(self, rank: int, event: Event) -> None:
        due = event.due()
        if due is not None:
            heapq.heappush(self._ready, (max(due, self.clocks[rank]), rank, self._turns[rank]))

    def _next(self) -> int | None:
        """Whose turn it is now; None when all have returned."""
        if self.failure is None:
            while self._ready:
                clock, rank, turn = heapq.heappop(self._ready)
                if turn == self._turns[rank]:
                    self._turns[rank] += 1
                    self.clocks[rank] = clock
                    return rank
            if self._active:
                self._deadlock = self._who_waits()
                self.failure = None, self._deadlock
        return min(self._active, default=None)  # a failed world is unwound rank by rank

    def _pass_turn(self, me: int) -> None:
        chosen = self._next()
        if chosen == me:
            return
        assert chosen is not None, "a rank that waits is active"
        self._rng[me] = torch.get_rng_state()
        torch.set_rng_state(self._rng[chosen])
        self._turn[chosen].release()
        self._turn[me].acquire()

    def _who_waits(self) -> str:
        lines = []
        for rank in sorted(self._active):
            waits = self._waits[rank]
            if waits is not None:
                comm, event = waits
                lines.append(
                    f"rank {rank} waits in {event}" + (f" at step {comm.step}" if comm.step is not None else "")
                )
        gone = [rank for rank in range(self.size) if rank not in self._active]
        if gone:
            lines.append(f"{name_ranks(gone)} {'have' if len(gone) > 1 else 'has'} returned")
        return "; ".join(lines)

    # -- the ranks' threads ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._callers_rng = torch.get_rng_state()
        self._rng = [self._callers_rng] * self.size
        self._active = set(range(self.size))
        self._ready = [(self.clocks[rank], rank, self._turns[rank]) for rank in range(self.size)]
        heapq.heapify(self._ready)
        first = self._next()
        assert first is not None, "a world has ranks"
        self._turn[first].release()

    def _enter(self, rank: int) -> None:
        self._turn[rank].acquire()

    def _leave(self, rank: int) -> None:
        self._active.discard(rank)
        chosen = self._next()
        torch.set_rng_state(self._callers_rng if chosen is None else self._rng[chosen])
        if chosen is not None:
            self._turn[chosen].release()
