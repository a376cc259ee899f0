"""Who counts how much in a mean over workers, and whether a step may go on at all.

A worker whose loss is not finite enters the exchange with infinite weight: a veto, upon which every worker raises at
the same step and nobody has applied anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.errors import NonFiniteLoss


def weight_of(loss: Tensor, count: float) -> float:
    """This worker's weight: its count, or the veto."""
    return count if math.isfinite(loss.item()) else math.inf


def gather_weights(comm: Communicator, loss: Tensor, count: float) -> list[float]:
    """Everybody's weight in rank order, for strategies that have no weighted exchange. Counted as ``control``.

    Nobody returns before everybody has called it, so all have finished reading the parameters for this step.
    """
    if comm.size == 1:
        weights = torch.tensor([weight_of(loss, count)], dtype=torch.float64)
    else:
        weights = torch.zeros(comm.size, dtype=torch.float64)
        weights[comm.rank] = weight_of(loss, count)
        with comm.counting("control"):
            comm.all_gather(weights, [(p, p + 1) for p in range(comm.size)]).wait()
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteLoss(comm.step)
    result: list[float] = weights.tolist()
    return result
