"""The arithmetic mean: exact, cheapest, and at anybody's mercy.

    x = (1/n) Σ_p x_p

One arbitrary vector of n moves the result anywhere: the breakdown point is 0. It is here as what the other rules are
measured against. `synchronous` does not gather rows for it, but reduces, and weights workers by their samples.

Bears nothing. Traffic where vectors are gathered: (P−1) · n elements; reduced: 2(P−1)/P · n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.consistency.robust.aggregation import Aggregation


@dataclass(frozen=True)
class Mean(Aggregation):
    """The arithmetic mean; bears no arbitrary vector."""

    name: ClassVar[str] = "mean"
    paper: ClassVar[Reference] = Reference(
        "Blanchard, El Mhamdi, Guerraoui & Stainer",
        "Machine learning with adversaries: Byzantine tolerant gradient descent",  # Lemma 1: linear rules bear nothing
        2017,
        "NeurIPS, arXiv:1703.02757",
        survey="VI-A",
    )

    def bears(self, vectors: int) -> int:
        """None."""
        return 0

    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Aggregation.combine`."""
        return [rows.mean(dim=0) for rows in parts]
