"""Layers of which each rank holds a part of the neurons (survey §V-B, network parallelism).

    column   some outputs:  y_p = x W_pᵀ + b_p       x is the same on all ranks; ∂x = Σ_p ∂y_p W_p
    row      some inputs:   y = Σ_p x_p W_pᵀ + b     x_p is what a column layer left here; y is the same on all

A column layer followed by a row layer exchanges one sum forward and one backward; a column layer alone is ``gathered``:
its outputs are joined, for layers that want all of them. Convolutions are cut by channels, embeddings by width (column)
or by vocabulary (row).

M. Shoeybi, M. Patwary, R. Puri, P. LeGresley, J. Casper & B. Catanzaro (2019), "Megatron-LM", arXiv:1909.08053, §3.
The sum of ∂x goes on while the weights' gradient is computed, where the transport overlaps.

Payload per rank and pass: 2(P−1)/P · n elements for a sum of n, (P−1)/P · n for a join.
Guarantee: equal to the layer that is cut, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import Block
from manyhands.partition.conjugate import copied, joined, start_sum_, summed

#: Of a layer's tensors those that are cut, by name.
Blocks = dict[str, Block]

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _ColumnLinear(torch.autograd.Function):
    """``x Wᵀ + b`` whose ∂x is summed over the group beside the computing of ∂W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Communicator) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.biased = group, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = work = None
        if wants_x:
            grad_x = (rows @ weight).view(x.shape)
            work = start_sum_(grad_x, ctx.group)
        if wants_weight:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if wants_bias:
            grad_bias = rows.sum(0)
        if work is not None:
            with ctx.group.counting("cut"):
                work.wait()
        return grad_x, grad_weight, grad_bias, None


def as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of them before a product; a function of our own has to do it itself."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors]


class ColumnLinear(nn.Module):
    """This rank's outputs of a linear layer; all ranks' with ``gathered``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Communicator, lengths: Sequence[int] | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_features, self.in_features = weight.shape
        self._group, self._lengths = group, lengths

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in) → (…, own outputs)``, or ``(…, out)``."""
        as_said = as_autocast(x, self.weight, self.bias)
        y: Tensor = _ColumnLinear.apply(*as_said, self._group)  # type: ignore[no-untyped-call]
        return y if self._lengths is None else joined(y, self._group, -1, self._lengths)

    def extra_repr(self) -> str:
        """As torch's layers have it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, gathered={bool(self._lengths)}"


class RowLinear(nn.Module):
    """A linear layer of which this rank has some inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_features, self.in_features = weight.shape
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """``(…, own inputs) → (…, out)``, the same on all ranks."""
        y = summed(F.linear(x, self.weight), self._group)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As torch's layers have it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class CutConvolution(nn.Module):
    """A convolution of which this rank has some output channels, or some input channels."""

    def __init__(
        self,
        conv: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        group: Communicator,
        *,
        column: bool,
        lengths: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._apply_to: Callable[..., Tensor] = CONVOLUTIONS[type(conv)]  # type: ignore[index]
        self._how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self._group, self._column, self._lengths = group, column, lengths
        self.out_channels, self.in_channels = weight.shape[:2]

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in, …) → (n, out, …)``; of the cut one only this rank's channels."""
        if not self._column:
            y = summed(self._apply_to(x, self.weight, None, **self._how), self._group)
            return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
        y = self._apply_to(copied(x, self._group), self.weight, self.bias, **self._how)
        return y if self._lengths is None else joined(y, self._group, 1, self._lengths)


class CutEmbedding(nn.Module):
    """A table of which this rank has some columns (joined after the look-up), or some rows (summed)."""

    def __init__(
        self, weight: Tensor, padding: int | None, group: Communicator, *, first: int, lengths: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._first, self._padding, self._group, self._lengths = first, padding, group, lengths

    def forward(self, indices: Tensor) -> Tensor:
        """``(…) → (…, width)``, the same on all ranks."""
        if self._lengths is not None:
            part = F.embedding(indices, self.weight, self._padding)
            return joined(part, self._group, -1, self._lengths)
        own = indices - self._first
        elsewhere = (own < 0) | (own >= len(self.weight))
        padding = None if self._padding is None else self._padding - self._first
        if padding is not None and not 0 <= padding < len(self.weight):
            padding = None
        part = F.embedding(own.masked_fill(elsewhere, 0), self.weight, padding)
        return summed(part.masked_fill(elsewhere.unsqueeze(-1), 0.0), self._group)
