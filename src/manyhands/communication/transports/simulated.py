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
False). What ``queue`` gives one name (a server, a link) is served one after the other in the order of asking; who comes
while it is busy waits. Allocation and splitting are set-up and cost nothing. `wait_s` and `communicate_s` count virtual
seconds. ``observe`` is told of every wait that is over.

Random numbers: every rank starts with a copy of the caller's generator state and goes on with a stream of its own,
swapped with the turn; the caller's state is untouched by a run.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from manyhands.communication.transports.events import Elapsed, Event, Group, Operation, Receive, name_ranks
from manyhands.communication.transports.inprocess import InProcessCommunicator, World
from manyhands.errors import BadInput, CommunicationError, Deadlock

Observer = Callable[[InProcessCommunicator, Event, float, float], None]

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

    def elapse(self, seconds: float, doing: str = "compute") -> None:
        """Let virtual time pass on this rank: how computing is priced. Ranks that are then earlier run first."""
        if not seconds >= 0:
            raise BadInput(f"elapse({seconds}): virtual time passes forward only; give seconds from 0.")
        if self.world.failure is not None:
            raise self.world.lost(self, doing)
        self.world.wait(self, Elapsed(self.now + seconds, doing, seconds))

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        world, me = self.world, self.world_rank
        if world.failure is not None:
            raise world.lost(self, operation)
        world.settle(self)
        place = self.group.members[at % self.size]
        asked = Operation(operation, x.nbytes, 2, (me,), me, place, True, self.context.purpose)
        ends, cost_s = world.charge(asked, (me,))
        world.wait(self, Elapsed(ends, operation, cost_s))
        counters = self.counters
        counters.communicate_s += cost_s
        counters.moved_B += x.nbytes

    def _arrived(self, tag: int) -> bool:
        """By this rank's clock: no other that has the turn later sends anything that is here by now."""
        self.world.settle(self)
        at = Receive(self.group, self.rank, None, tag).due()
        return at is not None and at <= self.now


class SimulatedWorld(World):
    """``size`` ranks on virtual clocks that start at 0; ``price`` says what an operation costs (None: nothing).

    ``queue`` names what an operation occupies as long as it lasts (None: nothing that others would wait for).
    ``observe(comm, event, begun, ended)`` is called on a rank when it goes on, with what it waited for.
    """

    def __init__(
        self,
        size: int,
        price: Callable[[Operation], float] | None = None,
        *,
        queue: Callable[[Operation], Hashable | None] | None = None,
        observe: Observer | None = None,
    ) -> None:
        super().__init__(size)
        self.price, self.queue, self.observe = price, queue, observe
        self.clocks = [0.0] * size
        self._free_at: dict[Hashable, float] = {}
        self._turn = [threading.Lock() for _ in range(size)]
        for lock in self._turn:
            lock.acquire()
        # (when it could go on, rank, how many waits are behind it): only the entry of the current count is meant, so an
        # earlier event simply adds an entry and the later one is passed over.
        self._ready: list[tuple[float, int, int]] = []
        self._turns = [0] * size
        self._lined_up = [math.inf] * size  # for when, in the wait under way
        self._waits: list[tuple[InProcessCommunicator, Event] | None] = [None] * size
        self._active: set[int] = set()
        self._rng: list[Tensor] = []
        self._callers_rng = torch.empty(0)
        self._deadlock = ""
        self._nothing = threading.RLock()  # nobody else ever has it; entering it takes a tenth of a `nullcontext`

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
        return self._begin(operation, max([self.clocks[rank] for rank in ranks]))

    def _begin(self, operation: Operation, begins: float) -> tuple[float, float]:
        cost_s = 0.0 if self.price is None or operation.name in FREE else self.price(operation)
        if not cost_s >= 0:
            raise BadInput(f"the price of {operation} is {cost_s}; a price is a number of seconds from 0.")
        occupied = None if self.queue is None or not cost_s else self.queue(operation)
        if occupied is not None:
            free_at = self._free_at.get(occupied, 0.0)
            if free_at > begins:
                begins = free_at
            self._free_at[occupied] = begins + cost_s
        return begins + cost_s, cost_s

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
        due = event.due()
        now = before if due is None or due < before else due
        if due is not None and self.failure is None and self._is_earliest(now, me):
            self.clocks[me] = now  # the turn stays here
        else:
            self._waits[me] = comm, event
            self._line_up(me, event)
            self._pass_turn(me)
            self._waits[me] = None
            self._turns[me] += 1
            self._lined_up[me] = math.inf
            if self.failure is not None:
                raise self.lost(comm, str(event))
            now = self.clocks[me]
        waited = now - before - event.cost_s
        if waited > 0:  # rounding may leave less
            comm.counters.wait_s += waited
        if self.observe is not None:
            self.observe(comm, event, before, now)

    def settle(self, comm: InProcessCommunicator) -> None:
        """Before ``comm``'s rank does what others may see or have done: be the earliest."""
        return

    def lost(self, comm: InProcessCommunicator, doing: str) -> CommunicationError:
        """A deadlock is everybody's; otherwise the peer that failed."""
        return Deadlock(self._deadlock) if self._deadlock else super().lost(comm, doing)

    def _is_earliest(self, clock: float, rank: int) -> bool:
        return not self._ready or (clock, rank) < self._ready[0]

    def _line_up(self, rank: int, event: Event) -> None:
        due, at = event.due(), self.clocks[rank]
        if due is None:
            return
        if due > at:
            at = due
        if at < self._lined_up[rank]:
            self._lined_up[rank] = at
            heapq.heappush(self._ready, (at, rank, self._turns[rank]))

    def _next(self) -> int | None:
        """Whose turn it is now; None when all have returned."""
        if self.failure is None:
            while self._ready:
                clock, rank, turn = heapq.heappop(self._ready)
                if turn == self._turns[rank]:
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
