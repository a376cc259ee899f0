"""The one definition of how vectors of several ranks are summed: in rank order, whoever does the adding.

Every transport that reduces by itself (shared, threads, simulated) calls these, so that their results are equal bit
for bit and do not change from run to run; gloo, NCCL and MPI sum in an order of their own and agree only to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.errors import Vetoed

#: Slice bounds are multiples of this many elements: two AVX-512 registers of bfloat16, so that an elementwise kernel
#: treats every element alike (vector body or scalar tail) whichever slice it falls in, and no two ranks' slices share
#: a cache line.
SLICE_QUANTUM = 64


@functools.lru_cache(maxsize=1024)
def slices(numel: int, size: int) -> tuple[tuple[int, int], ...]:
    """Cut ``numel`` elements into ``size`` contiguous slices ``[lo, hi)``; the last ones may be shorter or empty."""
    chunk = -(-numel // (size * SLICE_QUANTUM)) * SLICE_QUANTUM
    return tuple((min(r * chunk, numel), min((r + 1) * chunk, numel)) for r in range(size))


def check_veto(weights: Sequence[float | None]) -> None:
    """Raise `Vetoed`, naming the first rank whose weight is not finite, if there is one."""
    for rank, weight in enumerate(weights):
        if weight is not None and not math.isfinite(weight):
            raise Vetoed(rank)


def coefficients(weights: Sequence[float | None]) -> list[float] | None:
    """``w_p / Σ w`` for each rank, or None for a plain sum; all zero when nobody has weight.

    Raises `Vetoed` as `check_veto` does.
    """
    first = weights[0]
    if first is None and all(w is None for w in weights):
        return None
    if first and math.isfinite(first) and all(w == first for w in weights):
        return [1.0 / len(weights)] * len(weights)  # the usual case, and exact
    total = float(sum(w or 0.0 for w in weights))
    if not math.isfinite(total):
        check_veto(weights)
    return [(w or 0.0) / total if total else 0.0 for w in weights]


def reduce_into(out: Tensor, parts: Sequence[Tensor], factors: Sequence[float] | None = None) -> None:
    """``out ← Σ_p factors[p] · parts[p]`` in rank order; ``out`` may be one of the parts.

    Half precision is accumulated in float32 and rounded once. A part with factor 0 is not read: a rank without
    samples may hold anything. One part with factor 1 is left untouched bit for bit.
    """
    if factors is None:
        _add_into(out, parts)
    elif _alike_and_exact(factors) and out.dtype not in _HALF:
        # Scaling by a power of two commutes with rounding (but at the ends of the exponent range): once is enough.
        _add_into(out, parts)
        if factors[0] != 1.0:
            out.mul_(_constant(factors[0], out.dtype, out.device))
    else:
        _add_scaled_into(out, [(p, f) for p, f in zip(parts, factors, strict=True) if f != 0.0])


_HALF = (torch.float16, torch.bfloat16)


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A kept 0-dim tensor: torch takes 1 µs to make one of a Python number, more than the product of a short slice."""
    return torch.tensor(value, dtype=dtype, device=device)


def _alike_and_exact(factors: Sequence[float]) -> bool:
    first = factors[0]
    return math.frexp(first)[0] == 0.5 and all(f == first for f in factors)


def _add_into(out: Tensor, parts: Sequence[Tensor]) -> None:
    if len(parts) == 2 and out.dtype not in _HALF:
        torch.add(parts[0], parts[1], out=out)
    else:
        _add_scaled_into(out, [(p, 1.0) for p in parts])


def _add_scaled_into(out: Tensor, chosen: list[tuple[Tensor, float]]) -> None:
    if not chosen:
        out.zero_()
        return
    if out.dtype in _HALF and len(chosen) > 1:
        wide = chosen[0][0].to(torch.float32, copy=True).mul_(chosen[0][1])
        for part, factor in chosen[1:]:
            wide.add_(part.to(torch.float32), alpha=factor)
        out.copy_(wide)
        return
    aliased = next((i for i, (p, _) in enumerate(chosen) if p.data_ptr() == out.data_ptr()), 0)
    if aliased > 1:
        # ``out`` is a later summand: it must survive until its turn.
        chosen[aliased] = (chosen[aliased][0].clone(), chosen[aliased][1])
    (first, f0), rest = chosen[0], chosen[1:]
    if not rest:
        if f0 != 1.0:
            torch.mul(first, f0, out=out)
        elif first.data_ptr() != out.data_ptr():
            out.copy_(first)
        return
    (second, f1), rest = rest[0], rest[1:]
    if f0 == 1.0:
        torch.add(first, second, alpha=_scalar(f1, out), out=out)
    else:
        # f0·first must be rounded before the addition in every case, so that the result does not depend on which
        # summand ``out`` happens to be.
        scaled = torch.mul(first, f0) if second.data_ptr() == out.data_ptr() else torch.mul(first, f0, out=out)
        torch.add(scaled, second, alpha=_scalar(f1, out), out=out)
    for part, factor in rest:
        out.add_(part, alpha=_scalar(factor, out))


def _scalar(factor: float, like: Tensor) -> float | int:
    return factor if like.dtype.is_floating_point else int(factor)
