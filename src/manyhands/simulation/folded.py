"""All ranks in one: a worker whose clock is a vector, for strategies whose workers all do the same.

Ranks that call the same collectives in the same order, and nothing else, differ in their clocks alone. So one of them
runs the strategy's code, and of every rank only the time is kept:

    compute      T ← T + c            c the vector of what computing costs each rank
    collective   T ← max T + price

(max-plus, Baccelli, Cohen, Olsder & Quadrat 1992). Where the ranks' costs are equal, too, one clock does for all.

Guarantee: the same clocks as with every rank run by itself, up to rounding of sums, if no rank's slice of an update is
longer than rank 0's, whose length counts for all. Whatever is not a collective of all (a message, a lock, a board, a
pull) raises `NotAlike`, and the ranks have to be run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.communication.communicator import DONE, Board, Communicator, Lock, Received, Window, Work
from manyhands.communication.reduction import check_veto
from manyhands.communication.transports.events import Operation
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.errors import ManyhandsError
from manyhands.simulation import sized

Vector = NDArray[np.float64]
#: ``(name, begun, waited, ended)``, a number a rank.
FoldedObserver = Callable[[str, Vector, Vector, Vector], None]


class NotAlike(ManyhandsError):
    """This rank has done what others do otherwise: run them one by one."""


class FoldedCommunicator(Communicator):
    """Rank 0 of ``size``, and the clocks of all: one for each (``clocks`` has that length), or one for all."""

    def __init__(
        self,
        size: int,
        price: Callable[[Operation], float],
        *,
        alike: bool,
        shares_memory: bool = True,
        observe: FoldedObserver | None = None,
    ) -> None:
        super().__init__(0, size)
        self.transport = "simulated"  # type: ignore[misc]
        self.shares_memory = shares_memory  # type: ignore[misc]
        self.price, self.observe = price, observe
        self.clocks = np.zeros(1 if alike else size)
        self.wait_s = np.zeros_like(self.clocks)  # of every rank; `counters` has rank 0's
        self._everyone = tuple(range(size))
        self._common: list[Tensor] = []

    @property
    def now(self) -> float:
        """Rank 0's virtual clock."""
        return float(self.clocks[0])

    def elapse(self, seconds: float | Vector, doing: str = "compute") -> None:
        """Let virtual time pass on all ranks."""
        begun = self.clocks
        self.clocks = begun + seconds
        if self.observe is not None:
            self.observe(doing, begun, np.zeros_like(begun), self.clocks)

    def is_common(self, x: Tensor) -> bool:
        """Whether ``x`` lies in memory that all ranks see as one copy."""
        return any(x.untyped_storage()._cdata == one.untyped_storage()._cdata for one in self._common)

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        made = sized.zeros(numel, dtype)
        if common:
            self._common.append(made)
        return made

    def _meet(self, name: str, x: Tensor | None, root: int | None = None) -> None:
        common = x is not None and bool(self._common) and self.is_common(x)
        n = 0 if x is None else x.nbytes
        operation = Operation(name, n, self.size, self._everyone, root, None, common, self.context.purpose)
        cost_s, begun = self.price(operation), self.clocks
        last = float(begun.max())
        waited = last - begun
        self.wait_s += waited
        self.counters.wait_s += float(waited[0])
        self.counters.communicate_s += cost_s
        self.clocks = np.full_like(begun, last + cost_s)
        if self.observe is not None:
            self.observe(name, begun, waited, self.clocks)

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        self._meet("all_reduce", x)
        self._sum(x, weight)
        return DONE

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        self._meet("reduce_scatter", x)
        self._sum(x, weight)

    def _sum(self, x: Tensor, weight: float | None) -> None:
        """What all ranks have is what this one has."""
        check_veto([weight])
        if weight is None and not x.is_meta:
            x.mul_(self.size)

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        self._meet("all_gather", x)
        if not x.is_meta:
            own = x[slice(*bounds[0])].clone()
            for lo, hi in bounds[1:]:
                x[lo:hi] = own[: hi - lo]
        return DONE

    def _all_to_all(self, x: Tensor) -> Tensor:
        self._meet("all_to_all", x)
        return x.clone() if x.is_meta else addressed(x, 0, self.size)

    def _broadcast(self, x: Tensor, root: int) -> Work:
        self._meet("broadcast", x, root)
        return DONE

    def _barrier(self) -> None:
        self._meet("barrier", None)

    def _alone(self) -> Communicator:
        return SingleCommunicator()

    def _split(self, color: int) -> Communicator:
        raise NotAlike("split")

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        raise NotAlike("send")

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        raise NotAlike("recv")

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        raise NotAlike(operation)

    def locks(self, count: int) -> list[Lock]:
        """Not here."""
        raise NotAlike("locks")

    def board(self) -> Board:
        """Not here."""
        raise NotAlike("board")

    def window(self, size_B: int) -> Window:
        """Not here."""
        raise NotAlike("window")


def addressed(x: Tensor, rank: int, size: int) -> Tensor:
    """What `all_to_all` gives ``rank`` where all have the same: from each the chunk for this rank."""
    return x.view(size, -1)[rank].repeat(size)
