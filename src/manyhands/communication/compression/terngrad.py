"""TernGrad: −1, 0 or +1 times one scale a tensor, by chance, so that the mean is right (Wen et al. 2017).

    C(x)_i = s · sign(x_i) · b_i,   P(b_i = 1) = |x_i| / s,   s = max |x| over the tensor

or ``clip`` standard deviations of the tensor where that is less (0: never): values beyond s are cut to it, which makes
C less noisy, and biased by what was cut. Two routes, by bytes: two bits a value are gathered with all workers' scales,
or all take the largest worker's scale and the ternary numbers are added up as whole numbers, ⌈log₂(2P+1)⌉ bits each, by
one all-reduce.

Payload: n/4 bytes and a value a tensor; added up, 8 bytes for every ⌊63/⌈log₂(2P+1)⌉⌋ values.
Guarantee: unbiased for clip=0, E C(x) = x; E ‖x − C(x)‖² ≤ (√n − 1) ‖x‖² of a tensor of n values. No feedback by
default: it is for schemes that err in the same direction again and again.

W. Wen, C. Xu, F. Yan, C. Wu, Y. Wang, Y. Chen & H. Li (2017), TernGrad: ternary gradients to reduce communication in
distributed deep learning, arXiv:1705.07878.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive, is_whole
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.compression.bits import chunks, from_signed_planes, planes_B, signed_planes
from manyhands.communication.compression.compressor import Cost, Round, Sent
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State


def bits_of_sum(workers: int) -> int:
    """Of a sum of so many numbers from −1 to 1."""
    return math.ceil(math.log2(2 * workers + 1))


@dataclass(frozen=True)
class TernGrad(OneShot):
    """Signs drawn so that their mean is the gradient, times the largest value of each tensor."""

    name: ClassVar[str] = "terngrad"
    paper: ClassVar[Reference] = Reference(
        "Wen, Xu, Yan, Wu, Wang, Chen & Li",
        "TernGrad: ternary gradients to reduce communication in distributed deep learning",
        2017,
        "NeurIPS, arXiv:1705.07878",
        survey="VI-B",
    )
    summable: ClassVar[bool] = True

    clip: float = 2.5
    seed: int = 0
    feedback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip != 0 and not is_positive(self.clip):
            raise ValueError(f"clip={self.clip!r}: it is a number of standard deviations, 0 for no clipping")
        if not is_whole(self.seed, 0):
            raise ValueError(f"seed={self.seed!r}: it is a whole number from 0")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Of what is not clipped."""
        return not self.clip

    def variance(self, numel: int) -> float:
        """√n − 1, if nothing is clipped."""
        return math.inf if self.clip else math.sqrt(numel) - 1

    @property
    def approaches(self) -> bool:
        """Drawn by chance, it is mostly farther off than nothing would be."""
        return False

    def payload_B(self, layout: Layout) -> int:
        """Two bits each, and a value a tensor."""
        return layout.itemsize * len(layout.tensors) + planes_B(layout.numel, 2)

    def cost(self, layout: Layout, size: int) -> Cost:
        """The cheaper of what `OneShot` does and of adding whole numbers up."""
        one = super().cost(layout, size)
        scales_B = reference_B("all_gather", size * layout.itemsize * len(layout.tensors), size)
        sums_B = reference_B("all_reduce", 8 * -(-layout.numel // (63 // bits_of_sum(size))), size)
        added = Cost(scales_B + sums_B, 3 * (size - 1), "sum")
        return min(one, added, key=lambda cost: cost[:2])

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """See `Compressor.rounds`."""
        if self.cost(layout, size).route != "sum":
            return super().rounds(layout, size, payload_B)
        words = -(-layout.numel // (63 // bits_of_sum(size)))
        return [("all_gather", size * layout.itemsize * len(layout.tensors)), ("all_reduce", 8 * words)]

    def scales(self, x: Tensor, layout: Layout) -> Tensor:
        """Of every tensor: its largest value, or where that is less ``clip`` standard deviations."""
        result = torch.empty(len(layout.tensors), dtype=layout.dtype)
        for i, part in enumerate(torch.split(x, layout.lengths(layout.tensors).tolist())):
            least, most = part.aminmax()
            largest = max(-least, most)
            mean, square = part.mean(), part.dot(part) / part.numel()
            variance = square - mean * mean
            # A tensor of one value, or of equal ones, has no deviation to go by.
            known = self.clip and torch.isfinite(variance) and variance > 1e-5 * square
            result[i] = min(largest, self.clip * variance.sqrt()) if known else largest
        return result

    def draw(self, x: Tensor, scales: Tensor, state: State) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where C(x) is positive and where it is negative. What is beyond its scale always is one of them."""
        layout, values, uniform = state.layout, x.numpy(), state.uniform(self.seed)
        bounds = np.repeat(scales.numpy(), layout.lengths(layout.tensors))
        plus, minus = np.empty(values.size, bool), np.empty(values.size, bool)
        for part in chunks(values.size):
            bound = bounds[part]
            bound *= uniform(bound.size)
            np.greater(values[part], bound, out=plus[part])
            np.less(values[part], np.negative(bound, out=bound), out=minus[part])
        return plus, minus

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        scales = self.scales(x, state.layout)
        planes = signed_planes(*self.draw(x, scales, state))
        return torch.from_numpy(np.concatenate([scales.numpy().view(np.uint8), planes]))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        check_length(coded, self.payload_B(layout), self.name)
        head = layout.itemsize * len(layout.tensors)
        scales = coded[:head].view(values.dtype)
        check_numbers(scales, self.name)
        each = np.repeat(values.dtype.type(sign) * scales, layout.lengths(layout.tensors))
        each *= from_signed_planes(coded[head:], layout.numel).astype(values.dtype)
        values += each

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """By the cheaper route."""
        layout, size = state.layout, comm.size
        if self.cost(layout, size).route != "sum":
            return super().exchange(x, out, comm, state)
        everybodys = torch.empty(size, len(layout.tensors), dtype=layout.dtype)
        everybodys[comm.rank] = self.scales(x, layout)
        each_has = len(layout.tensors)
        comm.all_gather(everybodys, [(p * each_has, (p + 1) * each_has) for p in range(size)]).wait()
        scales = everybodys.amax(0)
        plus, minus = self.draw(x, scales, state)
        mine = plus.view(np.int8) - minus.view(np.int8)
        total = _added_up(mine, comm)
        each = np.repeat(scales.numpy(), layout.lengths(layout.tensors))
        np.multiply(each, total, out=out.numpy())
        out.mul_(1 / size)

        def subtract(residual: Tensor) -> None:
            residual.sub_(torch.from_numpy(each * mine))

        return subtract


def _added_up(mine: NDArray[np.int8], comm: Communicator) -> NDArray[np.int64]:
    """Numbers from −1 to 1, summed over the ranks in fields of an int64 so wide that none spills into the next."""
    bits = bits_of_sum(comm.size)
    fields = 63 // bits
    padded = np.zeros((-(-mine.size // fields), fields), np.int64)
    padded.ravel()[: mine.size] = mine
    padded.ravel()[: mine.size] += 1
    shifts = np.arange(fields, dtype=np.int64) * bits
    words = torch.from_numpy(np.bitwise_or.reduce(padded << shifts, axis=1))
    comm.all_reduce(words).wait()
    sums: NDArray[np.int64] = (words.numpy()[:, None] >> shifts) & ((1 << bits) - 1)
    total: NDArray[np.int64] = sums.ravel()[: mine.size] - comm.size
    return total
