"""Cannon's algorithm for all three products of a layer (survey §V-B).

    Z = W A,    ∂A = Wᵀ δ,    ∂W = δ Aᵀ        δ = ∂Z; a column of A is a sample

P = q² ranks in a grid; rank (i, j) has block (i, j) of each matrix: of W some outputs × some inputs, of A some inputs
of some samples. For C = L R row i of L is first shifted i to the left and column j of R j up, and then, q times,

    C ← C + L R;   L one to the left, R one up

with products of blocks on the diagonal meeting at every rank. A transposed operand is on its way transposed: its block
(i, j) goes from where it is stored to where it is needed first in one message, which is that of the skew.

L. E. Cannon (1969), "A cellular computer to implement the Kalman filter algorithm", thesis, Montana State University;
L. Ericson & R. Mbuvha (2017), "On the performance of network parallel training in artificial neural networks",
arXiv:1701.05130.

Sizes that q does not divide are filled up with zeros while they are multiplied, so that all messages of a product are
alike; parameters and activations are not. Biases are whole on all ranks: their gradients are summed over the grid,
2(P−1)/P · outputs. The last layer's outputs are joined, (P−1)/P · n.
Payload per rank and product: (q−1)(|L| + |R|) for the shifts and |L| or |R| for the skew of each that has to move, with
|L|, |R| the sizes of the blocks filled up: `cannon_B`.
Guarantee: equal to the whole network, up to the order of summation. Weights and activations take 1/P of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh, shares
from manyhands.contract import Block
from manyhands.errors import BadInput
from manyhands.partition.conjugate import TAG, copied, divided, joined
from manyhands.partition.tensor.chain import perceptron, replace
from manyhands.partition.tensor.cut import Cut
from manyhands.partition.tensor.layers import as_autocast

Place = tuple[int, int]


class Skew(NamedTuple):
    """Where the block that a rank stores goes before the first step, and where its own comes from."""

    to: Place
    frm: Place


def skew_left(i: int, j: int, q: int, *, transposed: bool = False) -> Skew:
    """Rank (i, j) begins with L(i, i+j); ``transposed``: L(i, j) is stored on rank (j, i)."""
    if transposed:
        return Skew((j, (i - j) % q), ((i + j) % q, i))
    return Skew((i, (j - i) % q), (i, (i + j) % q))


def skew_right(i: int, j: int, q: int, *, transposed: bool = False) -> Skew:
    """Rank (i, j) begins with R(i+j, j); ``transposed``: R(i, j) is stored on rank (j, i)."""
    if transposed:
        return Skew(((j - i) % q, i), (j, (i + j) % q))
    return Skew(((i - j) % q, j), ((i + j) % q, j))


def cannon_B(
    sizes: tuple[int, int, int], place: Place, q: int, itemsize: int, *, left: bool = False, right: bool = False
) -> int:
    """Bytes that a rank sends for a product of m × k and k × n; ``left``, ``right``: which of them is transposed."""
    m, k, n = (-(-size // q) for size in sizes)
    shifts = (q - 1) * (m * k + k * n)
    skews = (skew_left(*place, q, transposed=left).to != place) * m * k
    skews += (skew_right(*place, q, transposed=right).to != place) * k * n
    return (shifts + skews) * itemsize


class Grid:
    """The ranks of a group as q × q, for one cut model."""

    def __init__(self, group: Communicator, q: int) -> None:
        self.group, self.q = group, q
        self.place: Place = divmod(group.rank, q)
        arranged = group.arranged(Mesh(row=q, column=q))
        self.along_rows, self.along_columns = (arranged.over(frozenset({axis})) for axis in ("row", "column"))
        #: Of the batch that is passing: what the first layer got, but its last dim.
        self.leading: Sequence[int] = ()

    @property
    def samples(self) -> int:
        """How many there are on all ranks."""
        return math.prod(self.leading)

    def filled(self, block: Tensor, rows: int, columns: int) -> Tensor:
        """``block`` of a matrix of so many rows and columns, filled up to the size that all of its blocks have."""
        high, wide = -(-rows // self.q), -(-columns // self.q)
        return F.pad(block, (0, wide - block.shape[1], 0, high - block.shape[0])).contiguous()

    def multiplied(self, left: Tensor, right: Tensor, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        """This rank's block of L R from those it stores, filled up and transposed where that is said. Collective."""
        i, j = self.place
        q = self.q
        with self.group.counting("cut"):
            left = self._moved(left, skew_left(i, j, q, transposed=transposed[0]))
            right = self._moved(right, skew_right(i, j, q, transposed=transposed[1]))
            product = left @ right
            for _ in range(q - 1):
                left = self._moved(left, Skew((i, (j - 1) % q), (i, (j + 1) % q)))
                right = self._moved(right, Skew(((i - 1) % q, j), ((i + 1) % q, j)))
                product.addmm_(left, right)
        return product

    def _moved(self, block: Tensor, way: Skew) -> Tensor:
        if way.to == self.place:
            return block
        to, frm = (row * self.q + column for row, column in way)
        work = self.group.send(block, to, TAG)
        got = self.group.recv(torch.empty_like(block), frm, TAG).tensor
        work.wait()
        return got


