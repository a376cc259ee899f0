"""From values to places on an axis, and the ticks between its ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manyhands.studies.report.lettering import number

#: Beyond it a difference of two values is no longer a float that can be divided by; charts stop there.
LARGEST = 1e150


@dataclass(frozen=True)
class Scale:
    """An axis: ``at`` gives 0 at its low end and 1 at its high end."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Between 0 and 1 for what lies on the axis; what lies beyond an end is put on it."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log10(value / self.low) / math.log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> tuple[str, ...]:
        """A text for each tick, with as many digits as tell neighbours apart."""
        for digits in range(3, 17):
            found = tuple(number(tick, digits) for tick in self.ticks)
            if len(set(found)) == len(found) and all(
                math.isclose(tick, float(f"{tick:.{digits - 1}e}"), rel_tol=1e-9) for tick in self.ticks
            ):
                return found
        return tuple(map(number, self.ticks))


def shown(value: float) -> float:
    """The value, or the end of what can be drawn."""
    return min(max(value, -LARGEST), LARGEST)


def positive(value: float) -> float:
    """The same on a logarithmic axis."""
    return min(max(value, 1 / LARGEST), LARGEST)


def scale(values: Iterable[float], *, log: bool = False, zero: bool = False, outward: bool = True) -> Scale:
    """An axis for these. ``zero``: from 0. ``outward``: it ends at ticks, so that nothing lies beyond the last."""
    if log:
        return _log([positive(v) for v in values if v > 0], outward)
    found = [shown(v) for v in values]
    low, high = min(found, default=0.0), max(found, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    least = max(1e-9 * max(abs(low), abs(high)), 1 / LARGEST)
    if high - low < least:
        wider = max(0.1 * abs(high), least) if high else 1.0
        low, high = (low, high + wider) if zero and low >= 0 else (low - wider, high + wider)
    step = _step(high - low)
    if outward:
        low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    return Scale(low, high, False, _multiples(low, high, step))


def _step(span: float, about: int = 5) -> float:
    """1, 2 or 5 times a power of ten, for about five ticks."""
    power = 10.0 ** math.floor(math.log10(span / about))
    return next((m * power for m in (1, 2, 5) if span / (m * power) <= about + 0.5), 10 * power)


def _multiples(low: float, high: float, step: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    digits = 2 - math.floor(math.log10(step))
    return tuple(round(i * step, digits) if abs(digits) < 300 else i * step for i in range(first, last + 1))


def _log(values: Sequence[float], outward: bool) -> Scale:
    low, high = min(values, default=1.0), max(values, default=10.0)
    if high / low < 1.05:
        low, high = low / 1.5, high * 1.5
    decades = math.log10(high / low)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    mantissas = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    every = max(1, math.ceil(decades / 7))
    candidates = [float(f"{m}e{k}") for k in range(first, last + 1) if k % every == 0 for m in mantissas]
    if decades < 0.6:
        step = _step(high - low)
        candidates = list(_multiples(max(low - step, step), high + step, step))
    if outward:
        low = max((t for t in candidates if t <= low * (1 + 1e-9)), default=low)
        high = min((t for t in candidates if t >= high * (1 - 1e-9)), default=high)
    return Scale(low, high, True, tuple(t for t in candidates if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)))
