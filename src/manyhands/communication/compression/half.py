"""Half the bits of a float32: float16 (11 bits of precision, up to 65504) and bfloat16 (8 bits, float32's range).

    C(x) = x rounded to the nearest of the format; float16 keeps what is larger than 65504 at that

Payload: 2n bytes, all-reduced. The sum is rounded once more, which is in nobody's residual (transports that add by
themselves add in float32).
Guarantee: ‖x − C(x)‖ ≤ 2⁻¹¹ ‖x‖ (float16, but for values under 6·10⁻⁵, of which up to 3·10⁻⁸ each is lost) or 2⁻⁸ ‖x‖
(bfloat16). No feedback by default: roundings of single steps cancel.

P. Micikevicius et al. (2018), Mixed precision training, arXiv:1710.03740; D. Kalamkar et al. (2019), A study of
BFLOAT16 for deep learning training, arXiv:1905.12322.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import NOTHING, Compressor, Cost, Round, Sent, sum_cost
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload


class Half(OneShot):
    """Values of two bytes, added up by the transport."""

    summable: ClassVar[bool] = True
    format: ClassVar[torch.dtype]

    def payload_B(self, layout: Layout) -> int:
        """Two bytes each."""
        return 2 * layout.numel

    def cost(self, layout: Layout, size: int) -> Cost:
        """An all-reduce of them."""
        return sum_cost("sum", size, self.payload_B(layout)) if size > 1 and layout.numel else NOTHING

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """See `Compressor.rounds`."""
        return Compressor.rounds(self, layout, size, payload_B)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in the format."""
        return x.to(self.format)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`; for payloads that are not added up."""
        return self.rounded(x).view(torch.uint8)

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        out.add_(self.decode(payload, state), alpha=sign)

    def decode(self, payload: Tensor, state: State) -> Tensor:
        """See `OneShot.decode`."""
        check_length(payload, self.payload_B(state.layout), self.name)
        values = payload.view(self.format).to(state.layout.dtype)
        # A sum is a tenth of asking each value of two bytes; one that is not finite may have overflowed.
        if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
            raise DamagedPayload(f"{self.name}: a value that is not finite")
        return values

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """See `Compressor.exchange`."""
        payload = self.rounded(x)
        sent = payload.clone() if self.feedback else None
        comm.all_reduce(payload, weight=1.0).wait()
        out.copy_(payload)

        def subtract(residual: Tensor) -> None:
            residual.sub_(self.rounded(residual) if sent is None else sent)

        return subtract


@dataclass(frozen=True)
class Float16(Half):
    """Values in float16, the IEEE format of 16 bits."""

    name: ClassVar[str] = "float16"
    paper: ClassVar[Reference] = Reference(
        "Micikevicius et al.", "Mixed precision training", 2018, "ICLR, arXiv:1710.03740", survey="VI-B"
    )
    format: ClassVar[torch.dtype] = torch.float16

    feedback: bool = field(default=False, kw_only=True)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in float16, kept within its range."""
        largest = torch.finfo(torch.float16).max
        return x.clamp(-largest, largest).to(torch.float16)


@dataclass(frozen=True)
class BFloat16(Half):
    """Values in bfloat16: the upper half of a float32."""

    name: ClassVar[str] = "bfloat16"
    paper: ClassVar[Reference] = Reference(
        "Kalamkar et al.",
        "A study of BFLOAT16 for deep learning training",
        2019,
        "arXiv:1905.12322",
        survey="VI-B",
    )
    format: ClassVar[torch.dtype] = torch.bfloat16

    feedback: bool = field(default=False, kw_only=True)
