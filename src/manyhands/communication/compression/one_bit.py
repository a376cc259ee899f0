"""1-bit SGD: of every value its sign; what the signs stand for is told per column (Seide et al. 2014).

    q_i = mean of the x_j ≥ 0 of its column  if x_i ≥ 0,  else mean of the x_j < 0

A column holds the weights into one unit of a layer; a vector (a bias) is one column. With more than two workers slices
are quantized for their owner, and the owner's mean once more, each with a residual of its own (the paper's two feedback
loops); two workers gather, which is as many bytes and one loss less.

Payload: n/8 bytes and two values a column, each way.
Guarantee: a contraction (q is a projection of x), if a weak one; with feedback sent and residuals add up to the
gradients.

F. Seide, H. Fu, J. Droppo, G. Li & D. Yu (2014), 1-bit stochastic gradient descent and its application to data-parallel
distributed training of speech DNNs, Interspeech.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.compression.bits import add_chosen_
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State


def levels(x: NDArray[Any], positive: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[Any]:
    """Of each run that begins at ``starts``, the means of what is ``positive`` and of what is not: ``(2, runs)``."""
    counts = np.add.reduceat(positive.view(np.uint8), starts, dtype=np.int32 if x.size < 2**31 else np.int64)
    others = np.diff(starts, append=x.size) - counts
    part = torch.from_numpy(x).clamp(min=0).numpy()  # `numpy.maximum` takes twice as long
    above = _sums(part, starts)
    below = _sums(np.subtract(x, part, out=part), starts)
    return np.stack([above / np.maximum(counts, 1), below / np.maximum(others, 1)]).astype(x.dtype)


def _sums(x: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        sums = np.add.reduceat(x, starts)  # pairs first, then pairs of these: rounding hardly grows with the length
    if not np.isfinite(sums).all():
        sums = np.add.reduceat(x, starts, dtype=np.float64)
    return sums.astype(np.float64)


@dataclass(frozen=True)
class OneBit(OneShot):
    """Signs, and per column of weights the mean of its positive and that of its negative values."""

    name: ClassVar[str] = "one_bit"
    paper: ClassVar[Reference] = Reference(
        "Seide, Fu, Droppo, Li & Yu",
        "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech DNNs",
        2014,
        "Interspeech",
        survey="VI-B",
    )
    scatters: ClassVar[bool] = True

    def contraction(self, numel: int) -> float:
        """1/n: of a vector with one large value that is what is left."""
        return 1 / numel

    def payload_B(self, layout: Layout) -> int:
        """A bit each, and two values a column."""
        return 2 * layout.itemsize * len(layout.columns) + -(-layout.numel // 8)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values = x.numpy()
        positive = values >= 0
        means = levels(values, positive, state.layout.columns)
        return torch.from_numpy(np.concatenate([means.view(np.uint8).ravel(), np.packbits(positive)]))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        check_length(coded, self.payload_B(layout), self.name)
        head = 2 * layout.itemsize * len(layout.columns)
        above, below = coded[:head].view(values.dtype).reshape(2, -1)
        check_numbers(coded[:head].view(values.dtype), self.name)
        if sign < 0:
            above, below = -above, -below
        positive = np.unpackbits(coded[head:], count=layout.numel)
        add_chosen_(values, positive, above, below, layout.lengths(layout.columns))
