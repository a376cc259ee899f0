"""Strom's threshold: whatever has added up to τ is sent as one index and one sign (Strom 2015).

    r ← r + g;   for every i with |r_i| ≥ τ:  send (i, sign r_i);   r_i ← r_i − τ · sign r_i

g the gradient, r the residual, τ = ``threshold``. One τ is sent at a time: what lies beyond it stays for the next
steps. It is *subtracted*, never cleared (as public descriptions have it): clearing loses what is beyond τ.

Payload: 4 bytes an entry, 31 bits of index and one of sign; so at most 2³¹ values in a vector. Gathered, it beats a
dense exchange while fewer than 2/P of the values are beyond τ; from there on the decoded vector is all-reduced.
Strom's gradient has the learning rate in it; here τ is in units of the gradient, and the optimizer comes after.
Guarantee: an approximation; sent and residual add up to the gradients. Of entries below τ nothing is sent, so nothing
is promised of a single step.

N. Strom (2015), Scalable distributed DNN training using commodity GPU cloud computing, Interspeech.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive
from manyhands.communication.compression.entries import Sparsifier, beyond, check_indices
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload

SIGN = np.uint32(1 << 31)


def encode(x: NDArray[Any], threshold: float) -> NDArray[np.uint32]:
    """A word for every |x| ≥ threshold: its index, and in the highest bit whether it is negative."""
    indices = beyond(x, threshold)
    words: NDArray[np.uint32] = indices.astype(np.uint32)
    words |= np.signbit(x[indices]).astype(np.uint32) << np.uint32(31)
    return words


def decode(words: NDArray[np.uint32], numel: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Indices and signs of `encode`."""
    indices = (words & ~SIGN).astype(np.int64)
    check_indices(indices, numel, "strom")
    return indices, 1 - 2 * (words >> np.uint32(31)).astype(np.int8)


@dataclass(frozen=True)
class Strom(Sparsifier):
    """Send ``threshold`` wherever that much has added up: an index and a sign, 4 bytes an entry."""

    name: ClassVar[str] = "strom"
    paper: ClassVar[Reference] = Reference(
        "Strom",
        "Scalable distributed DNN training using commodity GPU cloud computing",
        2015,
        "Interspeech",
        survey="VI-B",
    )

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_positive(self.threshold):
            raise ValueError(f"threshold={self.threshold!r}: it is above 0, in units of the gradient")

    @property
    def variable(self) -> bool:
        """As many entries as are beyond the threshold."""
        return True

    def payload_B(self, layout: Layout) -> int:
        """At most 4 bytes a value."""
        return 4 * layout.numel

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        return torch.from_numpy(encode(x.numpy(), self.threshold).view(np.uint8))

    def entries(self, payload: Tensor, state: State) -> Entries:
        """See `OneShot.entries`."""
        if payload.numel() % 4:
            raise DamagedPayload(f"strom: a payload of {payload.numel()} bytes; entries have 4 each")
        indices, signs = decode(payload.numpy().view(np.uint32), state.layout.numel)
        return Entries(indices, state.layout.scalar(self.threshold) * signs)
