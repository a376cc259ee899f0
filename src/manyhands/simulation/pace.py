"""How long a worker computes: the cost of a step, stretched by what makes workers late.

A step's cost is what forward and backward take over a share, the optimizer over all elements, and what is left of a
step: fetching the batch, a strategy's own arithmetic. It is given, measured in this process on one worker's share for
a quarter of a second, or measured in as many processes as there will be (`modelling.profile`). Known at several shares,
it is a straight line between neighbours; at one, a share takes in proportion (approximation: measured steps are
piecewise linear in the batch, not proportional). A slice of an update takes in proportion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from manyhands.communication.compression.compressor import Compressor
from manyhands.contract import Batch
from manyhands.partition.data import DataReplica
from manyhands.simulation.coding import Coding

#: As long is measured, after as many steps to warm up.
MEASURE_S = 0.25
WARM_UP = 5


@dataclass(frozen=True)
class StepCost:
    """``compute_s`` for a share of ``samples``, ``update_s`` for the optimizer over ``elements``, ``rest_s`` a step.

    ``points``: what computing takes at several shares, ``(samples, seconds)`` by samples. ``coding``: of compressors.
    """

    compute_s: float
    update_s: float
    samples: float
    elements: int
    rest_s: float = 0.0
    points: tuple[tuple[float, float], ...] = ()
    coding: Coding = field(default_factory=Coding)

    def compute(self, samples: Any) -> Any:
        """Forward and backward, over a number of samples or a vector of such; nothing over none."""
        if len(self.points) < 2:
            return self.compute_s * samples / self.samples
        return _between(self.points, samples)

    def update(self, elements: int) -> float:
        """The optimizer."""
        return self.update_s * elements / self.elements

    def times(self, factor: float) -> StepCost:
        """On a machine that takes so many times as long."""
        points = tuple((samples, factor * seconds) for samples, seconds in self.points)
        seconds = {name: factor * getattr(self, name) for name in ("compute_s", "update_s", "rest_s")}
        return replace(self, points=points, **seconds)


class Pace:
    """One worker's, whose ``factors`` are numbers; or that of all of them at once, whose factors are vectors."""

    def __init__(self, cost: StepCost, factors: Iterator[Any]) -> None:
        self._cost, self._factors = cost, factors
        self.rest_s = cost.rest_s  #: Of every step, beside computing and updating.

    def compute_s(self, samples: Any) -> Any:
        """Of the next step: a number, or of all workers at once a vector, and then so may ``samples`` be."""
        return self._cost.compute(samples) * next(self._factors)

    def update_s(self, elements: int) -> float:
        """Of one slice."""
        return self._cost.update(elements)

    def coding_s(self, compressor: Compressor, numel: int, encoded: float, decoded: float) -> float:
        """Of making and reading payloads of so many vectors."""
        return self._cost.coding.seconds(compressor, numel, encoded, decoded)


def _between(points: Sequence[tuple[float, float]], samples: Any) -> Any:
    """Straight lines from point to point, the outermost ones drawn on; never below 0, and 0 for no samples."""
    at, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    slopes = np.diff(seconds) / np.diff(at)
    part = np.clip(np.searchsorted(at, samples, side="right") - 1, 0, len(slopes) - 1)
    found = np.maximum(seconds[part] + slopes[part] * (samples - at[part]), 0.0) * (np.asarray(samples) > 0)
    return found if np.ndim(samples) else float(found)


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
