"""Two bits a value: −t, 0 or +t, and the rest waits (MXNet's gradient compression).

    C(x)_i = t  if x_i ≥ t,   −t  if x_i ≤ −t,   else 0          t = ``threshold``

The dense form of `strom`: always n/4 bytes, whatever is beyond t. MXNet's default, t = 0.5, is for gradients that are
sums over a batch; those of a mean are smaller.

Payload: n/4 bytes. With more than two workers slices are quantized for their owner and their mean once more, each with
a residual of its own.
Guarantee: an approximation; with feedback sent and residuals add up to the gradients.

Apache MXNet 1.x, Gradient compression (faq).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive
from manyhands.communication.compression.bits import from_signed_planes, planes_B, signed_planes
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length
from manyhands.communication.compression.state import State


@dataclass(frozen=True)
class TwoBit(OneShot):
    """Of every value −``threshold``, 0 or +``threshold``, whichever it reaches."""

    name: ClassVar[str] = "two_bit"
    paper: ClassVar[Reference] = Reference(
        "Apache MXNet", "Gradient compression", 2017, "mxnet.apache.org, faq", survey="VI-B"
    )
    scatters: ClassVar[bool] = True

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_positive(self.threshold):
            raise ValueError(f"threshold={self.threshold!r}: it is above 0, in units of the gradient")

    def payload_B(self, layout: Layout) -> int:
        """Two bits each."""
        return planes_B(layout.numel, 2)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values = x.numpy()
        return torch.from_numpy(signed_planes(values >= self.threshold, values <= -self.threshold))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        values = out.numpy()
        check_length(payload, self.payload_B(state.layout), self.name)
        values += values.dtype.type(sign * self.threshold) * from_signed_planes(payload.numpy(), values.size)
