"""Top-k: of every gradient the ``ratio`` with the largest magnitude (Aji & Heafield 2017; Stich et al. 2018).

    C(x)_i = x_i  if |x_i| is among the k largest,  else 0          k = ⌈ratio · n⌉

Payload: 8 bytes an entry (index and value; 12 in float64). Gathered it beats a dense exchange while k/n < 1/P.
Guarantee: a contraction, ‖x − C(x)‖² ≤ (1 − k/n) ‖x‖²; with feedback, sent and residual add up to the gradients.

A. F. Aji & K. Heafield (2017), Sparse communication for distributed gradient descent, arXiv:1704.05021;
S. U. Stich, J.-B. Cordonnier & M. Jaggi (2018), Sparsified SGD with memory, arXiv:1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.compression.entries import Sparsifier, check_ratio, entries, largest, pack, unpack
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries, check_length
from manyhands.communication.compression.state import State


@dataclass(frozen=True)
class TopK(Sparsifier):
    """The ``ratio`` of the values with the largest magnitude, as index and value."""

    name: ClassVar[str] = "top_k"
    paper: ClassVar[Reference] = Reference(
        "Aji & Heafield",
        "Sparse communication for distributed gradient descent",
        2017,
        "EMNLP, arXiv:1704.05021",
        survey="VI-B",
    )

    ratio: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)

    def contraction(self, numel: int) -> float:
        """k/n."""
        return entries(self.ratio, numel) / numel

    def payload_B(self, layout: Layout) -> int:
        """An index and a value each."""
        return entries(self.ratio, layout.numel) * (4 + layout.itemsize)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values = x.numpy()
        indices = largest(values, entries(self.ratio, values.size))
        return pack(indices, values[indices])

    def entries(self, payload: Tensor, state: State) -> Entries:
        """See `OneShot.entries`."""
        check_length(payload, self.payload_B(state.layout), self.name)
        return unpack(payload, state.layout, self.name)
