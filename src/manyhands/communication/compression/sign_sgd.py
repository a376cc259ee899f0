"""signSGD: every worker votes with the sign of each value, the majority decides (Bernstein et al. 2018, 2019); with
feedback, scaled signs are averaged instead (Karimireddy et al. 2019).

    feedback=False    x̄_i = sign Σ_p sign(g_p,i)                       so every step moves all parameters by the same
    feedback=True     C(x) = (‖x‖₁/d) · sign x  of each tensor of d values

A vote has no magnitude: learning rates are those of the sign (1e-3 rather than 0.1), and of a small value one batch's
sign is chance, so an optimizer with momentum, which averages votes, learns faster than one without. One bit has no room
for zero, nor for a tie: zeros vote up and down in turn (by index, step and worker), so that what nobody uses does not
drift. Two workers who disagree, when all see all votes, leave the value at 0.

Payload: n/8 bytes, each way where slices have owners that count; with feedback 4 bytes a tensor more.
Guarantee: votes: an approximation. With feedback: a contraction with δ = ‖x‖₁²/(d ‖x‖²) ≥ 1/d; sent and residual add up
to the gradients.

J. Bernstein, Y.-X. Wang, K. Azizzadenesheli & A. Anandkumar (2018), signSGD: compressed optimisation for non-convex
problems, arXiv:1802.04434; S. P. Karimireddy, Q. Rebjock, S. U. Stich & M. Jaggi (2019), arXiv:1901.09847.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Sent
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State


@dataclass(frozen=True)
class SignSGD(OneShot):
    """The sign that most workers have; with ``feedback`` the mean of scaled signs."""

    name: ClassVar[str] = "sign_sgd"
    paper: ClassVar[Reference] = Reference(
        "Bernstein, Wang, Azizzadenesheli & Anandkumar",
        "signSGD: compressed optimisation for non-convex problems",
        2018,
        "ICML, arXiv:1802.04434",
        survey="VI-B",
    )
    scatters: ClassVar[bool] = True

    feedback: bool = field(default=False, kw_only=True)

    @property
    def votes(self) -> bool:
        """Without feedback."""
        return not self.feedback

    def contraction(self, numel: int) -> float:
        """1/n with feedback."""
        return 1 / numel if self.feedback else 0.0

    @property
    def approaches(self) -> bool:
        """With feedback: signs have a scale."""
        return self.feedback

    def payload_B(self, layout: Layout) -> int:
        """A bit each, and with feedback a value a tensor."""
        return (layout.itemsize * len(layout.tensors) if self.feedback else 0) + -(-layout.numel // 8)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values, layout = x.numpy(), state.layout
        step, up = state.count(), values > 0
        zero = np.flatnonzero(values == 0)
        up[zero] = (zero + step + state.rank) % 2 == 0
        head = np.zeros(0, np.uint8)
        if self.feedback:
            sums = np.add.reduceat(np.abs(values), layout.tensors, dtype=np.float64)
            head = (sums / layout.lengths(layout.tensors)).astype(values.dtype).view(np.uint8)
        return torch.from_numpy(np.concatenate([head, np.packbits(up)]))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        check_length(coded, self.payload_B(layout), self.name)
        head = coded.size - -(-layout.numel // 8)
        signs = np.unpackbits(coded[head:], count=layout.numel).view(np.int8) * np.int8(2 * sign) - np.int8(sign)
        if self.feedback:
            scales = coded[:head].view(values.dtype)
            check_numbers(scales, self.name)
            values += signs * np.repeat(scales, layout.lengths(layout.tensors))
        else:
            values += signs

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """See `OneShot.exchange`; of votes only the sign counts."""
        sent = super().exchange(x, out, comm, state)
        if not self.feedback:
            out.sign_()
        return sent
