"""Flexpoint flex16+5: mantissas of 16 bits with one exponent a tensor, foreseen, not measured (Köster et al. 2017).

    value = m · κ,   κ = 2^−e,   |m| ≤ 32767,   e from 0 to 31 for each tensor

Autoflex manages e. Φ = Γκ is the largest magnitude of a write (Γ the largest |m|); from the last ``history`` of them

    χ = α · [mean Φ + max(β · std Φ, γ · κ)]             and e is the largest with χ ≤ 32767 · 2^−e

On overflow (some |x| does not fit and is cut to what does) the history is cleared and Γ counts double, so that the next
write has room. Before the first write e comes from the tensor itself, as if it had been written before.

Payload: 2n bytes and one a tensor. With more than two workers slices are encoded for their owner and their mean once
more.
Guarantee: |x_i − C(x)_i| ≤ 2^−(e+1) where nothing overflows; exact for whole multiples of 2^−e. With feedback sent and
residuals add up to the gradients.

U. Köster et al. (2017), Flexpoint: an adaptive numerical format for efficient training of deep neural networks,
arXiv:1711.02213. α is not in the paper's text that we have; history, β and γ are those of the public simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive, is_whole
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload

LARGEST, HIGHEST = 32767, 31


def exponent_for(largest: NDArray[np.float64]) -> NDArray[np.int64]:
    """The largest e from 0 to 31 with ``largest`` ≤ 32767 · 2^−e."""
    with np.errstate(divide="ignore"):
        fitting = np.floor(np.log2(LARGEST / largest))
    return np.clip(fitting, 0, HIGHEST).astype(np.int64)


@dataclass(frozen=True)
class Flexpoint(OneShot):
    """Whole numbers of 16 bits and one exponent a tensor, foreseen from the last ``history`` writes."""

    name: ClassVar[str] = "flexpoint"
    paper: ClassVar[Reference] = Reference(
        "Köster et al.",
        "Flexpoint: an adaptive numerical format for efficient training of deep neural networks",
        2017,
        "NeurIPS, arXiv:1711.02213",
        survey="VI-B",
    )
    scatters: ClassVar[bool] = True

    history: int = 16
    alpha: float = 2.0
    beta: float = 3.0
    gamma: float = 100.0
    feedback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.history, 1):
            raise ValueError(f"history={self.history!r}: it is a whole number of writes from 1")
        for name in ("alpha", "beta", "gamma"):
            if not is_positive(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: it is a number above 0")

    def payload_B(self, layout: Layout) -> int:
        """Two bytes each, and one a tensor."""
        return 2 * layout.numel + len(layout.tensors)

    def prepare(self, state: State) -> None:
        """See `Compressor.prepare`."""
        super().prepare(state)
        count = len(state.layout.tensors)
        state.tensors["exponents"] = torch.full((count,), -1)  # of the next write; -1: there was none yet
        state.tensors["phi"] = torch.zeros(self.history, count, dtype=torch.float64)  # newest first
        state.tensors["writes"] = torch.zeros(count, dtype=torch.int64)  # of which phi tells
        state.numbers["overflows"] = 0

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`; the exponents then move."""
        values, starts = x.numpy(), state.layout.tensors
        exponents = state.tensors["exponents"].numpy()
        fresh = exponents < 0
        if fresh.any():
            first = self.alpha * np.maximum.reduceat(np.abs(values), starts).astype(np.float64)
            exponents[fresh] = exponent_for(first)[fresh]
        used = exponents.copy()
        # A power of two is exact, and multiplying by it ten times as fast as `numpy.ldexp` of every value.
        whole = values * np.repeat(np.ldexp(values.dtype.type(1), used), state.layout.lengths(starts))
        np.rint(whole, out=whole)
        largest = np.maximum.reduceat(np.abs(whole), starts).astype(np.float64)
        self._foresee(largest, state)
        np.clip(whole, -LARGEST, LARGEST, out=whole)
        parts = whole.astype(np.int16).view(np.uint8), used.astype(np.uint8)
        return torch.from_numpy(np.concatenate(parts))

    def _foresee(self, largest: NDArray[np.float64], state: State) -> None:
        """Autoflex: the exponents of the next write, from the largest mantissas of this one."""
        exponents, phi, writes = (state.tensors[n].numpy() for n in ("exponents", "phi", "writes"))
        kappa = np.ldexp(1.0, -exponents)
        over = largest > LARGEST
        state.numbers["overflows"] += int(over.sum())
        writes[over] = 0
        phi[1:] = phi[:-1].copy()
        phi[0] = np.where(over, 2 * LARGEST, largest) * kappa
        writes += 1
        np.minimum(writes, self.history, out=writes)
        known = np.arange(self.history)[:, None] < writes
        mean = np.where(known, phi, 0).sum(0) / writes
        deviation = np.sqrt((np.where(known, phi - mean, 0) ** 2).sum(0) / writes)
        exponents[:] = exponent_for(self.alpha * (mean + np.maximum(self.beta * deviation, self.gamma * kappa)))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        check_length(coded, self.payload_B(layout), self.name)
        exponents = coded[2 * layout.numel :].astype(np.int64)
        if exponents.max(initial=0) > HIGHEST:
            raise DamagedPayload(f"flexpoint: an exponent of {exponents.max()}; they go to {HIGHEST}")
        decoded = np.repeat(np.ldexp(values.dtype.type(sign), -exponents), layout.lengths(layout.tensors))
        decoded *= coded[: 2 * layout.numel].view(np.int16).astype(values.dtype)
        values += decoded
