"""Replicas whose computing takes virtual time: with numbers, and without any.

A strategy asks either as it asks the one that trains. `TimedReplica` computes and then lets the time pass that its
`Pace` says: gradients are taken at the parameters of the beginning of that time and are there at its end, so races are
replayed at their virtual times. `PricedReplica` computes nothing: its pieces have a size and no numbers (`sized`), and
its loss is 0.

Making and reading payloads of compressors takes time, too (`coding`). Not priced: clipping and averaging (a strategy's
own arithmetic), and what memory that stands for a server does to what is pushed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Layout
from manyhands.contract import Batch, Block, Piece, Ready, StateSlice
from manyhands.errors import BadInput
from manyhands.partition.data import DataReplica
from manyhands.simulation.folded import Vector
from manyhands.simulation.pace import Pace

if TYPE_CHECKING:
    from manyhands.simulation.batched import Together


class Clock(Protocol):
    """The end of a simulated world by which time passes."""

    def elapse(self, seconds: Any, doing: str = "compute") -> None:
        """Let it pass."""


class TimedReplica(DataReplica):
    """A real replica in virtual time."""

    pace: Pace
    clock: Clock
    #: What computes the gradients of all workers at once, where that is the same; see `batched`.
    together: Together | None = None

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """See `contract.Replica.gradients`; time passes afterwards."""
        spent = self.compute_s
        found = None if self.together is None else self.together.take(self, batch)
        loss, count = super().gradients(batch, ready) if found is None else self._take(*found)
        seconds = float(self.pace.compute_s(batch.count))
        self.compute_s = spent + seconds
        self.clock.elapse(seconds + self.pace.rest_s)
        return loss, count

    def plain_gradients(self, batch: Batch) -> tuple[Tensor, float]:
        """This worker's alone, and no time passes."""
        return super().gradients(batch)

    def _take(self, loss: Tensor, count: float) -> tuple[Tensor, float]:
        self._decayed = False
        for piece in self.pieces:
            piece.entries = None
        self.count = count
        return loss, count

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """See `contract.Replica.apply`; time passes afterwards."""
        spent = self.update_s
        super().apply(piece, lo, hi)
        seconds = self.pace.update_s(max(hi - lo, 0))
        self.update_s = spent + seconds
        if seconds:
            self.clock.elapse(seconds, "update")

    def coded(self, compressor: Compressor, layout: Layout, encoded: float, decoded: float) -> None:
        """See `contract.Replica.coded`."""
        seconds = self.pace.coding_s(compressor, layout.numel, encoded, decoded)
        if seconds:
            self.clock.elapse(seconds)


@dataclass(frozen=True)
class Sizes:
    """What of a piece is known without numbers."""

    name: str
    group: int
    numel: int
    dtype: torch.dtype
    spans: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, ...], ...] = ()


def sizes_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, numbers: bool = False) -> list[Sizes]:
    """The pieces that a whole model has: one for each parameter group and dtype. Tables count as dense.

    Refuses what cannot do without ``numbers``.
    """
    names = {id(p) for p in model.parameters()}
    chunks: dict[tuple[int, torch.dtype], list[tuple[int, ...]]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.requires_grad and id(p) in names:
                chunks.setdefault((g, p.dtype), []).append(tuple(p.shape))
    found = []
    for (g, dtype), shapes in chunks.items():
        if dtype is torch.float64 and not numbers:
            raise BadInput(
                "sizes only of a model in float64: what strategies agree on is float64, too, and keeps its numbers. "
                "Use float32; or values."
            )
        ends = torch.tensor([math.prod(shape) for shape in shapes]).cumsum(0).tolist()
        spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
        found.append(Sizes(f"group{g}.{str(dtype)[6:]}", g, ends[-1], dtype, spans, tuple(shapes)))
    return found


#: The loss and every norm, one for all ranks: it stays in the cache while thousands take turns.
_NOTHING = torch.zeros(())


class PricedReplica:
    """A replica without numbers, in virtual time."""

    def __init__(
        self,
        sizes: Sequence[Sizes],
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        pace: Pace,
        clock: Clock,
        common: bool,
        clip: float | None = None,
        shares: int = 1,
    ) -> None:
        self.optimizer, self.clip = optimizer, clip
        self.blocks: dict[str, Block] = {}
        self.buffers: list[Tensor] = []
        self.watching = False
        self.runs = 1  # time passes at once
        self.compute_s = self.update_s = self.count = 0.0
        self._pace, self._clock, self._shares = pace, clock, shares
        self._comm = comm
        #: Of so many, every rank's part; where this is the replica of all ranks at once.
        self.samples_of_all: Callable[[int], Vector] | None = None
        self.pieces = [
            Piece(
                comm.allocate(s.numel, s.dtype, common=common),
                comm.allocate(s.numel, s.dtype),
                frozenset({"data"}),
                name=s.name,
                group=s.group,
                spans=s.spans,
                shapes=s.shapes,
            )
            for s in sizes
        ]

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """See `contract.Replica.gradients`: time passes."""
        count = batch.count if self.samples_of_all is None else self.samples_of_all(batch.total or 0)
        seconds = self._pace.compute_s(count)
        self.compute_s = self.compute_s + seconds
        self._clock.elapse(seconds + self._pace.rest_s)
        self.count = float(batch.count)
        return _NOTHING, self.count

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """See `contract.Replica.apply`: time passes."""
        seconds = self._pace.update_s(max(hi - lo, 0))
        self.update_s += seconds
        if seconds:
            self._clock.elapse(seconds, "update")

    def coded(self, compressor: Compressor, layout: Layout, encoded: float, decoded: float) -> None:
        """See `contract.Replica.coded`: time passes."""
        seconds = self._pace.coding_s(compressor, layout.numel, encoded, decoded)
        if seconds:
            self._comm.counters.compression.coding_s += seconds
            self._clock.elapse(seconds)

    def share(self, batch: Batch) -> float:
        """See `contract.Replica.share`."""
        return 1 / self._shares if not batch.total else batch.count / batch.total

    def reached(self) -> dict[int, Tensor]:
        """Everything is in use."""
        return {}

    def settle(self, reached: Mapping[int, Tensor]) -> None:
        """Nothing to settle."""

    def regroup(self, comm: Communicator) -> None:
        """Nobody is lost here."""

    def before_lookup(self, piece: int, tell: Callable[[Tensor], None]) -> None:
        """No piece is sparse."""

    def add_l2(self, bounds: Sequence[tuple[int, int]]) -> None:
        """No numbers."""

    def norm(self, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """No numbers."""
        return _NOTHING

    def own_norm(self) -> Tensor:
        """No numbers."""
        return _NOTHING

    def any_of_us(self, flag: bool) -> bool:
        """A whole model has no others."""
        return flag

    def optimizer_state(self) -> list[StateSlice]:
        """None."""
        return []

    def load_optimizer_state(self, state: Sequence[StateSlice]) -> None:
        """None."""

    def format_state(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_format_state(self, state: Mapping[str, Any]) -> None:
        """None."""
