"""Strom's threshold that finds its own τ, with a bitmap where many entries are sent (the variant of Deeplearning4j).

    τ ← τ / a  if more than ``most`` of the values were sent;   τ ← τ · a  if fewer than ``least``      a = ``adapt``

Each worker has a τ of its own and sends it along. An entry is a word of 4 bytes, or the whole vector two bits a value,
whichever is shorter: so a payload is never longer than n/4 bytes, and 8. Every ``clip_every`` steps the residual is cut
to ±``clip``·τ, so that old gradients do not haunt later steps: that *breaks* conservation, and the mass that was cut is
kept in the state as ``clipped``. Every ``shake``-th step (0: never) is sent at τ/3, to move what never reaches τ.

Payload: min(4k, n/4) + 8 bytes for k entries.
Guarantee: an approximation; sent, residual and what was clipped add up to the gradients.

Between ``least`` and ``most`` τ stays where it is: early gradients are large and carry it up, and later ones then
hardly pass. So ``adapt`` is near 1, and a small network that learns in a few hundred steps wants a larger ``most``.

Strom 2015; Skymind, Deeplearning4j 1.0, distributed training: gradient sharing (its defaults: τ = 1e-3, density between
1e-4 and 1e-2, twice or half of τ in 20 steps, clip 5 every 5 steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive, is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression import strom
from manyhands.communication.compression.bits import from_signed_planes, planes_B, signed_planes
from manyhands.communication.compression.entries import Sparsifier, check_ratio
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries, check_length
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload


@dataclass(frozen=True)
class StromAdaptive(Sparsifier):
    """Strom's scheme whose threshold follows how much is sent, between ``least`` and ``most`` of the values."""

    name: ClassVar[str] = "strom_adaptive"
    paper: ClassVar[Reference] = Reference(
        "Skymind",
        "Deeplearning4j: distributed training by gradient sharing, after Strom (2015)",
        2019,
        "deeplearning4j.org",
        survey="VI-B",
    )

    threshold: float = 1e-3
    least: float = 1e-4
    most: float = 1e-2
    adapt: float = 0.966  # 2^(−1/20)
    clip: float = 5.0
    clip_every: int = 5
    shake: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feedback:
            raise ValueError("feedback=False: without a residual nothing ever adds up to the threshold")
        if not is_positive(self.threshold):
            raise ValueError(f"threshold={self.threshold!r}: it is above 0, in units of the gradient; where it begins")
        check_ratio(self.least, "least")
        check_ratio(self.most, "most")
        if self.least > self.most:
            raise ValueError(f"least={self.least} and most={self.most}: least is at most most")
        if not (is_positive(self.adapt) and self.adapt < 1):
            raise ValueError(f"adapt={self.adapt!r}: it is above 0 and below 1, what the threshold shrinks by")
        if not is_positive(self.clip) or self.clip < 1:
            raise ValueError(f"clip={self.clip!r}: it is at least 1, in thresholds")
        for name in ("clip_every", "shake"):
            if not is_whole(getattr(self, name), 0):
                raise ValueError(f"{name}={getattr(self, name)!r}: it is a whole number of steps, 0 for never")

    @property
    def variable(self) -> bool:
        """As many entries as are beyond the threshold."""
        return True

    def payload_B(self, layout: Layout) -> int:
        """At most two bits a value, and the threshold."""
        return 8 + min(4 * layout.numel, planes_B(layout.numel, 2))

    def prepare(self, state: State) -> None:
        """See `Compressor.prepare`."""
        super().prepare(state)
        state.numbers.update(threshold=self.threshold, clipped=0.0)

    def aggregate(self, gradient: Tensor, comm: Communicator, state: State) -> Tensor:
        """See `Compressor.aggregate`; cuts the residual now and then."""
        result = super().aggregate(gradient, comm, state)
        if comm.size > 1:
            self.trim(state)
        return result

    def trim(self, state: State) -> None:
        """See `OneShot.trim`: the residual is cut now and then."""
        if self.clip_every and state.numbers["step"] % self.clip_every == 0:
            residual, bound = state.tensors["residual"], self.clip * state.numbers["threshold"]
            before = float(residual.abs().sum(dtype=torch.float64))
            residual.clamp_(-bound, bound)
            state.numbers["clipped"] += before - float(residual.abs().sum(dtype=torch.float64))

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`; the threshold then moves."""
        step, values = state.count(), x.numpy()
        shaken = self.shake and step % self.shake == self.shake - 1
        # As the values' own dtype has it, so that what is announced is what is subtracted.
        tau = float(values.dtype.type(state.numbers["threshold"] / (3 if shaken else 1)))
        words = strom.encode(values, tau)
        if words.nbytes <= planes_B(x.numel(), 2):
            header, body = tau, words.view(np.uint8)
        else:  # a threshold is above 0: its sign says how the rest is to be read
            header, body = -tau, signed_planes(values >= tau, values <= -tau)
        if not shaken:
            if words.size > self.most * x.numel():
                state.numbers["threshold"] /= self.adapt
            elif words.size < self.least * x.numel():
                state.numbers["threshold"] *= self.adapt
        return torch.from_numpy(np.concatenate([np.array([header]).view(np.uint8), body]))

    def entries(self, payload: Tensor, state: State) -> Entries | None:
        """See `OneShot.entries`; None: two bits a value."""
        coded, layout, header = payload.numpy(), state.layout, _header(payload, state.layout)
        if header < 0:
            return None
        if coded.size % 4:
            raise DamagedPayload(f"strom_adaptive: a payload of {coded.size} bytes; entries have 4 each")
        indices, signs = strom.decode(coded[8:].view(np.uint32), layout.numel)
        return Entries(indices, layout.scalar(header) * signs)

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        header, values = _header(payload, state.layout), out.numpy()
        if header > 0:
            super().add_(out, payload, state, sign)
            return
        coded = payload.numpy()[8:]
        check_length(coded, planes_B(values.size, 2), "strom_adaptive")
        values += values.dtype.type(-sign * header) * from_signed_planes(coded, values.size)


def _header(payload: Tensor, layout: Layout) -> float:
    """The threshold; negative: two bits a value follow."""
    if payload.numel() < 8:
        raise DamagedPayload(f"strom_adaptive: a payload of {payload.numel()} bytes; the threshold has 8")
    header = float(payload.numpy()[:8].view(np.float64)[0])
    if not is_positive(abs(header)) or abs(header) > float(np.finfo(layout.scalar).max):
        raise DamagedPayload(f"strom_adaptive: a threshold of {abs(header)}")
    return header
