"""What a collective does to the tensors of its ranks, when all of them lie in one process.

Pure functions from the ranks' tensors, in rank order, to the same tensors filled. Nothing here waits or knows a rank:
`inprocess` brings the ranks together and the last one to arrive calls one of these for all. Sums go through
`reduction`, so that they are bit-equal with every other transport that reduces by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.communication.reduction import coefficients, reduce_into, slices


def all_reduce(parts: Sequence[Tensor], weights: Sequence[float | None]) -> None:
    """Every part becomes the sum (or weighted mean) of all; the sum is made in the first part, then copied."""
    total = _reduced(parts[0], parts, coefficients(weights))
    for part in parts[1:]:
        _copy(part, total)


def reduce_scatter(parts: Sequence[Tensor], weights: Sequence[float | None]) -> None:
    """Slice p of part p becomes the sum (or weighted mean) of that slice; other ranks' slices stay as they are."""
    factors = coefficients(weights)
    for part, (lo, hi) in zip(parts, slices(parts[0].numel(), len(parts)), strict=True):
        _reduced(part[lo:hi], [p[lo:hi] for p in parts], factors)


def all_gather(parts: Sequence[Tensor], bounds: Sequence[tuple[int, int]]) -> None:
    """``bounds[p]`` of every part is filled from part p; what no bounds cover stays as it is."""
    for source, (lo, hi) in zip(parts, bounds, strict=True):
        for part in parts:
            _copy(part[lo:hi], source[lo:hi])


def all_to_all(parts: Sequence[Tensor]) -> list[Tensor]:
    """Chunk p of result q is chunk q of part p: a transpose of the matrix of chunks."""
    shape = len(parts), parts[0].numel() // len(parts)
    results = [torch.empty_like(part) for part in parts]
    for q, result in enumerate(results):
        for chunk, part in zip(result.view(shape), parts, strict=True):
            chunk.copy_(part.view(shape)[q])
    return results


def broadcast(parts: Sequence[Tensor], root: int) -> None:
    """Every part becomes the root's."""
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
