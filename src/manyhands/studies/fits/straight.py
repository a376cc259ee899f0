"""Straight lines, in the data or in their logarithms, with Student's interval of the slope.

    slope       y = a + b x            b in the unit of y over that of x
    power law   y = a x^b              a straight line of log y on log x; b has no unit
    interval    b ± t(n − 2) √( Σ residual² / (n − 2) / Σ (x − x̄)² )

n: points, t: the 97.5 % quantile of Student's t. Exact for independent normal residuals of one size (in the power law:
of the logarithms), an approximation otherwise. A repeat counts as a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from manyhands.studies.fits.estimate import CannotFit, Estimate
from manyhands.studies.fits.points import counted, follows, gathered
from manyhands.studies.fits.student import student_t

_SLOPE, _POWER = "A slope", "A power law"
#: Variances from few repeats spread: of ten normal values by 47 %, √(2/9). So a power law may miss by a factor of 2.
_FAR = 2.0


@dataclass(frozen=True)
class SlopeFit:
    """The straight line that fits best."""

    slope: Estimate
    intercept: float
    points: int

    def predict(self, x: float) -> float:
        """y on the line."""
        return self.intercept + self.slope.value * x

    def sentence(self) -> str:
        """What it says, and whether it could be nothing."""
        none = ", which may be nothing" if self.slope.contains(0.0) else ""
        return f"Each unit of x changes y by {self.slope} over {counted(self.points, 'point')}{none}."


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent."""

    exponent: Estimate
    factor: float
    points: int
    miss: float  # typical, as a share

    def predict(self, x: float) -> float:
        """y on the curve, for x > 0."""
        return float(self.factor * x**self.exponent.value)

    def sentence(self) -> str:
        """What it says, and whether it could be nothing."""
        none = ", which may be no power at all" if self.exponent.contains(0.0) else ""
        return f"y goes as x to the power of {self.exponent} over {counted(self.points, 'point')}{none}."


def slope(points: Iterable[tuple[float, float]]) -> SlopeFit | CannotFit:
    """The slope of y on x by least squares, from points (x, y) of any sign, with Student's interval.

    At least three points, since two leave nothing to tell the spread from, at two or more different x.

        slope([(1, 2.0), (2, 3.1), (3, 3.9)]).slope.value    # 0.95
    """
    found = sorted((float(x), float(y)) for x, y in points)
    bad = [point for point in found if not all(math.isfinite(each) for each in point)]
    if bad:
        return CannotFit(_SLOPE, f"each point must be finite, and {bad[0]} is not.")
    if len(found) < 3:
        return CannotFit(_SLOPE, f"3 points are needed for 2 unknowns, and there {_are(len(found))}.")
    if found[0][0] == found[-1][0]:
        return CannotFit(_SLOPE, f"different x are needed, and all {len(found)} points have x = {found[0][0]:g}.")
    x, y = np.array(found).T
    unit = float(x[-1] - x[0])  # so that no square overflows or vanishes
    off = (x - x.mean()) / unit
    value = float(off @ (y - y.mean()) / (off @ off)) / unit
    intercept = float(y.mean() - value * x.mean())
    residuals = y - y.mean() - value * unit * off
    freedom = len(found) - 2
    half = student_t(freedom) * math.sqrt(float(residuals @ residuals / freedom / (off @ off))) / unit
    return SlopeFit(Estimate(value, value - half, value + half), intercept, len(found))


def power_law(points: Iterable[tuple[float, float]]) -> PowerLaw | CannotFit:
    """The exponent of y = a x^b by least squares on logarithms, from points (x, y) above 0, with Student's interval.

    At least three distinct x: two unknowns, one to contradict. For a variance of averages over P, b = −1 is expected.

        power_law([(1, 8.0), (2, 4.0), (4, 2.0)]).exponent.value    # -1
    """
    points = list(points)
    groups = gathered(_POWER, points, x="x", y="y", unknowns=2)
    if isinstance(groups, CannotFit):
        return groups
    line = slope((math.log(x), math.log(y)) for x, y in points)
    if isinstance(line, CannotFit):
        return CannotFit(_POWER, line.reason)
    fitted = np.exp(line.intercept + line.slope.value * np.log(groups.x))
    miss = follows(_POWER, groups, fitted, x="x", far=_FAR)
    if isinstance(miss, CannotFit):
        return miss
    return PowerLaw(line.slope, math.exp(line.intercept), line.points, miss)


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"
