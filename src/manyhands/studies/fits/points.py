"""What every fit does with its points: check them, gather the repeats, draw them again, and doubt the result.

Repeats at the same worker count or batch are averaged: least squares on the means, weighted by their number, finds the
same parameters as least squares on all points. The bootstrap draws cases within each count. It draws n − 1 of n and not
n of n: the variance of their mean is then s²/n without bias, where n draws give (n − 1)/n of it, half for two repeats
(McCarthy & Snowden, The bootstrap and finite population sampling, 1985). What the means deviate is then widened by
t(Σ (n − 1))/1.96, Student's share for a spread that is known from few cases.

An approximation: of 100 intervals that should cover the truth 95 times, 87 to 92 do with 2 repeats of each count, 89 to
95 with 3, and 91 to 95 with 5 or 10 (400 simulations of each law, normal relative errors of 5 or 10 %). An interval
speaks of the repeats' spread only, not of a law that misses a little. Where one count was measured only once there is
none: nothing is known of its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from manyhands.studies.fits.estimate import Array, CannotFit, portions, short
from manyhands.studies.fits.student import student_t

#: A law that typically misses by more than this factor is not the law of these data. Own judgement: speeds measured on
#: an ordinary machine repeat to 5 or 10 %, and their means better.
FAR = 1.25
#: The same for noise: steps to a target and norms of gradients spread more than times do. Own judgement.
FAR_FOR_NOISE = 1.5
#: Within this factor a law follows whatever its R²: where nothing varies, R² compares noise with noise.
CLOSE = 1.05
#: The 97.5 % quantile of the normal distribution.
_NORMAL = 1.959964
#: Relative to what was measured, less than this is rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Groups:
    """Measurements ``y`` gathered by the ``x`` at which they were made, both in ascending order."""

    x: Array
    y: tuple[Array, ...]

    @property
    def means(self) -> Array:
        """One for each x."""
        return np.array([each.mean() for each in self.y])

    @property
    def counts(self) -> Array:
        """How many measurements each is the mean of."""
        return np.array([each.size for each in self.y], dtype=np.float64)

    def redrawn(self, draws: int, seed: int) -> Array | None:
        """Means for each draw and x, as the module says; ``None`` if an x has one case only."""
        if any(each.size < 2 for each in self.y):
            return None
        rng = np.random.default_rng(seed)
        drawn = np.stack([_means(each, draws, rng) for each in self.y], axis=-1)
        freedom = sum(each.size - 1 for each in self.y)
        wider = self.means + student_t(freedom) / _NORMAL * (drawn - self.means)
        return np.maximum(wider, self.means / 10)  # all are above 0, and so are their means


def _means(cases: Array, draws: int, rng: np.random.Generator) -> Array:
    n = cases.size
    return np.concatenate([cases[rng.integers(0, n, (rows, n - 1))].mean(-1) for rows in portions(draws, n)])


def gathered(
    law: str,
    points: Iterable[tuple[float, float]],
    *,
    x: str,
    y: str,
    unknowns: int,
    least: float = 0.0,
    beyond: float = 0.0,
    measure: Callable[[float], float] = float,
) -> Groups | CannotFit:
    """Points by ascending x, or why they will not do.

    ``x`` and ``y`` are their names, one of each; ``least`` is the smallest x there can be; only points beyond
    ``beyond`` are kept; ``measure`` is what is fitted instead of y itself.
    """
    found = [(float(a), float(b)) for a, b in points]
    bad = [point for point in found if not all(0 < each < math.inf for each in point)]
    if bad:
        at, what = bad[0]
        return CannotFit(law, f"each {x} and {y} must be finite and above 0, and {y} {what:g} at {x} {at:g} is not.")
    small = [a for a, _ in found if a < least]
    if small:
        return CannotFit(law, f"each {x} must be at least {least:g}, and {small[0]:g} is among them.")
    by_x: dict[float, list[float]] = {}
    for a, b in sorted(found):
        if a > beyond:
            by_x.setdefault(a, []).append(measure(b))
    if len(by_x) <= unknowns:
        above = f" above {beyond:g}" if beyond else ""
        there = ", ".join(f"{each:g}" for each in by_x)
        return CannotFit(
            law,
            f"{counted(unknowns + 1, f'distinct {x}')}{above} are needed for {counted(unknowns, 'unknown')}, "
            + (
                f"and there {'is' if len(by_x) == 1 else 'are'} {len(by_x)} ({there})."
                if by_x
                else "and there is none."
            ),
        )
    return Groups(np.array(list(by_x)), tuple(np.array(each) for each in by_x.values()))


def follows(law: str, groups: Groups, fitted: Array, *, x: str, far: float = FAR) -> float | CannotFit:
    """The share by which ``fitted`` typically misses the means, or that this is too much to speak of the law.

    The root mean square of log(fitted/measured), which is the same for a quantity and its inverse. A law that misses by
    more than ``CLOSE`` must also have R² ≥ 0 on this scale: do better than one number for all.
    """
    measured, weights = np.log(groups.means), groups.counts / groups.counts.sum()
    off = np.log(fitted) - measured
    unexplained = float(weights @ off**2)
    total = float(weights @ (measured - weights @ measured) ** 2)
    miss = math.exp(math.sqrt(unexplained)) - 1
    if miss <= CLOSE - 1 or (miss <= far - 1 and unexplained <= total):
        return miss
    worst = int(np.argmax(np.abs(off)))
    factor = math.exp(abs(float(off[worst])))
    return CannotFit(
        law,
        f"the data do not follow it; the nearest curve misses by {percent(miss)} typically and by a factor of "
        f"{short(factor)} at {x} {groups.x[worst]:g}.",
    )


def counted(number: int, noun: str) -> str:
    """``1 batch``, ``2 batches``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def percent(share: float) -> str:
    """Of one hundred, two digits for less than ten; nobody measures a thousandth."""
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
