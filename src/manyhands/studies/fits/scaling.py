"""Serial fractions: how much of the work no number of workers makes shorter.

    Amdahl 1967      S = 1 / (s + (1 − s)/p)     s: share of one worker's time; the work is fixed (strong scaling)
    Gustafson 1988   S = p − s (p − 1)           s: share of the p workers' time; the work grows with p (weak scaling)

p: workers, S: speed-up over one worker, s: serial fraction, from 0 (all is divided) to 1 (nothing is). The two s are
different quantities. Both laws know no cost that grows with p; `manyhands.studies.fits.universal` has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyhands.studies.fits.estimate import DRAWS, Array, CannotFit, Estimate, interval, short
from manyhands.studies.fits.points import FAR, follows, gathered, percent

_AMDAHL, _GUSTAFSON = "Amdahl's law", "Gustafson's law"


@dataclass(frozen=True)
class AmdahlFit:
    """Amdahl's law with the serial fraction that fits best."""

    serial: Estimate
    workers: tuple[float, ...]  # the counts above 1 that it was fitted to
    miss: float  # typical, as a share

    @property
    def limit(self) -> float:
        """The speed-up that no number of workers exceeds: 1/s."""
        return 1 / self.serial.value if self.serial.value else math.inf

    def predict(self, workers: float) -> float:
        """Speed-up over one worker."""
        s = self.serial.value
        return 1 / (s + (1 - s) / workers)

    def sentence(self) -> str:
        """What it says, with how well it fits."""
        bound = f"at most {short(self.limit)}× is gained" if self.serial.value else "no limit is in sight"
        return (
            f"By Amdahl's law a serial fraction of {self.serial} explains the speed-ups with {_range(self.workers)}, "
            f"off by {percent(self.miss)} typically; however many workers there are, {bound}."
        )


@dataclass(frozen=True)
class GustafsonFit:
    """Gustafson's law with the serial fraction that fits best."""

    serial: Estimate
    workers: tuple[float, ...]  # the counts above 1 that it was fitted to
    miss: float  # typical, as a share

    def predict(self, workers: float) -> float:
        """Scaled speed-up over one worker."""
        return workers - self.serial.value * (workers - 1)

    def sentence(self) -> str:
        """What it says, with how well it fits."""
        return (
            f"By Gustafson's law a serial fraction of {self.serial} explains the scaled speed-ups with "
            f"{_range(self.workers)}, off by {percent(self.miss)} typically; each further worker adds "
            f"{1 - self.serial.value:.2f} of one."
        )


def amdahl(points: Iterable[tuple[float, float]], *, draws: int = DRAWS, seed: int = 0) -> AmdahlFit | CannotFit:
    """Amdahl's serial fraction from points (workers, speed-up), several for a count where it was repeated.

    Least squares in 1/S, which is linear in s:  1/S = 1/p + s (1 − 1/p). One worker says nothing and is left out; at
    least two other counts are needed, one of them to contradict. The interval draws within each count.

        amdahl([(2, 1.6), (4, 2.3)]).predict(8)    # 2.9
    """
    found = _fraction(_AMDAHL, points, lambda v: 1 / v, lambda p: p**0, draws=draws, seed=seed)
    return found if isinstance(found, CannotFit) else AmdahlFit(*found)


def gustafson(points: Iterable[tuple[float, float]], *, draws: int = DRAWS, seed: int = 0) -> GustafsonFit | CannotFit:
    """Gustafson's serial fraction from points (workers, scaled speed-up): samples/s over those of one worker.

    Least squares in the efficiency S/p, which is linear in s:  S/p = 1 + s (1/p − 1); in S itself the largest count
    would decide alone. One worker says nothing and is left out; at least two other counts are needed, one of them to
    contradict. The interval draws within each count.

        gustafson([(2, 1.9), (4, 3.7)]).predict(8)    # 7.3
    """
    found = _fraction(_GUSTAFSON, points, lambda v: v, lambda p: p**-2, draws=draws, seed=seed)
    return found if isinstance(found, CannotFit) else GustafsonFit(*found)


def _fraction(
    law: str,
    points: Iterable[tuple[float, float]],
    form: Callable[[Any], Any],
    weight: Callable[[Array], Array],
    *,
    draws: int,
    seed: int,
) -> tuple[Estimate, tuple[float, ...], float] | CannotFit:
    """Both laws are f(S) = f(p) + s (1 − f(p)), Amdahl's with f(v) = 1/v and Gustafson's with f(v) = v."""
    points = list(points)
    groups = gathered(law, points, x="worker count", y="speed-up", unknowns=1, least=1, beyond=1, measure=form)
    if isinstance(groups, CannotFit):
        return groups
    alone = np.mean([speed_up for workers, speed_up in points if workers == 1] or [1.0])
    if not 1 / FAR <= alone <= FAR:
        return CannotFit(law, f"a speed-up is measured against one worker, whose own is 1, and here it is {alone:.3g}.")
    divided, weights = form(groups.x), groups.counts * weight(groups.x)
    value = float(_serial(groups.means, divided, weights))
    fitted = divided + value * (1 - divided)
    miss = follows(law, groups, fitted, x="worker count")
    if isinstance(miss, CannotFit):
        return miss
    drawn = groups.redrawn(draws, seed)
    spread = None if drawn is None else _serial(drawn, divided, weights)
    return interval(value, spread), tuple(groups.x.tolist()), miss


def _serial(means: Array, divided: Array, weights: Array) -> Array:
    """The serial fraction along the last axis, kept within 0 … 1."""
    lost = 1 - divided
    return np.clip((means - divided) @ (weights * lost) / (weights @ lost**2), 0.0, 1.0)


def _range(workers: tuple[float, ...]) -> str:
    return f"{workers[0]:g} to {workers[-1]:g} workers"
