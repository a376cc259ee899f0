"""Which part of one of the user's tensors a worker holds, where the model is cut (survey §V).

A cut takes, of some dims, ranges of indices, and lays them one after the other: half the rows of a matrix, or of each
of the three matrices that lie stacked in a fused projection. Or it takes a run of the elements, wherever rows begin and
end (sharded data parallelism), and is flat. Checkpoints, exports and optimizer state are in terms of
whole tensors, so that none of them depends on the mesh.

A worker may hold *copies* besides, of what is another's or is here already: trained like the first of them, so that
they stay equal to it, but neither saved nor counted in a norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]

#: In the place of a dim: ranges of all elements in memory order, seen as one dim.
FLAT = -1


@dataclass(frozen=True)
class Block:
    """Of a tensor of ``shape``: the ranges ``[lo, hi)`` of each dim in ``ranges``; other dims are whole.

    Ranges of the dim `FLAT` are of all elements, and then the only ones; such a part has one dim, or none where it is
    all of a tensor that has none.

    What ``copies`` names in the same way lies behind it, both then flat; alone, where ``ranges`` name nothing. Ranks
    along ``axis`` of the mesh hold other parts. ``order``: the whole's dims from slowest to fastest in memory, where
    that is not the order they come in (channels-last).
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[int, Ranges], ...]
    copies: tuple[tuple[int, Ranges], ...] = ()
    axis: str = field(default="tensor", kw_only=True)
    order: tuple[int, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, whole: Tensor, dim: int, ranges: Sequence[tuple[int, int]]) -> Block:
        """Ranges of one dim."""
        return cls(tuple(whole.shape), ((dim, tuple((lo, hi) for lo, hi in ranges)),), order=_order(whole))

    @classmethod
    def run(cls, whole: Tensor, lo: int, hi: int, *, axis: str) -> Block:
        """Elements ``[lo, hi)`` in memory order."""
        return cls(tuple(whole.shape), ((FLAT, ((lo, hi),)),), axis=axis, order=_order(whole))

    @property
    def own(self) -> int:
        """How many elements it has that are no copies: the first ones."""
        return self._count(self.ranges)

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.own + (self._count(self.copies) if self.copies else 0)

    def _count(self, among: tuple[tuple[int, Ranges], ...]) -> int:
        taken = {d: sum(hi - lo for lo, hi in ranges) for d, ranges in among}
        return taken[FLAT] if FLAT in taken else math.prod((dict(enumerate(self.shape)) | taken).values())

    def take(self, whole: Tensor) -> Tensor:
        """The part, contiguous, as memory of its own."""
        if self.ranges and self.ranges[0][0] == FLAT:
            ((lo, hi),) = self.ranges[0][1]
            part = (whole.permute(self.order) if self.order else whole).reshape(-1)[lo:hi].clone()
            return part.view(()) if not self.shape and hi > lo else part
        if not self.copies:
            return _taken(whole, self.ranges)
        copies = _taken(whole, self.copies)
        return torch.cat([_taken(whole, self.ranges).view(-1), copies.view(-1)]) if self.own else copies

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the part, of its own shape, to where it belongs; but no copies."""
        places = self.take(torch.arange(math.prod(self.shape)).view(self.shape)).view(-1)
        whole.view(-1)[places[: self.own]] = part.reshape(-1)[: self.own]

    def places(self) -> Tensor:
        """Where in the whole's memory each element of the part lies, in the part's memory order: ``(numel,)``."""
        order = self.order or tuple(range(len(self.shape)))
        in_memory = torch.arange(math.prod(self.shape)).view([self.shape[d] for d in order])
        return self.take(in_memory.permute([order.index(d) for d in range(len(order))])).view(-1)


def _order(whole: Tensor) -> tuple[int, ...]:
    """See `Block.order`; of memory with gaps or overlaps nothing, as a replica lays that out anew."""
    if whole.is_contiguous():
        return ()
    order = sorted(range(whole.dim()), key=lambda d: whole.stride(d), reverse=True)
    return tuple(order) if whole.permute(order).is_contiguous() else ()


def _taken(whole: Tensor, among: tuple[tuple[int, Ranges], ...]) -> Tensor:
    part = whole
    for dim, ranges in among:
        part = (
            torch.cat([part.narrow(dim, lo, hi - lo) for lo, hi in ranges], dim) if ranges else part.narrow(dim, 0, 0)
        )
    return part.contiguous() if part is not whole else part.clone(memory_format=torch.contiguous_format)
