"""Coordinate-wise median (Yin, Chen, Ramchandran & Bartlett 2018, arXiv:1803.01498, definition 1).

    x[i] = median(x_1[i], …, x_n[i])      of an even number, the mean of the two in the middle

Each coordinate is decided for itself, so the result need not be any worker's vector; it lies between the smallest and
the largest value of the honest ones as long as these are more than half.

Bears ⌊(n−1)/2⌋ of n, without being told how many there are. Payload per rank and step: (P−1) · n elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.consistency.robust.ordering import ordered


def median(rows: Tensor) -> Tensor:
    """``(n, numel) → (numel,)``."""
    n, vectors = len(rows), ordered(rows)
    low, high = vectors[(n - 1) // 2], vectors[n // 2]
    return low if n % 2 else (low + high) / 2


@dataclass(frozen=True)
class Median(Aggregation):
    """Of every coordinate the median; bears a minority, fewer than half of the workers."""

    name: ClassVar[str] = "median"
    paper: ClassVar[Reference] = Reference(
        "Yin, Chen, Ramchandran & Bartlett",
        "Byzantine-robust distributed learning: towards optimal statistical rates",
        2018,
        "ICML, arXiv:1803.01498",
        survey="VI-A",
    )

    def bears(self, vectors: int) -> int:
        """Fewer than half."""
        return max(0, vectors - 1) // 2

    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Aggregation.combine`."""
        return [median(rows) for rows in parts]
