"""Ranks as greenlets: the simulated world for many workers in one thread.

Threads that take turns cost an operating system's hand-over at every turn; greenlets are functions of one thread that
are left and gone on with (figures: docs/simulation.md). What torch keeps by the thread goes with the turn here: random
numbers and grad mode. Autograd's own stack cannot, so nothing may communicate inside a backward pass; replicas of whole
models do not.
"""

from __future__ import annotations

import gc
import heapq
import traceback
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from manyhands.communication.communicator import Board, Lock
from manyhands.communication.transports.events import Counters, Elapsed, Group, Operation, Turns
from manyhands.communication.transports.inprocess import InProcessBoard, InProcessCommunicator, InProcessLock
from manyhands.communication.transports.simulated import SimulatedCommunicator, SimulatedWorld
from manyhands.errors import ManyhandsError, WorkerFailed
from manyhands.simulation import sized


class GreenletWorld(SimulatedWorld):
    """A `SimulatedWorld` of one thread."""

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """See `World.run`; of our own errors the first is raised as it is."""
        results: dict[int, Any] = {}
        failed: list[tuple[int, BaseException, int | None]] = []
        callers = torch.get_rng_state(), torch.is_grad_enabled()

        def body(rank: int) -> None:
            hub.switch()
            comm = self.communicator(rank)
            self._set(*callers)
            try:
                results[rank] = fn(comm, *args)
            except BaseException as e:
                if not failed:
                    failed.append((rank, e, comm.step))
                self.abort(rank, f"{type(e).__name__}: {e}")
            self._active.discard(rank)

        hub = getcurrent()
        self._ranks = [greenlet(lambda rank=rank: body(rank), parent=hub) for rank in range(self.size)]
        self._ready = [(self.clocks[rank], rank, self._turns[rank]) for rank in range(self.size)]
        self._active = set(range(self.size))
        for each in self._ranks:
            each.switch()  # as far as its first line: whoever starts in another's stack begins at the depth of that
        try:
            while (chosen := self._next()) is not None:
                self._ranks[chosen].switch()  # comes back when some rank has returned
        finally:
            self._ranks.clear()
            self.common.clear()
            self._set(*callers)
        if not failed:
            return [results[rank] for rank in range(self.size)]
        rank, error, step = failed[0]
        if isinstance(error, ManyhandsError) or not isinstance(error, Exception):
            raise error
        text = "".join(traceback.format_exception(error))
        raise WorkerFailed(rank, step, f"{type(error).__name__}: {error}", text) from error

    def _pass_turn(self, me: int) -> None:
        chosen = self._next()
        if chosen == me:
            return
        assert chosen is not None, "a rank that waits is active"
        mine = torch.get_rng_state(), torch.is_grad_enabled()
        self._ranks[chosen].switch()
        self._set(*mine)

    @staticmethod
    def _set(generator: Tensor, grad: bool) -> None:
        torch.set_rng_state(generator)
        torch.set_grad_enabled(grad)


class SizedCommunicator(SimulatedCommunicator):
    """Whose time passes without a change of turns: where nothing is computed nobody can tell before it next acts."""

    world: SizedWorld

    @property
    def serves_in_line(self) -> bool:  # type: ignore[override]
        """One after the other, at no cost to who waited."""
        return self.world.queue is not None and not self.world.woken_s

    def elapse(self, seconds: float, doing: str = "compute") -> None:
        """Let virtual time pass on this rank."""
        world, me = self.world, self.world_rank
        begun = world.clocks[me]
        ended = world.clocks[me] = begun + seconds
        if world.observe is not None:
            world.observe(self, Elapsed(ended, doing, seconds), begun, ended)

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        me, moved_B, context = self.world_rank, x.nbytes, self.context
        place = self.group.members[at % self.size]
        cost_s = self.world.do(self, Operation(operation, moved_B, 2, (me,), me, place, True, context.purpose))
        counters = context.counters
        counters.communicate_s += cost_s
        counters.moved_B += moved_B

    def _lock(self, turns: Turns) -> Lock:
        return SizedLock(self, turns)

    def _board(self, counters: Counters) -> Board:
        return SizedBoard(self, counters)


