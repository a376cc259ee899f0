"""Collectives that autograd passes through, in conjugate pairs: the backward of one is the forward of the other.

    forward                      backward
    copied   x                   Σ_p ∂x      every rank goes on from the same x with a part of the work
    summed   Σ_p x               ∂x          every rank has a summand
    joined   all parts of x      own part    the last step of a cut
    divided  own part of x       all parts   its first
    gathered all parts of x      Σ_p, own    every rank has a part, and makes of all of them a part of the work

Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, §3 (its f and g are the first two). Outside the parts that these
functions enclose all ranks of the group compute the same from the same, so parameters there have equal gradients.

Payload per rank is that of the collective: 2(P−1)/P · n for a sum, (P−1)/P · n for a join or a sum of which only a part
is kept, in the direction that communicates; counted as ``cut``. Groups of one rank cost nothing. Double backward is
not supported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import DONE, Communicator, Work
from manyhands.communication.topology import shares

#: Of messages within a cut, so that they meet no others.
TAG = 7201


def start_sum_(x: Tensor, group: Communicator) -> Work:
    """Begin ``x ← Σ_p x``; ``x`` is contiguous."""
    with group.counting("cut"):
        return group.all_reduce(x)


def sum_(x: Tensor, group: Communicator) -> Tensor:
    """``x ← Σ_p x``."""
    with group.counting("cut"):
        group.all_reduce(x).wait()
    return x


def join(part: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
    """All ranks' parts one after the other along ``dim``, where rank p's has ``lengths[p]``."""
    row = math.prod(n for d, n in enumerate(part.shape) if d != dim)  # elements a unit of length
    ends = list(itertools.accumulate(length * row for length in lengths))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    flat = part.new_empty(ends[-1])
    lo, hi = bounds[group.rank]
    flat[lo:hi].copy_(part.reshape(-1))
    with group.counting("cut"):
        group.all_gather(flat, bounds).wait()
    shape = list(part.shape)
    parts = []
    for (lo, hi), length in zip(bounds, lengths, strict=True):
        shape[dim] = length
        parts.append(flat[lo:hi].view(shape))
    return torch.cat(parts, dim)


def sum_part(whole: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
    """This rank's part along ``dim`` of ``Σ_p whole_p``, added in rank order.

    By messages, each of what its receiver keeps: a reduce-scatter, but the parts may be of any lengths, also 0.
    """
    parts = [part.contiguous() for part in torch.split(whole, list(lengths), dim)]
    summands = [parts[group.rank]] * group.size
    with group.counting("cut"):
        for shift in range(1, group.size):
            to, frm = (group.rank + shift) % group.size, (group.rank - shift) % group.size
            work = group.send(parts[to], to, TAG) if lengths[to] else DONE
            if lengths[group.rank]:
                summands[frm] = group.recv(torch.empty_like(parts[group.rank]), frm, TAG).tensor
            work.wait()
    return torch.stack(summands).sum(0)


def told(values: Sequence[float], group: Communicator) -> Tensor:
    """Every rank's ``values``: ``(ranks, values)`` in float64. Collective, counted as ``control``."""
    everybody = torch.zeros(group.size, len(values), dtype=torch.float64)
    everybody[group.rank] = torch.tensor(values, dtype=torch.float64)
    with group.counting("control"):
        group.all_gather(everybody, [(p * len(values), (p + 1) * len(values)) for p in range(group.size)]).wait()
    return everybody


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator) -> Tensor:
        return sum_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
        ctx.dim, ctx.start, ctx.length = dim, sum(lengths[: group.rank]), lengths[group.rank]
        return join(x, group, dim, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.narrow(ctx.dim, ctx.start, ctx.length), None, None, None


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.lengths = group, dim, lengths
        return x.narrow(dim, sum(lengths[: group.rank]), lengths[group.rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return join(grad, ctx.group, ctx.dim, ctx.lengths), None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.lengths = group, dim, lengths
        return join(x, group, dim, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_part(grad, ctx.group, ctx.dim, ctx.lengths), None, None, None


def copied(x: Tensor, group: Communicator) -> Tensor:
    """``x``; its gradient is the sum over the group."""
    return x if group.size == 1 else _Copied.apply(x, group)  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: Communicator) -> Tensor:
    """``Σ_p x``; the gradient passes as it is."""
    return x if group.size == 1 else _Summed.apply(x, group)  # type: ignore[no-untyped-call]


def joined(x: Tensor, group: Communicator, dim: int = -1, lengths: Sequence[int] | None = None) -> Tensor:
    """All parts along ``dim``, in rank order; ``lengths`` of all ranks' parts (default: all alike)."""
    if group.size == 1:
        return x
    told = [x.shape[dim]] * group.size if lengths is None else lengths
    return _Joined.apply(x, group, dim % x.dim(), told)  # type: ignore[no-untyped-call, no-any-return]


def divided(x: Tensor, group: Communicator, dim: int = -1, lengths: Sequence[int] | None = None) -> Tensor:
    """This rank's part along ``dim``; ``lengths`` of all ranks' parts (default: those of `topology.shares`)."""
    if group.size == 1:
        return x
    told = [hi - lo for lo, hi in shares(x.shape[dim], group.size)] if lengths is None else lengths
    return _Divided.apply(x, group, dim % x.dim(), told)  # type: ignore[no-untyped-call, no-any-return]


def gathered(x: Tensor, group: Communicator, dim: int, lengths: Sequence[int]) -> Tensor:
    """All parts along ``dim``, rank p's of ``lengths[p]``; the gradient of a part is the sum over the group."""
    return x if group.size == 1 else _Gathered.apply(x, group, dim % x.dim(), lengths)  # type: ignore[no-untyped-call]
