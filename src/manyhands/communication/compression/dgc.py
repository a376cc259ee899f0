"""Deep gradient compression: top-k of what momentum has made of the gradients (Lin et al. 2018).

    u ← m u + g;   v ← v + u;   send the k largest of v, and where sent:  u_i ← 0,  v_i ← 0

g this worker's gradient (scaled to a norm of ``clip``/√P if it has a larger one), m = ``momentum``. The residual v is
that of the *velocity* (momentum correction): what is sent late has the momentum it would have had. Where an entry was
sent its velocity starts anew (momentum factor masking). In the first ``warmup`` steps more is sent: ¼, 1/16, 1/64 …
of the values, a quarter of the warm-up each, down to ``ratio``.

Momentum is in here, so the optimizer has none: plain SGD. One worker is SGD with momentum m.

Payload: 8 bytes an entry; during a warm-up more.
Guarantee: an approximation; sent and v add up to the sum of all velocities, of those that were not masked.

Y. Lin, S. Han, H. Mao, Y. Wang & W. J. Dally (2018), Deep gradient compression: reducing the communication bandwidth
for distributed training, arXiv:1712.01887, algorithms 1 to 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_positive, is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.entries import Sparsifier, check_ratio, entries, largest, pack, unpack
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries
from manyhands.communication.compression.state import State

#: Of the values, in the first quarter of a warm-up; each further quarter has this share of the one before.
WARM = 0.25


@dataclass(frozen=True)
class DeepGradientCompression(Sparsifier):
    """Top-k of accumulated velocities: the optimizer's ``momentum`` happens here, before anything is left out."""

    name: ClassVar[str] = "dgc"
    paper: ClassVar[Reference] = Reference(
        "Lin, Han, Mao, Wang & Dally",
        "Deep gradient compression: reducing the communication bandwidth for distributed training",
        2018,
        "ICLR, arXiv:1712.01887",
        survey="VI-B",
    )
    replaces_optimizer: ClassVar[bool] = True

    ratio: float = 0.001
    momentum: float = 0.9
    warmup: int = 0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        if not self.feedback:
            raise ValueError("feedback=False: what velocities have added up to is the scheme itself")
        if not (self.momentum == 0 or is_positive(self.momentum)) or self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum!r}: it is from 0 to below 1")
        if not is_whole(self.warmup, 0):
            raise ValueError(f"warmup={self.warmup!r}: it is a whole number of steps, 0 for none")
        if self.clip is not None and not is_positive(self.clip):
            raise ValueError(f"clip={self.clip!r}: it is a norm above 0, or None")

    @property
    def variable(self) -> bool:
        """During a warm-up."""
        return self.warmup > 0

    def density(self, step: int) -> float:
        """The share of the values that is sent in a step."""
        return max(self.ratio, WARM ** (1 + 4 * step // self.warmup)) if step < self.warmup else self.ratio

    def payload_B(self, layout: Layout) -> int:
        """An index and a value each, of the first step."""
        return entries(self.density(0), layout.numel) * (4 + layout.itemsize)

    def prepare(self, state: State) -> None:
        """See `Compressor.prepare`."""
        super().prepare(state)
        state.tensors["velocity"] = torch.zeros(state.layout.numel, dtype=state.layout.dtype)

    def aggregate(self, gradient: Tensor, comm: Communicator, state: State) -> Tensor:
        """See `Compressor.aggregate`; what is averaged are velocities."""
        velocity = state.tensors["velocity"].mul_(self.momentum)
        scale = 1.0
        if self.clip is not None:
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            scale = min(1.0, self.clip / math.sqrt(comm.size) / (norm + 1e-6))
        velocity.add_(gradient, alpha=scale)
        return super().aggregate(gradient.copy_(velocity), comm, state)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values = x.numpy()
        indices = largest(values, entries(self.density(state.count()), values.size))
        state.tensors["velocity"].numpy()[indices] = 0
        return pack(indices, values[indices])

    def entries(self, payload: Tensor, state: State) -> Entries:
        """See `OneShot.entries`."""
        return unpack(payload, state.layout, self.name)
