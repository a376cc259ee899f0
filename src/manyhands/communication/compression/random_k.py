"""Random-k: in every step all workers send the same randomly chosen entries, so their values alone are added up
(Wangni et al. 2018; Stich et al. 2018; Konečný & Richtárik 2018).

    C(x)_i = s · x_i  if i is drawn,  else 0          k = ⌈ratio · n⌉ of n, the same on all workers, from ``seed``

s = 1 with feedback; without it s = n/k, which makes C unbiased at the price of a variance of (n/k − 1) ‖x‖².

Payload: 4 bytes an entry (8 in float64) and no indices, all-reduced: 2(P−1)/P · 4k.
Guarantee: E ‖x − C(x)‖² = (1 − k/n) ‖x‖² with feedback; sent and residual add up to the gradients.

J. Wangni, J. Wang, J. Liu & T. Zhang (2018), Gradient sparsification for communication-efficient distributed
optimization, arXiv:1710.09854.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import NOTHING, Compressor, Cost, Sent, sum_cost
from manyhands.communication.compression.entries import check_ratio, entries
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State


@dataclass(frozen=True)
class RandomK(Compressor):
    """The same random ``ratio`` of the values on every worker, drawn anew in every step; values only."""

    name: ClassVar[str] = "random_k"
    paper: ClassVar[Reference] = Reference(
        "Wangni, Wang, Liu & Zhang",
        "Gradient sparsification for communication-efficient distributed optimization",
        2018,
        "NeurIPS, arXiv:1710.09854",
        survey="VI-B",
    )
    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    ratio: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        if not is_whole(self.seed, 0):
            raise ValueError(f"seed={self.seed!r}: it is a whole number from 0")

    def contraction(self, numel: int) -> float:
        """k/n in the mean, with feedback."""
        return entries(self.ratio, numel) / numel if self.feedback else 0.0

    def variance(self, numel: int) -> float:
        """n/k − 1 without."""
        return math.inf if self.feedback else numel / entries(self.ratio, numel) - 1

    def payload_B(self, layout: Layout) -> int:
        """A value each."""
        return entries(self.ratio, layout.numel) * layout.itemsize

    def cost(self, layout: Layout, size: int) -> Cost:
        """An all-reduce of the chosen values."""
        return sum_cost("sum", size, self.payload_B(layout)) if size > 1 and layout.numel else NOTHING

    def indices(self, state: State) -> NDArray[np.int64]:
        """Of this step; the next call is the next step's."""
        n = state.layout.numel
        draw = state.random(self.seed, alike=True)
        return draw.choice(n, entries(self.ratio, n), replace=False, shuffle=False)

    def encode(self, x: Tensor, indices: NDArray[Any]) -> Tensor:
        """The values that are sent, in their own dtype."""
        chosen = torch.from_numpy(x.numpy()[indices])
        return chosen if self.feedback else chosen.mul_(x.numel() / len(indices))

    def decode(self, values: Tensor, indices: NDArray[Any], numel: int) -> Tensor:
        """The vector that is zero elsewhere."""
        out = torch.zeros(numel, dtype=values.dtype)
        out.numpy()[indices] = values.numpy()
        return out

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """See `Compressor.exchange`."""
        if not x.numel():
            return lambda _: None
        indices = self.indices(state)
        values = self.encode(x, indices)
        comm.all_reduce(values, weight=1.0).wait()
        out.zero_()
        out.numpy()[indices] = values.numpy()

        def subtract(residual: Tensor) -> None:
            residual.numpy()[indices] *= 0 if self.feedback else 1 - x.numel() / len(indices)

        return subtract
