"""A number with its unit and its source, and what is plausible for it.

A figure keeps the unit in which it was written, so that a file reads as its source does; everything that computes takes
`Figure.si`: bytes, seconds, bytes per second, operations per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Unit → (what it measures, factor to SI). Network links are sold in bits, so both are here and neither is guessed.
UNITS: dict[str, tuple[str, float]] = {
    "FLOP/s": ("operations", 1.0),
    "GFLOP/s": ("operations", 1e9),
    "TFLOP/s": ("operations", 1e12),
    "PFLOP/s": ("operations", 1e15),
    "B/s": ("rate", 1.0),
    "MB/s": ("rate", 1e6),
    "GB/s": ("rate", 1e9),
    "TB/s": ("rate", 1e12),
    "bit/s": ("rate", 0.125),
    "Mbit/s": ("rate", 0.125e6),
    "Gbit/s": ("rate", 0.125e9),
    "B": ("size", 1.0),
    "kB": ("size", 1e3),
    "MB": ("size", 1e6),
    "GB": ("size", 1e9),
    "TB": ("size", 1e12),
    "KiB": ("size", 2.0**10),
    "MiB": ("size", 2.0**20),
    "GiB": ("size", 2.0**30),
    "TiB": ("size", 2.0**40),
    "s": ("time", 1.0),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
    "count": ("number", 1.0),
    "ratio": ("share", 1.0),
    "%": ("share", 0.01),
}


@dataclass(frozen=True)
class Figure:
    """``Figure(2039, "GB/s", "NVIDIA A100 datasheet")``; ``spread`` is the relative one of a measured value."""

    value: float
    unit: str
    source: str
    spread: float | None = None

    @property
    def si(self) -> float:
        """In bytes, seconds, bytes per second, operations per second, or as a plain number."""
        return self.value * UNITS[self.unit][1]

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ±{100 * self.spread:.2g} %"
        return f"{self.value:g} {self.unit}{spread}"


@dataclass(frozen=True)
class Plausible:
    """What a figure is about and between which values (SI) one can believe it."""

    about: str
    measures: str
    least: float
    most: float
    example: str  # as a file would have it

    @property
    def units(self) -> list[str]:
        """The units in which it can be written."""
        return [unit for unit, (measures, _) in UNITS.items() if measures == self.measures]

    def range(self) -> str:
        """For a message: both ends in a unit that reads well."""
        return f"{_readable(self.least, self.measures)} and {_readable(self.most, self.measures)}"

    def complaint(self, value: float, unit: str) -> str | None:
        """What is wrong with so much of this unit; None: it is believable."""
        if unit not in self.units:
            known = unit in UNITS
            said = f"{unit!r} measures a {UNITS[unit][0]}" if known else f"there is no unit {unit!r}"
            return f"{said}; {self.about} is given in {', '.join(self.units)}."
        if not math.isfinite(value):
            return f"{value} {unit} is no finite number."
        if not self.least <= value * UNITS[unit][1] <= self.most:
            return f"{value:g} {unit} cannot be right: {self.about} lies between {self.range()}. Is the unit meant?"
        return None


def _readable(si: float, measures: str) -> str:
    """``2e9`` of a rate as ``2 GB/s``: in the largest decimal unit of which there is at least one."""
    units = [(u, f) for u, (m, f) in UNITS.items() if m == measures and "bit" not in u and "i" not in u and u != "%"]
    if measures in ("number", "share"):
        return f"{si:g}"
    unit, factor = max(((u, f) for u, f in units if f <= si * (1 + 1e-12)), key=lambda x: x[1], default=units[-1])
    return f"{si / factor:g} {unit}"