class SizedLock(InProcessLock):
    """Taken with one look where nobody has it."""

    def __enter__(self) -> None:
        comm, turns = self._comm, self._turns
        comm.world.settle(comm)
        if turns.queue or turns.free_at > comm.world.now(comm.world_rank):
            super().__enter__()
        else:
            turns.queue.append(self._turn.me)

    def __exit__(self, *_: object) -> None:
        turns = self._turns
        if len(turns.queue) > 1:
            super().__exit__()
        else:
            turns.queue.popleft()
            turns.free_at = self._comm.world.now(self._comm.world_rank)


class SizedBoard(InProcessBoard):
    """Whose counters are far enough as a rule."""

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """See `Board.wait`."""
        counters = self._counters
        self._comm.world.settle(self._comm)
        if counters.least >= least:
            return counters.least
        return super().wait(least, doing, rank=rank)


class SizedWorld(GreenletWorld):
    """Ranks without numbers: in their symmetric memory floating point has a size only (but float64 has numbers)."""

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """See `World.run`. Nothing that a rank makes refers to itself, so that nobody need look for such things."""
        self._asked: list[Operation | None] = [None] * self.size  # what each rank does when it is the earliest
        self._cost_s = [0.0] * self.size  # of what each rank has begun last
        collecting = gc.isenabled()
        gc.disable()
        try:
            return super().run(fn, *args)
        finally:
            if collecting:
                gc.enable()

    def join(self, group: Group, index: int) -> SizedCommunicator:
        """Rank ``index``'s end of ``group``."""
        return SizedCommunicator(self, group, index)

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See `sized.zeros`."""
        return sized.zeros(numel, dtype)

    def do(self, comm: InProcessCommunicator, operation: Operation) -> float:
        """Begin ``operation`` when ``comm``'s rank is the earliest, and return when it is over: what it costs."""
        me = comm.world_rank
        before = at = self.clocks[me]
        if self.failure is None:
            ready = self._ready
            if ready and ready[0] < (before, me):
                self._asked[me] = operation
            else:
                at, self._cost_s[me] = self._begin(operation, before)
            self._go_on_at(at, me)
        cost_s = self._cost_s[me]
        self._gone_on(comm, operation.name, before, cost_s)
        return cost_s

    def settle(self, comm: InProcessCommunicator) -> None:
        """Let those go first who are earlier by now."""
        me, ready = comm.world_rank, self._ready
        clock = self.clocks[me]
        if self.failure is None:
            if not ready or (clock, me) < ready[0]:
                return
            self._go_on_at(clock, me)
        self._gone_on(comm, "to be the earliest", clock, 0.0)

    def _go_on_at(self, at: float, me: int) -> None:
        """Wait for a time that is known, with nothing but the clock to look at.

        A rank that is lined up already is nobody's to wake.
        """
        ready = self._ready
        if not ready or (at, me) < ready[0]:
            self.clocks[me] = at  # the turn stays here
        else:
            heapq.heappush(ready, (at, me, self._turns[me]))
            self._pass_turn(me)

    def _pass_turn(self, me: int) -> None:
        """As ever; but torch's state is nobody's where nothing is computed."""
        chosen = self._next()
        if chosen != me:
            assert chosen is not None, "a rank that waits is active"
            self._ranks[chosen].switch()

    def _next(self) -> int | None:
        """As ever; but what a rank has asked for begins at its turn, and it is gone on with when that is over."""
        ready = self._ready
        while ready and self.failure is None:
            clock, rank, turn = heapq.heappop(ready)
            if turn == self._turns[rank]:
                self.clocks[rank] = clock
                operation = self._asked[rank]
                if operation is None:
                    return rank
                self._asked[rank] = None
                ends, self._cost_s[rank] = self._begin(operation, clock)
                heapq.heappush(ready, (ends, rank, turn))
        return super()._next()

    def _gone_on(self, comm: InProcessCommunicator, doing: str, before: float, cost_s: float) -> None:
        """Account for a wait that is over."""
        if self.failure is not None:
            raise self.lost(comm, doing)
        now = self.clocks[comm.world_rank]
        waited = now - before - cost_s
        if waited > 0:  # rounding may leave less
            comm.context.counters.wait_s += waited
        if self.observe is not None:
            self.observe(comm, Elapsed(now, doing, cost_s), before, now)
