"""What becomes of buffers (BatchNorm statistics, counters) that every worker updates from its own share.

    average   floating-point and complex buffers are averaged over workers, others taken from rank 0
    rank0     all are rank 0's
    local     every worker keeps its own; what is exported is rank 0's

BatchNorm's running statistics are a linear recurrence of the batch statistics that training itself never reads, so
averaging them when somebody looks (evaluation, checkpoint, end) equals averaging them at every step, up to rounding.
Counted apart as ``consensus``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import carried, put_down

Policy = Literal["average", "rank0", "local"]


def agree(buffers: Sequence[Tensor], comm: Communicator, policy: Policy) -> list[Tensor]:
    """The buffers the workers agree on, as new tensors; collective unless ``local`` (then rank 0's count)."""
    if comm.size == 1:
        return [b.detach().clone() for b in buffers]
    result = []
    with comm.counting("consensus"):
        for b in buffers:
            shared = carried(b)
            if policy == "average" and shared.dtype.is_floating_point:
                comm.all_reduce(shared, weight=1.0).wait()
            else:
                comm.broadcast(shared).wait()
            result.append(put_down(shared, b))
    return result
