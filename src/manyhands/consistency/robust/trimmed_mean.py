"""Coordinate-wise trimmed mean (Yin, Chen, Ramchandran & Bartlett 2018, arXiv:1803.01498, definition 2).

    x[i] = mean of x_1[i], …, x_n[i] without the f largest and the f smallest      (the paper's β is f/n)

It averages n − 2f numbers where the median keeps one or two, so it wastes less of the workers' samples; and it must be
told f. f = 0 is the mean of all, each worker counting alike.

Bears f of n ≥ 2f + 1. Payload per rank and step: (P−1) · n elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.consistency.robust.aggregation import Aggregation, check_f
from manyhands.consistency.robust.ordering import ordered


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """``(n, numel) → (numel,)``; n > 2f."""
    return torch.stack(ordered(rows)[f : len(rows) - f]).mean(dim=0)


@dataclass(frozen=True)
class TrimmedMean(Aggregation):
    """Of every coordinate the mean without the f largest and f smallest; bears f of at least 2f + 1 workers."""

    name: ClassVar[str] = "trimmed_mean"
    paper: ClassVar[Reference] = Reference(
        "Yin, Chen, Ramchandran & Bartlett",
        "Byzantine-robust distributed learning: towards optimal statistical rates",
        2018,
        "ICML, arXiv:1803.01498",
        survey="VI-A",
    )
    needs: ClassVar[str] = "n ≥ 2f + 1"

    f: int = 1

    def __post_init__(self) -> None:
        check_f(self.f)

    @property
    def fewest(self) -> int:
        """2f + 1: something must be left between what is cut off."""
        return 2 * self.f + 1

    def bears(self, vectors: int) -> int:
        """What it was told."""
        return self.f

    def without(self, failed: int) -> Self:
        """Cuts off fewer."""
        return replace(self, f=self.f - failed)

    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Aggregation.combine`."""
        return [trimmed_mean(rows, self.f) for rows in parts]
