"""What the machine itself does: memory, arithmetic, the dispatch of an operator, and how evenly.

    bandwidth    a ← b + s c on vectors that no cache holds (the triad of STREAM, McCalpin 1995), 1 … cores processes
    products     a large matrix product on one core, and on all of them at once
    dispatch     an operator on one number
    jitter       the same small piece of work over and over on all cores: quantiles over the median

Each is a job of a team with one process a core and one thread a process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from manyhands.modelling.calibration.stamps import median_and_spread
from manyhands.training.member import Member

#: Floats of a vector of the triad: three of them are 192 MB, more than the last cache of most machines.
TRIAD = 16 * 2**20
#: Rows of the products, by dtype; some 20 ms each on one core.
PRODUCTS = {"float32": 768, "float64": 640, "bfloat16": 512}
#: One product of this size takes some 0.1 ms.
PIECE = 160
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def _for(seconds: float, work: Callable[[], object], *, fewest: int = 3) -> list[float]:
    """How long each piece took, for about so long."""
    work()
    clock, taken = time.perf_counter, list[float]()
    end = clock() + seconds
    while len(taken) < fewest or clock() < end:
        began = clock()
        work()
        taken.append(clock() - began)
    return taken


def _together(member: Member, active: int, seconds: float, make: Callable[[], Callable[[], object]]) -> Any:
    """The times of the first ``active`` ranks at once; the others wait at a barrier, asleep."""
    work = make() if member.comm.rank < active else None
    member.comm.barrier()
    taken = None if work is None else _for(seconds, work)
    member.comm.barrier()
    return taken


def bandwidth(member: Member, active: int, floats: int, seconds: float) -> list[float] | None:
    """Seconds of each triad of this rank, on vectors of so many ``floats``."""

    def make() -> Callable[[], object]:
        a, b, c = (torch.ones(floats) for _ in range(3))
        return lambda: torch.add(b, c, alpha=3.0, out=a)

    found: list[float] | None = _together(member, active, seconds, make)
    return found


def products(member: Member, active: int, dtype: str, seconds: float) -> list[float] | None:
    """Seconds of each product of this rank."""
    n = PRODUCTS[dtype]

    def make() -> Callable[[], object]:
        x = torch.full((n, n), 0.5, dtype=getattr(torch, dtype))
        out = torch.empty_like(x)
        return lambda: torch.mm(x, x, out=out)

    found: list[float] | None = _together(member, active, seconds, make)
    return found


def dispatch(member: Member, seconds: float) -> list[float] | None:
    """Seconds of one operator, of each stretch of a hundred; rank 0 alone."""

    def make() -> Callable[[], object]:
        x = torch.ones(1)

        def hundred() -> None:
            for _ in range(100):
                x.add_(1.0)

        return hundred

    taken = _together(member, 1, seconds, make)
    return None if taken is None else [t / 100 for t in taken]


def jitter(member: Member, seconds: float) -> list[float]:
    """Seconds of each piece, all ranks at once."""

    def make() -> Callable[[], object]:
        x = torch.full((PIECE, PIECE), 0.5)
        out = torch.empty_like(x)
        return lambda: torch.mm(x, x, out=out)

    found: list[float] = _together(member, member.comm.size, seconds, make)
    return found


# -- what comes of it --------------------------------------------------------------------------------------------------


def triad_Bps(by_rank: Sequence[Sequence[float] | None], floats: int) -> tuple[float, float]:
    """Bytes a second of all ranks that took part, and the spread; two vectors read, one written, as STREAM counts."""
    return _rate(by_rank, 3 * 4 * floats)


def product_flops(by_rank: Sequence[Sequence[float] | None], dtype: str) -> tuple[float, float]:
    """Operations a second of all ranks that took part, and the spread."""
    return _rate(by_rank, 2 * PRODUCTS[dtype] ** 3)


def _rate(by_rank: Sequence[Sequence[float] | None], amount: float) -> tuple[float, float]:
    each = [median_and_spread(np.array(taken)) for taken in by_rank if taken is not None]
    return sum(amount / middle for middle, _ in each), max(spread for _, spread in each)


def jitter_of(by_rank: Sequence[Sequence[float]]) -> dict[str, list[float] | float]:
    """Quantiles over the median, of all ranks; the standard deviation, of the middle 98 %; and the mean of the maxima.

    ``slowest``: of pieces at the same place in the order, the slowest rank's, on average: what lock-step pays.
    """
    ratios = [np.array(taken) / statistics.median(taken) for taken in by_rank]
    every = np.concatenate(ratios)
    kept = every[every <= np.quantile(every, 0.99)]
    n = min(map(len, ratios))
    return {
        "quantiles": list(QUANTILES),
        "ratios": [float(q) for q in np.quantile(every, QUANTILES)],
        "deviation": float(kept.std()),
        "slowest": float(np.max([r[:n] for r in ratios], axis=0).mean()),
    }
