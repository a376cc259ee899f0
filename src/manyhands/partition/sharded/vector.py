"""The parameters of one unit and parameter group end to end, of which a rank keeps one run of elements.

away       a parameter has its shape and no memory: whoever reads it reads NaN
gathered   all of it is here
apart      between steps: it is what this rank keeps of it, with the gradient of that
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.communication.reduction import slices
from manyhands.contract import Block
from manyhands.partition.update import strides_of


@dataclass(eq=False)
class Member:
    """A parameter as it is when all of it is here, at elements ``[start, stop)`` of its vector in memory order."""

    parameter: nn.Parameter
    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    stop: int
    block: Block  # what is kept here
    part: Tensor
    grad: Tensor

    def view(self, vector: Tensor) -> Tensor:
        """It, in the vector of all."""
        return vector.as_strided(self.shape, self.strides, vector.storage_offset() + self.start)

    def away(self) -> None:
        """No memory; NaN instead of what was there, should somebody read it who has not been seen to."""
        p = self.parameter
        p.grad = None
        p.data = torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(self.shape)

    def apart(self) -> None:
        """As optimizer, checkpoints and strategies see it."""
        self.parameter.grad = None  # has another shape
        self.parameter.data = self.part
        self.parameter.grad = self.grad


class Vector:
    """See the file's head. ``unit``: its place in the order of the forward pass; what is kept comes after all units.

    ``home``: memory of all elements, in which this rank's lie, where there is any between gathers. ``held``: once
    gathered it stays for the step.
    """

    def __init__(
        self, unit: int, parameters: Sequence[nn.Parameter], group: Communicator, *, home: Tensor | None, held: bool
    ) -> None:
        self.unit, self.held, self.home, self.group = unit, held, home, group
        self.numel = sum(p.numel() for p in parameters)
        self.lo, self.hi = slices(self.numel, group.size)[group.rank]
        first = parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self.whole: Tensor | None = None
        self.part = self._empty(self.hi - self.lo) if home is None else home[self.lo : self.hi]
        self.grad = torch.zeros_like(self.part)
        self.members: list[Member] = []
        for p in parameters:
            self.members.append(self._keep(p, self.members[-1].stop if self.members else 0))

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device=self.device)

    def _keep(self, p: nn.Parameter, at: int) -> Member:
        """Of a whole parameter what this rank keeps; its memory is given back."""
        n, strides = p.numel(), strides_of(p)
        lo, hi = (min(max(bound - at, 0), n) for bound in (self.lo, self.hi))
        block = Block.run(p, lo, hi, axis="data")
        start = at + lo - self.lo if lo < hi else 0
        mine = block.take(p.data)
        own = (flat[start : start + hi - lo].view(mine.shape) for flat in (self.part, self.grad))
        member = Member(p, p.shape, strides, at, at + n, block, *own)
        member.part.copy_(mine)
        member.apart()
        return member

    @property
    def nbytes(self) -> int:
        """Of all elements."""
        return self.numel * self.dtype.itemsize

    def gather(self) -> None:
        """All parameters become whole. Collective; a vector that is held and here already costs nothing."""
        if self.whole is None:
            whole = self.home
            if whole is None:
                whole = self._empty(self.numel)
                whole[self.lo : self.hi].copy_(self.part)
            with self.group.counting("cut"):
                self.group.all_gather(whole).wait()
            self.whole = whole
        for m in self.members:
            m.parameter.data = m.view(self.whole)

    def let_go(self) -> None:
        """Parameters go away, unless they are held; in memory of their own they stay, for autograd has saved them."""
        if self.held:
            return
        self.whole = None
        if self.home is None:
            for m in self.members:
                m.away()

    def receive(self, memory: Tensor) -> None:
        """Gradients of all elements are going to be added up in ``memory``."""
        memory.zero_()
        for m in self.members:
            m.parameter.grad = m.view(memory)

    def scatter(self, memory: Tensor) -> None:
        """Add what all ranks have added up, of this rank's elements, to its gradient. Collective."""
        with self.group.counting("cut"):
            lo, hi = self.group.reduce_scatter(memory)
        self.grad.add_(memory[lo:hi])
        for m in self.members:
            m.parameter.grad = None

    def begin(self) -> None:
        """A step, or an evaluation: what was gathered is of old."""
        self.whole = None
        for m in self.members:
            m.away()

    def end(self) -> None:
        """Between steps nothing but this rank's elements is here."""
        self.whole = None
        for m in self.members:
            m.apart()
