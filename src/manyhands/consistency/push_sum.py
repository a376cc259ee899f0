"""Stochastic gradient push: gossip along one-way edges, each worker pushing shares of what it has (survey §VI-A).

    z_p = x_p / w_p;   x_p ← x_p + Δ_p,  Δ_p = u(z_p, g_p) − z_p
    then every ``every`` steps   x_q ← Σ_p A_qp x_p,   w_q ← Σ_p A_qp w_p,   w_p = 1 at first

x_p is what worker p has been given, w_p the scalar weight that has come with it, z_p the *de-biased* parameters, where
its gradient g_p is taken; u its optimizer. A worker cuts what it has into equal shares for itself and its receivers, so
that the columns of A add up to 1; who hears from many has a large x_p and an equally large w_p. No sender needs to know
how many others push to its receiver, and no pair has to agree.

Σ_p x_p and Σ_p w_p = P are conserved, and what the workers agree on is Σ x_p / Σ w_p. With weights that stay 1, as on
the circulant graphs, this is `gossip`. Kept are z and w: x is w · z.

Papers: M. Assran, N. Loizou, N. Ballas & M. Rabbat (2019), Stochastic gradient push for distributed deep learning,
arXiv:1811.10792, Algorithm 1. A. Nedić & A. Olshevsky (2016), Stochastic gradient-push for strongly convex functions on
time-varying directed graphs, arXiv:1406.2075.

Without a worker that was killed the others go on: what it had, and what it had already been sent, is lost with the
weight that belongs to it, and who finds that a receiver is lost keeps that share, weight and all. So the columns of A
over those who are left add up to 1, a worker's z is a mean as before, and that Σ_p w_p is no longer P matters to
nobody. At the next meeting the graph is drawn anew; with a ``degree``, too much for fewer perhaps, the run ends.

Payload per rank and exchange: d · n elements to d receivers; the weight rides along.
Guarantee: an exchange conserves Σ_p x_p and Σ_p w_p, up to rounding. An approximation of lock-step SGD.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.graphs import Mixing
from manyhands.communication.reduction import reduce_into
from manyhands.consistency.neighbours import NeighbourWorker, OverGraph
from manyhands.contract import Parameters, Reference, Replica, Worker

Choice = Literal["one_peer", "exponential", "directed_ring", "random_directed"]


def gather_(own: Tensor, rank: int, weight: float, others: Mapping[int, tuple[Tensor, float]]) -> float:
    """``own`` becomes Σ x_p / Σ w_p, in rank order, and the new weight Σ w_p is returned.

    ``own`` and ``weight`` are what ``rank`` kept for itself, ``others`` what arrived.
    """
    arrived = {**others, rank: (own, weight)}
    order = sorted(arrived)
    total = sum(arrived[p][1] for p in order)
    reduce_into(own, [arrived[p][0] for p in order])
    own.div_(total)
    return total


def kept(mixing: Mixing, rank: int, lost: Collection[int]) -> int:
    """How many of its equal shares ``rank`` keeps: its own, and those whose receivers are ``lost``."""
    return 1 + sum(q in lost for q in mixing.receivers(rank))


@dataclass(frozen=True)
class PushSum(OverGraph):
    """Shares pushed along a directed ``graph`` every ``every`` steps; ``degree`` of random_directed, and its seed."""

    name: ClassVar[str] = "push_sum"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Assran, Loizou, Ballas & Rabbat",
        "Stochastic gradient push for distributed deep learning",
        2019,
        "arXiv:1811.10792",
        survey="VI-A",
    )
    steadier: ClassVar[str] = "with push_sum, a denser graph= or a smaller every="
    uncompressed: ClassVar[str] = (
        "a share is pushed together with its weight, and what a compressor left out would be missing there."
    )
    choices: ClassVar[tuple[str, ...]] = get_args(Choice)

    graph: Choice = "one_peer"

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return PushSumWorker(replica, comm, self)


class PushSumWorker(NeighbourWorker):
    """Keeps a weight for each piece; its parameters are the de-biased ones."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: PushSum) -> None:
        super().__init__(replica, comm, strategy)
        self.weights = [1.0] * len(replica.pieces)

    def own_update(self) -> None:
        """The optimizer moves z by Δ; that x moves by Δ, z has to move by Δ / w."""
        pieces = self.replica.pieces
        uneven = [(piece.flat, piece.flat.clone(), w) for piece, w in zip(pieces, self.weights, strict=True) if w != 1]
        super().own_update()
        for z, before, w in uneven:
            z.sub_(before).div_(w).add_(before)

    def mix(self, i: int, mixing: Mixing) -> None:
        """One exchange; see the file's head."""
        z, rank = self.replica.pieces[i].flat, self.groups[i].rank
        share = mixing.shares[rank][rank]  # all are equal
        pushed = share * self.weights[i]
        z.mul_(pushed)
        arrived = self.swap(i, mixing, z, pushed)
        shares = kept(mixing, rank, self.broken[i])
        if shares > 1:
            z.mul_(shares)
        self.weights[i] = gather_(z, rank, shares * pushed, arrived)

    def consensus(self) -> Parameters:
        """Σ x_p / Σ w_p: the mean of z, weighted by w."""
        if self.comm.size == 1:
            return super().consensus()
        mean = [piece.flat.detach().clone() for piece in self.replica.pieces]
        with self.comm.counting("consensus"):
            works = [g.all_reduce(z, weight=w) for g, z, w in zip(self.groups, mean, self.weights, strict=True)]
            for work in works:
                work.wait()
        return tuple(mean)

    def state_dict(self) -> dict[str, Any]:
        """The weights too."""
        return {**super().state_dict(), "weights": list(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict({key: value for key, value in state.items() if key != "weights"})
        self.weights = list(state["weights"])
