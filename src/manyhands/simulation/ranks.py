"""Ranks as greenlets: the simulated world for many workers in one thread.

Threads that take turns cost an operating system's hand-over at every turn; greenlets are functions of one thread that
are left and gone on with (figures: docs/simulation.md). What torch keeps by the thread goes with the turn here: random
numbers and grad mode. Autograd's own stack cannot, so nothing may communicate inside a backward pass; replicas of whole
models do not.
"""

from __future__ import annotations

import gc
import heapq
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from manyhands.communication.transports.events import Elapsed, Group, Operation
from manyhands.communication.transports.inprocess import InProcessCommunicator
from manyhands.communication.transports.simulated import SimulatedCommunicator, SimulatedWorld
from manyhands.errors import ManyhandsError, WorkerFailed
from manyhands.simulation import sized


class GreenletWorld(SimulatedWorld):
    """A `SimulatedWorld` of one thread."""

    #: Whether ranks compute anything, so that the state of torch is theirs.
    numbers = True

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
        if not self.numbers:
            self._ranks[chosen].switch()
            return
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

    def elapse(self, seconds: float, doing: str = "compute") -> None:
        """Let virtual time pass on this rank."""
        clocks, me = self.world.clocks, self.world_rank
        begun = clocks[me]
        clocks[me] = begun + seconds
        if self.world.observe is not None:
            self.world.observe(self, Elapsed(clocks[me], doing, seconds), begun, clocks[me])

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        world, me, moved_B = self.world, self.world_rank, x.nbytes
        world.settle(self)
        place = self.group.members[at % self.size]
        asked = Operation(operation, moved_B, 2, (me,), me, place, True, self.context.purpose)
        ends, cost_s = world.charge(asked, (me,))
        world.go_on_at(ends, self, operation, cost_s)
        counters = self.context.counters
        counters.communicate_s += cost_s
        counters.moved_B += moved_B


class SizedWorld(GreenletWorld):
    """Ranks without numbers: in their symmetric memory floating point has a size only (but float64 has numbers)."""

    numbers = False

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """See `World.run`. Nothing that a rank makes refers to itself, so that nobody need look for such things."""
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

    def settle(self, comm: InProcessCommunicator) -> None:
        """Let those go first who are earlier by now."""
        me, ready = comm.world_rank, self._ready
        clock = self.clocks[me]
        if self.failure is not None or (ready and ready[0] < (clock, me)):
            self.go_on_at(clock, comm, "to be the earliest", 0.0)

    def go_on_at(self, at: float, comm: InProcessCommunicator, doing: str, cost_s: float) -> None:
        """`wait` for a time that is known, with nothing but the clock to look at.

        A rank that is lined up already is nobody's to wake.
        """
        me, clocks, ready = comm.world_rank, self.clocks, self._ready
        before = clocks[me]
        if self.failure is None:
            if not ready or (at, me) < ready[0]:
                clocks[me] = at  # the turn stays here
            else:
                turns = self._turns
                clock, chosen, turn = heapq.heapreplace(ready, (at, me, turns[me]))
                while turn != turns[chosen]:
                    clock, chosen, turn = heapq.heappop(ready)
                turns[chosen] = turn + 1
                self._lined_up[chosen] = math.inf
                clocks[chosen] = clock
                if chosen != me:
                    self._ranks[chosen].switch()
        if self.failure is not None:
            raise self.lost(comm, doing)
        waited = at - before - cost_s
        if waited > 0:  # rounding may leave less
            comm.context.counters.wait_s += waited
        if self.observe is not None:
            self.observe(comm, Elapsed(at, doing, cost_s), before, at)
