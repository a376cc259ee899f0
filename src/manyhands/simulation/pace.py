"""How long a worker computes: the cost of a step, stretched by what makes workers late.

A step's cost is two figures, of forward and backward over a share and of the optimizer over all elements; a share or a
slice of another size takes in proportion (approximation: measured steps are piecewise linear in the batch, not
proportional). They are given, or measured in this process on one worker's share for a quarter of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyhands.contract import Batch
from manyhands.partition.data import DataReplica

#: As long is measured, after as many steps to warm up.
MEASURE_S = 0.25
WARM_UP = 5


@dataclass(frozen=True)
class StepCost:
    """``compute_s`` for a share of ``samples``, ``update_s`` for the optimizer over ``elements``."""

    compute_s: float
    update_s: float
    samples: float
    elements: int

    def compute(self, samples: Any) -> Any:
        """Forward and backward, over a number of samples or a vector of such."""
        return self.compute_s * samples / self.samples

    def update(self, elements: int) -> float:
        """The optimizer."""
        return self.update_s * elements / self.elements


class Pace:
    """One worker's, whose ``factors`` are numbers; or that of all of them at once, whose factors are vectors."""

    def __init__(self, cost: StepCost, factors: Iterator[Any]) -> None:
        self._cost, self._factors = cost, factors

    def compute_s(self, samples: Any) -> Any:
        """Of the next step: a number, or of all workers at once a vector, and then so may ``samples`` be."""
        return self._cost.compute(samples) * next(self._factors)

    def update_s(self, elements: int) -> float:
        """Of one slice."""
        return self._cost.update(elements)


def measured(replica: DataReplica, batches: Callable[[int], Batch], elements: int) -> StepCost:
    """Of real steps here and now on one worker's shares, weights moving: medians of `MEASURE_S` after a warm-up."""
    compute: list[float] = []
    update: list[float] = []
    step, until = 0, float("inf")
    count = batches(0).count
    while step <= WARM_UP or time.perf_counter() < until:
        batch = batches(step)
        t0 = time.perf_counter()
        replica.gradients(batch)
        t1 = time.perf_counter()
        for piece in replica.pieces:
            replica.apply(piece, 0, piece.flat.numel())
        t2 = time.perf_counter()
        if step == 0 and replica.watching:
            replica.settle(replica.reached())
        if step == WARM_UP:
            until = t2 + MEASURE_S
            compute.clear()
            update.clear()
        compute.append(t1 - t0)
        update.append(t2 - t1)
        step += 1
    return StepCost(float(np.median(compute)), float(np.median(update)), count, elements)