class _Cannon(torch.autograd.Function):
    """Blocks are as torch has them, a sample a row: those of Aᵀ, Zᵀ and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grid: Grid, sizes: tuple[int, int]) -> Tensor:
        m, k, n = *sizes, grid.samples
        ctx.save_for_backward(x, weight)
        ctx.grid, ctx.sizes = grid, (m, k, n)
        product = grid.multiplied(grid.filled(weight, m, k), grid.filled(x.t(), k, n))
        return product[: len(weight), : len(x)].t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grid, (m, k, n) = ctx.grid, ctx.sizes
        grad_x = grad_weight = None
        delta = grid.filled(grad.t(), m, n)
        if ctx.needs_input_grad[0]:
            product = grid.multiplied(grid.filled(weight.t(), k, m), delta, transposed=(True, False))
            grad_x = product[: x.shape[1], : len(x)].t().contiguous()
        if ctx.needs_input_grad[1]:
            product = grid.multiplied(delta, grid.filled(x, n, k), transposed=(False, True))
            grad_weight = product[: weight.shape[0], : weight.shape[1]].contiguous()
        return grad_x, grad_weight, None, None


class CannonLinear(nn.Module):
    """A linear layer of whose weight this rank has a block; samples and neurons lie on the grid, too."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grid: Grid, sizes: tuple[int, int], *, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._grid, self._sizes, self._first, self._last = grid, sizes, first, last
        self._outputs = shares(sizes[0], grid.q)

    def forward(self, x: Tensor) -> Tensor:
        """``(own samples, own inputs) → (own samples, own outputs)``; the first takes all and the last gives all."""
        grid = self._grid
        if self._first:
            grid.leading = x.shape[:-1]
            x = divided(x.reshape(-1, x.shape[-1]), grid.along_rows, -1)
            x = divided(x, grid.along_columns, 0)
        x, weight = as_autocast(x, self.weight)  # type: ignore[assignment]
        y: Tensor = _Cannon.apply(x, weight, grid, self._sizes)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            lo, hi = self._outputs[grid.place[0]]
            y = y + copied(self.bias, grid.group)[lo:hi].to(y.dtype)
        if not self._last:
            return y
        y = joined(y, grid.along_columns, 0, [hi - lo for lo, hi in shares(grid.samples, grid.q)])
        y = joined(y, grid.along_rows, -1, [hi - lo for lo, hi in self._outputs])
        return y.view(*grid.leading, -1)


def cannon(model: nn.Module, group: Communicator, inputs: Any) -> Cut:
    """Cannon's algorithm on a square grid of ranks: each has a block of every matrix. For perceptrons."""
    q = math.isqrt(group.size)
    if q * q != group.size:
        raise BadInput(
            f"tensor=cannon on {group.size} ranks: they form a square grid. --mesh tensor={q * q} or "
            f"tensor={(q + 1) ** 2} would do; rotate and redundant(copies=dual) take any number."
        )
    result = Cut()
    layers = perceptron(model, "cannon", q)
    if q == 1:
        return result
    if layers[0][1].in_features < q:
        raise BadInput(
            f"tensor=cannon: {layers[0][0]} has {layers[0][1].in_features} inputs, to be cut into {q} parts. "
            "Use fewer ranks."
        )
    grid = Grid(group, q)
    i, j = grid.place
    for path, linear in layers:
        m, k = linear.out_features, linear.in_features
        block = Block((m, k), ((0, (shares(m, q)[i],)), (1, (shares(k, q)[j],))))
        weight = block.take(linear.weight.detach())
        bias = linear.bias.detach().clone() if "bias" in dict(linear.named_parameters()) else None
        made = CannonLinear(weight, bias, grid, (m, k), first=path == layers[0][0], last=path == layers[-1][0])
        said = f"block {'×'.join(map(str, weight.shape))} of {m}×{k} on a grid of {q}×{q}"
        replace(model, path, made, {"weight": block}, said, result)
    return result


vars(cannon)["paper"] = Reference(
    "L. Ericson & R. Mbuvha",
    "On the performance of network parallel training in artificial neural networks",
    2017,
    "arXiv:1701.05130",
    survey="V-B",
)
