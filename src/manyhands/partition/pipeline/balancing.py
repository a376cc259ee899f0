"""A row of costs in contiguous runs of which the dearest is as cheap as can be (survey §V-C).

min over starts of max_k Σ_{i in run k} c_i,   by dynamic programming over the last run
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any


def balance(
    costs: Sequence[float],
    parameters: Sequence[int],
    stages: int,
    forbidden: Collection[int] = (),
    trains: Sequence[bool] | None = None,
) -> list[int]:
    """Where each of ``stages`` contiguous runs begins so that the largest sum of ``costs`` is least.

    Among equals the one whose largest sum of ``parameters`` is least. No run begins at a ``forbidden`` index, and each
    has one of those at least that ``trains`` says (None: all).
    """
    total = list(itertools.accumulate(costs, initial=0))
    learning = list(itertools.accumulate([True] * len(costs) if trains is None else trains, initial=0))
    limit = _largest(costs, stages, forbidden, lambda lo, hi: learning[hi] > learning[lo])[0]
    within = limit * (1 + 1e-9)
    return _largest(
        parameters,
        stages,
        forbidden,
        lambda lo, hi: learning[hi] > learning[lo] and total[hi] - total[lo] <= within,
    )[1]


def _largest(
    weights: Sequence[float], stages: int, forbidden: Collection[int], allowed: Any
) -> tuple[float, list[int]]:
    """The least possible largest sum, and where the runs begin; by dynamic programming over the last run."""
    n = len(weights)
    total = list(itertools.accumulate(weights, initial=0))
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by how many are in runs already
    for _ in range(stages):
        longer: dict[int, tuple[float, list[int]]] = {}
        for lo, (largest, starts) in best.items():
            for hi in range(lo + 1, n + 1):
                if (lo == 0 or lo not in forbidden) and allowed(lo, hi):
                    found = max(largest, total[hi] - total[lo])
                    if hi not in longer or found < longer[hi][0]:
                        longer[hi] = found, [*starts, lo]
        best = longer
    return best[n]
