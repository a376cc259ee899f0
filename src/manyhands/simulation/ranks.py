"""Ranks as greenlets: the simulated world for many workers in one thread.

Threads that take turns cost an operating system's hand-over at every turn; greenlets are functions of one thread that
are left and gone on with (figures: docs/simulation.md). What torch keeps by the thread goes with the turn here: random
numbers and grad mode. Autograd's own stack cannot, so nothing may communicate inside a backward pass; replicas of whole
models do not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from manyhands.communication.transports.events import Elapsed, Group
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

    def elapse(self, seconds: float, doing: str = "compute") -> None:
        """Let virtual time pass on this rank."""
        clocks, me = self.world.clocks, self.world_rank
        begun = clocks[me]
        clocks[me] = begun + seconds
        if self.world.observe is not None:
            self.world.observe(self, Elapsed(clocks[me], doing, seconds), begun, clocks[me])


class SizedWorld(GreenletWorld):
    """Ranks without numbers: in their symmetric memory floating point has a size only (but float64 has numbers)."""

    numbers = False

    def join(self, group: Group, index: int) -> SizedCommunicator:
        """Rank ``index``'s end of ``group``."""
        return SizedCommunicator(self, group, index)

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See `sized.zeros`."""
        return sized.zeros(numel, dtype)

    def settle(self, comm: InProcessCommunicator) -> None:
        """Let those go first who are earlier by now."""
        clock = self.clocks[comm.world_rank]
        if not self._is_earliest(clock, comm.world_rank):
            self.wait(comm, Elapsed(clock, "to be the earliest", 0.0))
