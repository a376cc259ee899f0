"""What a collective does to the tensors of its ranks, when all of them lie in one process.

Pure functions from the ranks' tensors, in rank order, to the same tensors filled. Nothing here waits or knows a rank:
`inprocess` brings the ranks together and the last one to arrive calls one of these for all. Sums go through
`reduction`, so that they are bit-equal with every other transport that reduces by itself. Tensors on the meta device
have sizes only, and stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.communication.reduction import coefficients, reduce_into, slices

#: From so many ranks on a whole vector is made once and cut, or gathered once and copied: P calls instead of P².
MANY = 4


def all_reduce(parts: Sequence[Tensor], weights: Sequence[float | None]) -> None:
    """Every part becomes the sum (or weighted mean) of all; the sum is made in the first part, then copied."""
    factors = coefficients(weights)
    if parts[0].is_meta:
        return
    total = _reduced(parts[0], parts, factors)
    for part in parts[1:]:
        _copy(part, total)


def reduce_scatter(parts: Sequence[Tensor], weights: Sequence[float | None]) -> None:
    """Slice p of part p becomes the sum (or weighted mean) of that slice; other ranks' slices stay as they are."""
    factors = coefficients(weights)
    if parts[0].is_meta:
        return
    bounds = slices(parts[0].numel(), len(parts))
    if len(parts) < MANY:
        for part, (lo, hi) in zip(parts, bounds, strict=True):
            _reduced(part[lo:hi], [p[lo:hi] for p in parts], factors)
        return
    total = torch.empty_like(parts[0])
    reduce_into(total, parts, factors)
    for part, (lo, hi) in zip(parts, bounds, strict=True):
        part[lo:hi] = total[lo:hi]


def all_gather(parts: Sequence[Tensor], bounds: Sequence[tuple[int, int]]) -> None:
    """``bounds[p]`` of every part is filled from part p; what no bounds cover stays as it is."""
    if parts[0].is_meta or all(_same(part, parts[0]) for part in parts):
        return
    if len(parts) >= MANY and all(a[1] == b[0] for a, b in itertools.pairwise(bounds)):
        first, last = bounds[0][0], bounds[-1][1]
        whole = torch.cat([part[lo:hi] for part, (lo, hi) in zip(parts, bounds, strict=True)])
        for part in parts:
            part[first:last] = whole
        return
    for source, (lo, hi) in zip(parts, bounds, strict=True):
        for part in parts:
            _copy(part[lo:hi], source[lo:hi])


def all_to_all(parts: Sequence[Tensor]) -> list[Tensor]:
    """Chunk p of result q is chunk q of part p: a transpose of the matrix of chunks."""
    if parts[0].is_meta:
        return list(parts)
    shape = len(parts), parts[0].numel() // len(parts)
    results = [torch.empty_like(part) for part in parts]
    for q, result in enumerate(results):
        for chunk, part in zip(result.view(shape), parts, strict=True):
            chunk.copy_(part.view(shape)[q])
    return results


def broadcast(parts: Sequence[Tensor], root: int) -> None:
    """Every part becomes the root's."""
    if parts[0].is_meta:
        return
    for part in parts:
        _copy(part, parts[root])


def _reduced(out: Tensor, parts: Sequence[Tensor], factors: Sequence[float] | None) -> Tensor:
    # Common memory may be handed in by several ranks; a running sum would then read itself.
    if sum(_same(out, part) for part in parts) > 1:
        scratch = torch.empty_like(out)
        reduce_into(scratch, parts, factors)
        out.copy_(scratch)
    else:
        reduce_into(out, parts, factors)
    return out


def _copy(to: Tensor, frm: Tensor) -> None:
    if not _same(to, frm):
        to.copy_(frm)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()
