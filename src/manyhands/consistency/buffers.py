"""What becomes of buffers (BatchNorm statistics, counters) that every worker updates from its own share.

    average   floating-point buffers are averaged over workers, others taken from rank 0
    rank0     all are rank 0's
    local     every worker keeps its own; what is exported is rank 0's

BatchNorm's running statistics are a linear recurrence of the batch statistics that training itself never reads, so
averaging them when somebody looks (evaluation, checkpoint, end) equals averaging them at every step, up to rounding.
Counted apart as ``consensus``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator

Policy = Literal["average", "rank0", "local"]


def agree(buffers: Sequence[Tensor], comm: Communicator, policy: Policy) -> list[Tensor]:
    """The buffers the workers agree on, as new tensors; collective unless ``local`` (then rank 0's count)."""
    if comm.size == 1:
        return [b.clone() for b in buffers]
    result = []
    with comm.counting("consensus"):
        for b in buffers:
            carried = b.clone() if b.dtype.is_floating_point else b.to(torch.int64)
            carried = carried.contiguous()
            if policy == "average" and b.dtype.is_floating_point:
                comm.all_reduce(carried, weight=1.0).wait()
            else:
                comm.broadcast(carried).wait()
            result.append(carried.to(b.dtype).view(b.shape))
    return result
