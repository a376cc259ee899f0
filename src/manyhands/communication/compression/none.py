"""Nothing is left out: the dense gradients are averaged by one all-reduce. What everything else is measured against.

Payload: n values, all-reduced. Guarantee: exact.

P. Patarasu & X. Yuan (2009), Bandwidth optimal all-reduce algorithms for clusters of workstations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.compression.compressor import NOTHING, Compressor, Cost, Round, sum_cost
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State


@dataclass(frozen=True)
class Uncompressed(OneShot):
    """The gradient itself."""

    name: ClassVar[str] = "none"
    paper: ClassVar[Reference] = Reference(
        "Patarasu & Yuan",
        "Bandwidth optimal all-reduce algorithms for clusters of workstations",
        2009,
        "J. Parallel Distrib. Comput. 69",
        survey="VI-B",
    )
    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    feedback: bool = field(default=False, kw_only=True)

    def contraction(self, numel: int) -> float:
        """1: nothing is left out."""
        return 1.0

    def variance(self, numel: int) -> float:
        """0."""
        return 0.0

    def payload_B(self, layout: Layout) -> int:
        """The values."""
        return layout.numel * layout.itemsize

    def cost(self, layout: Layout, size: int) -> Cost:
        """An all-reduce."""
        return sum_cost("dense", size, self.payload_B(layout)) if size > 1 and layout.numel else NOTHING

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """See `Compressor.rounds`."""
        return Compressor.rounds(self, layout, size, payload_B)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        return x.clone().view(torch.uint8)

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        check_length(payload, self.payload_B(state.layout), self.name)
        values = out.numpy()
        found = payload.numpy().view(values.dtype)
        check_numbers(found, self.name)
        values += sign * found
