"""What workers that step together tell each other: which parameters are in use, who counts how much in a mean, and
whether a step may go on at all.

A worker whose loss is not finite enters the exchange with infinite weight: a veto, upon which every worker raises at
the same step and nobody has applied anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Replica
from manyhands.errors import NonFiniteLoss


def agree_on_unused(replica: Replica, comm: Communicator) -> None:
    """Make all workers know alike which parameters are in use. Collective, counted as ``control``.

    Workers that step together call it after `Replica.gradients` while ``replica.watching`` (the first step, as a rule),
    and after all that backward announces has been sent: collectives match by order.
    """
    reached = replica.reached()
    with comm.counting("control"):
        for i, seen in reached.items():
            comm.over(replica.pieces[i].replicated_over).all_reduce(seen).wait()
    replica.settle(reached)


def weight_of(loss: Tensor, count: float) -> float:
    """This worker's weight: its count, or the veto."""
    return count if math.isfinite(loss.item()) else math.inf


def gather_weights(comm: Communicator, loss: Tensor, count: float, *, what: str = "loss") -> list[float]:
    """Everybody's weight in rank order, for strategies that have no weighted exchange. Counted as ``control``.

    An infinite ``count`` is a veto as a loss is that is not finite; ``what``: that of which one of them was not.

    Nobody returns before everybody has called it, so all have finished reading the parameters for this step.
    """
    weights = told_weights(comm, weight_of(loss, count))
    if not all(map(math.isfinite, weights)):
        raise NonFiniteLoss(comm.step, what=what)
    return weights


def told_weights(comm: Communicator, weight: float) -> list[float]:
    """Everybody's ``weight`` in rank order. Collective, counted as ``control``."""
    if comm.size == 1:
        return [weight]
    weights = torch.zeros(comm.size, dtype=torch.float64)
    weights[comm.rank] = weight
    with comm.counting("control"):
        comm.all_gather(weights, [(p, p + 1) for p in range(comm.size)]).wait()
    result: list[float] = weights.tolist()
    return result
