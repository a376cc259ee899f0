"""Eight bits a value: whole numbers from −127 to 127 times a scale for each ``block`` of values (Dettmers 2016).

    C(x)_i = s · round(x_i / s),   s = max |x| / 127 over the block

Payload: n bytes and a value a block. With more than two workers slices are quantized for their owner and their mean
once more, each with a residual of its own.
Guarantee: a contraction, ‖x − C(x)‖² ≤ (b / (4 · 127²)) ‖x‖² for blocks of b; with feedback sent and residuals add up
to the gradients.

T. Dettmers (2016), 8-bit approximations for parallelism in deep learning, arXiv:1511.04561.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State

LARGEST = 127


@dataclass(frozen=True)
class Int8(OneShot):
    """Rounded to 255 steps of the largest value in each ``block``."""

    name: ClassVar[str] = "int8"
    paper: ClassVar[Reference] = Reference(
        "Dettmers",
        "8-bit approximations for parallelism in deep learning",
        2016,
        "ICLR, arXiv:1511.04561",
        survey="VI-B",
    )
    scatters: ClassVar[bool] = True

    block: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.block, 1):
            raise ValueError(f"block={self.block!r}: it is a whole number of values from 1")

    def contraction(self, numel: int) -> float:
        """1 − b/(4·127²), where that is something; the last bits of rounding are left for the computer's own."""
        return max(0.0, 1 - 1.001 * min(self.block, numel) / (4 * LARGEST**2))

    def payload_B(self, layout: Layout) -> int:
        """A byte each, and a value a block."""
        return layout.numel + layout.itemsize * len(layout.blocks(self.block))

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values, starts = x.numpy(), state.layout.blocks(self.block)
        magnitude = np.abs(values)
        scales = np.maximum.reduceat(magnitude, starts) / LARGEST
        # The reciprocal of a denormal scale is infinite; such a block stays with the residual.
        tiny = np.finfo(values.dtype).tiny
        scales[scales < tiny] = 0
        per_scale = np.where(scales > 0, 1 / np.maximum(scales, tiny), 0).astype(values.dtype)
        scaled = np.multiply(values, np.repeat(per_scale, state.layout.lengths(starts)), out=magnitude)
        whole = np.rint(scaled, out=scaled).astype(np.int8)
        return torch.from_numpy(np.concatenate([scales.view(np.uint8), whole.view(np.uint8)]))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        check_length(coded, self.payload_B(layout), self.name)
        starts = layout.blocks(self.block)
        head = layout.itemsize * len(starts)
        scales = coded[:head].view(values.dtype)
        check_numbers(scales, self.name, 128)
        scales = scales * values.dtype.type(sign)
        decoded = np.repeat(scales, layout.lengths(starts))
        decoded *= coded[head:].view(np.int8).astype(values.dtype)
        values += decoded
