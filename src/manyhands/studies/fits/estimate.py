"""A number with its 95 % interval, and the percentile bootstrap that finds the interval.

    draw n of the n values with replacement, take the statistic, 2,000 times;
    the interval reaches from the 2.5 % to the 97.5 % quantile of what comes out

Efron 1979. An approximation that is too narrow for few values: the median's interval never leaves the range of the
values, so that it covers the true median at best in 1 − 2^(1−n) of cases: 50 % for 2 values, 75 % for 3, 94 % for 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: How often a bootstrap draws; Efron & Tibshirani, An Introduction to the Bootstrap (1993), ask for 1,000 or more.
DRAWS = 2000
#: Numbers drawn at a time, 8 MB.
_AT_ONCE = 1_000_000
#: The quantiles between which 95 % lies.
TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; ``None`` for both ends where the data do not give one."""

    value: float
    low: float | None = None
    high: float | None = None

    def contains(self, value: float) -> bool | None:
        """Whether the interval does; ``None`` if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{short(self.value)} [interval not known]"
        return f"{short(self.value)} [{short(self.low)} … {short(self.high)}]"


@dataclass(frozen=True)
class CannotFit:
    """No fit, and why: what there is, and what would be needed."""

    law: str
    reason: str

    def sentence(self) -> str:
        """Both in one sentence."""
        return f"{self.law} cannot be fitted: {self.reason}"


#: A number from many along an ``axis``, as numpy's ``median``, ``mean`` and ``std``.
Statistic = Callable[..., Any]


def short(value: float) -> str:
    """Three digits, without exponents where people do not expect them."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "unknown"
    if 1e3 <= abs(value) < 1e12:
        return f"{float(f'{value:.3g}'):,.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def interval(value: float, draws: Array | None) -> Estimate:
    """An estimate from its value and what the bootstrap drew; quantiles are drawn values, so infinity is one too."""
    if draws is None:
        return Estimate(value)
    low = float(np.quantile(draws, TAILS[0], method="lower"))
    high = float(np.quantile(draws, TAILS[1], method="higher"))
    return Estimate(value, low, high)


def portions(draws: int, size: int) -> list[int]:
    """How many draws of ``size`` numbers to make at a time, so that many repeats do not fill the memory."""
    rows = max(1, _AT_ONCE // size)
    return [min(rows, draws - done) for done in range(0, draws, rows)]


def bootstrap(
    values: Iterable[float], statistic: Statistic = np.median, *, draws: int = DRAWS, seed: int = 0
) -> Estimate | CannotFit:
    """A statistic of repeats, in their unit, with Efron's percentile interval.

    One value has no interval. The order of the values changes nothing.

        bootstrap([0.020, 0.022, 0.021]).value    # 0.021
    """
    found = np.sort(np.asarray(list(values), dtype=np.float64))
    if not found.size:
        return CannotFit("A statistic", "at least 1 value is needed, and there is none.")
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        return CannotFit("A statistic", f"every value must be finite, and {bad} of {found.size} are not.")
    value = float(statistic(found, axis=-1))
    if found.size == 1:
        return Estimate(value)
    rng, n = np.random.default_rng(seed), found.size
    drawn = [statistic(found[rng.integers(0, n, (rows, n))], axis=-1) for rows in portions(draws, n)]
    return interval(value, np.concatenate(drawn))


def bootstrap_ratio(pairs: Iterable[tuple[float, float]], *, draws: int = DRAWS, seed: int = 0) -> Estimate | CannotFit:
    """The median over pairs (a, b) of a/b, with its interval: a speed-up, where b is the base of the same repeat.

    A ratio within a repeat does not see a machine that drifts from repeat to repeat.
    """
    found = [(float(a), float(b)) for a, b in pairs]
    bad = [pair for pair in found if not all(0 < each < math.inf for each in pair)]
    if bad:
        return CannotFit("A ratio", f"both of each pair must be finite and above 0, and {bad[0]} is among them.")
    if not found:
        return CannotFit("A ratio", "at least 1 pair is needed, and there is none.")
    return bootstrap([a / b for a, b in found], draws=draws, seed=seed)
