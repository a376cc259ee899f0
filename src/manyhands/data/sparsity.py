"""How far apart sparse samples keep out of each other's way (Niu, Recht, Ré & Wright 2011, HOGWILD!, section 3).

Samples E touch coordinates V: sample e those in its support S(e), here a row of ``indices`` ``(samples, width)``. Rows
of unequal support are padded by repeating an index, which then counts once.

    Ω = max_e |S(e)|                                   coordinates that one sample touches
    Δ = max_v |{e : v ∈ S(e)}| / |E|                   samples that touch one coordinate, as a fraction
    ρ = max_e |{e' : S(e') ∩ S(e) ≠ ∅}| / |E|          samples that one sample can collide with, itself among them

Updates without locks hardly disturb each other where Ω, Δ and ρ are small; always Δ ≤ ρ ≤ Ω·Δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sparsity:
    """Ω, Δ and ρ of a set of samples."""

    omega: int
    delta: float
    rho: float


def measure(indices: Tensor) -> Sparsity:
    """All three of them."""
    return Sparsity(omega(indices), delta(indices), rho(indices))


def omega(indices: Tensor) -> int:
    """The largest support."""
    return int(_firsts(indices.sort(dim=1).values).sum(dim=1).max())


def delta(indices: Tensor) -> float:
    """The largest fraction of samples that touch one coordinate."""
    return int(_touched(indices)[1].bincount().max()) / len(indices)


def rho(indices: Tensor) -> float:
    """The largest fraction of samples that intersect one; about 20 µs a sample and more where they are less sparse."""
    samples, coordinates = _touched(indices)
    holders = samples[coordinates.argsort(stable=True)].tensor_split(coordinates.bincount().cumsum(0)[:-1].cpu())
    met = (torch.unique(torch.cat([holders[v] for v in row])).numel() for row in indices.tolist())
    return float(max(met)) / len(indices)


def _touched(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Every (sample, coordinate) pair once, as two vectors."""
    ordered = indices.sort(dim=1).values
    firsts = _firsts(ordered)
    return firsts.nonzero()[:, 0], ordered[firsts]


def _firsts(ordered: Tensor) -> Tensor:
    """Where a row of sorted numbers holds one that did not come before."""
    firsts = torch.ones_like(ordered, dtype=torch.bool)
    firsts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return firsts
