"""Multiply, accumulate, rotate: activations pass round a ring of ranks that keep their weights (survey §V-B).

    forward   z_p = Σ_q W[p, q] a_q          the blocks a_q go round, each rank adds its stored rows' contribution
    backward  ∂a_q = Σ_p W[p, q]ᵀ δ_p        the partial sums go round through the same rows: no transpose is stored
              ∂W[p, q] = δ_p a_qᵀ            the a_q go round once more, so that none is kept but a rank's own

a activations, δ = ∂z; rank p has the units p of every layer with their rows of weights, W[p, q] joins them to the units
q of the layer before.

X. Zhang, M. McKenna, J. P. Mesirov & D. L. Waltz (1989), "An efficient implementation of the back-propagation algorithm
on the Connection Machine CM-2", Advances in Neural Information Processing Systems 2. Their other grid axis, on which
copies of the network see other patterns, is the mesh's ``data``.

Messages go to the right neighbour only, P−1 block shifts a product: `shifted_B`. The samples are on every rank, so the
first layer shifts nothing; the last layer's outputs are joined on all ranks, (P−1)/P · n elements.
Guarantee: equal to the whole network, up to the order of summation. Weights, gradients and activations take 1/P of the
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.contract import Block
from manyhands.partition.conjugate import TAG, joined
from manyhands.partition.tensor.chain import parts, perceptron, replace
from manyhands.partition.tensor.cut import Cut
from manyhands.partition.tensor.layers import ColumnLinear, as_autocast


def at_hand(rank: int, shift: int, size: int) -> int:
    """Whose activations ``rank`` has after ``shift`` shifts to the right."""
    return (rank - shift) % size


def shifted_B(widths: Sequence[int], rank: int, rows: int, itemsize: int) -> tuple[int, int, int]:
    """Bytes that a rank sends for the three products of a layer whose inputs lie in blocks of ``widths``.

    In the order of the file's head. ``rows`` are the samples. Of blocks alike each is (P−1)/P · rows · inputs.
    """
    size = len(widths)
    activations = sum(widths[at_hand(rank, shift, size)] for shift in range(size - 1))
    sums = sum(widths) - widths[rank]  # its own ends here
    return tuple(rows * itemsize * n for n in (activations, sums, activations))  # type: ignore[return-value]


def _shift(block: Tensor, width: int, group: Communicator) -> Tensor:
    """The left neighbour's block of ``width`` units, for one's own."""
    with group.counting("cut"):
        work = group.send(block, (group.rank + 1) % group.size, TAG)
        got = group.recv(block.new_empty(len(block), width), (group.rank - 1) % group.size, TAG).tensor
        work.wait()
    return got


def _round(block: Tensor, bounds: Sequence[tuple[int, int]], group: Communicator) -> Iterator[tuple[int, Tensor]]:
    """Whose activations are here, and the activations: all ranks', beginning with one's own."""
    for shift in range(group.size):
        owner = at_hand(group.rank, shift, group.size)
        yield owner, block
        if shift < group.size - 1:
            lo, hi = bounds[at_hand(group.rank, shift + 1, group.size)]
            block = _shift(block, hi - lo, group)


class _Rotating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Communicator, bounds: Sequence[tuple[int, int]]
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.bounds = group, bounds
        y = x.new_zeros(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1)
        for owner, block in _round(x, bounds, group):
            lo, hi = bounds[owner]
            y.addmm_(block, weight[:, lo:hi].t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        group, bounds = ctx.group, ctx.bounds
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        sums = grad_weight = None
        if wants_x:
            for shift in range(group.size):  # this rank's own sum comes last, having been everywhere else
                lo, hi = bounds[at_hand(group.rank, shift + 1, group.size)]
                if sums is None:
                    sums = grad @ weight[:, lo:hi]
                else:
                    sums = _shift(sums, hi - lo, group).addmm_(grad, weight[:, lo:hi])
        if wants_weight:
            grad_weight = torch.empty_like(weight)
            for owner, block in _round(x, bounds, group):
                lo, hi = bounds[owner]
                grad_weight[:, lo:hi] = grad.t() @ block
        return sums, grad_weight, grad.sum(0) if wants_bias else None, None, None


class RotatingLinear(nn.Module):
    """This rank's outputs of a linear layer of whose inputs each rank has some; all ranks' outputs with ``lengths``."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, group: Communicator, lengths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_features, self.in_features = weight.shape
        self._group, self._lengths = group, lengths
        self._bounds = shares(self.in_features, group.size)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, own inputs) → (…, own outputs)``, or ``(…, out)``."""
        rows, weight, bias = as_autocast(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        y: Tensor = _Rotating.apply(rows, weight, bias, self._group, self._bounds)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self._lengths is None else joined(y, self._group, -1, self._lengths)


def rotate(model: nn.Module, group: Communicator, inputs: Any) -> Cut:
    """A ring of ranks with some units of every layer each; activations and partial sums go round. For perceptrons."""
    result = Cut()
    layers = perceptron(model, "rotate", group.size)
    for path, linear in layers if group.size > 1 else ():
        bounds = shares(linear.out_features, group.size)
        own = bounds[group.rank]
        rows = ((0, (own,)),)
        weight, bias, blocks = parts(
            linear, Block(tuple(linear.weight.shape), rows), Block((linear.out_features,), rows)
        )
        lengths = [hi - lo for lo, hi in bounds] if path == layers[-1][0] else None
        kind = ColumnLinear if path == layers[0][0] else RotatingLinear
        made = kind(weight, bias, group, lengths)
        said = f"rows {linear.out_features} → {own[1] - own[0]}, {'in place' if kind is ColumnLinear else 'rotating'}"
        replace(model, path, made, blocks, said, result)
    return result


vars(rotate)["paper"] = Reference(
    "X. Zhang, M. McKenna, J. P. Mesirov & D. L. Waltz",
    "An efficient implementation of the back-propagation algorithm on the Connection Machine CM-2",
    1989,
    "Advances in Neural Information Processing Systems 2",
    survey="V-B",
)
