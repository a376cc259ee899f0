"""Krum and Multi-Krum (Blanchard, El Mhamdi, Guerraoui & Stainer 2017, NeurIPS, arXiv:1703.02757).

    s(p) = Σ_{q ∈ N(p)} ‖x_p − x_q‖²      N(p): the n − f − 2 vectors nearest to x_p, itself not counted
    krum         x = the x_p of smallest s(p)
    multi_krum   x = the mean of the m vectors of smallest s(p)

The vector with the closest company wins: an arbitrary one that lies far away has at most f − 1 friends there, and its
score must count honest vectors, too. Of equal scores the lower rank's wins. Krum's result is one worker's own vector,
with one worker's noise; multi_krum averages it down. Above m = n − f an arbitrary vector is always among the chosen.

Bears f of n ≥ 2f + 3. Cost: n²/2 distances of whole vectors on every worker.
Payload per rank and step: (P−1) · n elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.consistency.robust.aggregation import Aggregation, check_f

_PAPER = Reference(
    "Blanchard, El Mhamdi, Guerraoui & Stainer",
    "Machine learning with adversaries: Byzantine tolerant gradient descent",
    2017,
    "NeurIPS, arXiv:1703.02757",
    survey="VI-A",
)


def squared_distances(parts: Sequence[Tensor]) -> Tensor:
    """``(n, n)`` in float64 on the host: ‖x_p − x_q‖² over all parts; infinite on the diagonal, where nothing is near.

    Differences, not ‖x‖² + ‖y‖² − 2x·y: beside one huge vector that would cancel to nothing between the others.
    """
    n = parts[0].shape[0]
    found = torch.full((n, n), math.inf, dtype=torch.float64)
    for p in range(n):
        for q in range(p):
            found[p, q] = found[q, p] = sum(
                torch.linalg.vector_norm(rows[p] - rows[q], dtype=torch.float64).square().item() for rows in parts
            )
    return found


def scores(distances: Tensor, f: int) -> Tensor:
    """s(p) for each of n vectors, from their squared distances; n ≥ f + 3."""
    neighbours = distances.shape[0] - f - 2
    return distances.sort(dim=1).values[:, :neighbours].sum(dim=1)


def chosen(parts: Sequence[Tensor], f: int, m: int) -> list[int]:
    """The m vectors of smallest score, best first; of equals the first."""
    ranks: list[int] = torch.argsort(scores(squared_distances(parts), f), stable=True)[:m].tolist()
    return ranks


@dataclass(frozen=True)
class Krum(Aggregation):
    """The one vector that lies closest to its n − f − 2 nearest; bears f of at least 2f + 3 workers."""

    name: ClassVar[str] = "krum"
    paper: ClassVar[Reference] = _PAPER
    needs: ClassVar[str] = "n ≥ 2f + 3"

    f: int = 1

    def __post_init__(self) -> None:
        check_f(self.f)

    @property
    def fewest(self) -> int:
        """2f + 3, the theorem's."""
        return 2 * self.f + 3

    def bears(self, vectors: int) -> int:
        """What it was told."""
        return self.f

    def without(self, failed: int) -> Self:
        """Expects fewer."""
        return replace(self, f=self.f - failed)

    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Aggregation.combine`."""
        (best,) = chosen(parts, self.f, 1)
        return [rows[best] for rows in parts]


@dataclass(frozen=True)
class MultiKrum(Aggregation):
    """The mean of the ``m`` vectors of smallest Krum score (None: n − f); bears f of at least 2f + 3 workers."""

    name: ClassVar[str] = "multi_krum"
    paper: ClassVar[Reference] = _PAPER
    needs: ClassVar[str] = "n ≥ 2f + 3 and n ≥ m + f"

    f: int = 1
    m: int | None = None

    def __post_init__(self) -> None:
        check_f(self.f)
        if self.m is not None and not is_whole(self.m, 1):
            raise ValueError(f"m={self.m!r}: it is a whole number from 1, of vectors to average, or None for n − f")

    @property
    def fewest(self) -> int:
        """2f + 3, the theorem's, and no more to choose than may be honest."""
        return max(2 * self.f + 3, (self.m or 0) + self.f)

    def bears(self, vectors: int) -> int:
        """What it was told."""
        return self.f

    def without(self, failed: int) -> Self:
        """Expects fewer; chooses as many."""
        return replace(self, f=self.f - failed)

    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Aggregation.combine`."""
        best = chosen(parts, self.f, self.m or parts[0].shape[0] - self.f)
        return [rows[best].mean(dim=0) for rows in parts]
