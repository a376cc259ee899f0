"""Asynchronous gossip, AD-PSGD: whoever has a gradient averages with one neighbour, which computes on (survey §VI-A).

    worker p, whenever it has Δ = u(θ_p, g_p) − θ_p:   m = (θ_p + θ_q) / 2;   θ_q ← m;   θ_p ← m + Δ

θ_p worker p's parameters, u its optimizer, g_p the gradient at θ_p as it was when the step began; q a neighbour in the
graph, drawn anew for every exchange from the seed. By the time Δ is added, others may have averaged with θ_p: gradients
are stale by a few exchanges, and no worker waits for another's gradient.

The parameters that neighbours reach lie in memory that all see, or over MPI in windows: a row a worker, each with a
lock. The two locks of an exchange are taken in the order of ranks, so no cycle can close: there is no need for the
paper's bipartite graph of active and passive workers. They are held while three vectors are written, never during a
gradient. Without such memory a worker would have to look for requests while it computes; `gossip(graph='matching')` has
pairs there.

Paper: X. Lian, W. Zhang, C. Zhang & J. Liu (2018), Asynchronous decentralized parallel stochastic gradient descent,
arXiv:1710.06952, Algorithm 1.

Payload per rank and exchange: n elements fetched and n put back.
Guarantee: an exchange conserves θ_p + θ_q, up to rounding. An approximation; results differ from run to run, and a
resume is exact for parameters and optimizer state but not for the race. One worker is plain SGD bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.independent import IndependentWorker
from manyhands.consistency.neighbours import OverGraph
from manyhands.consistency.rows import rows_between
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Traffic, Worker
from manyhands.errors import Problem

Choice = Literal["complete", "ring", "torus", "random_regular"]


def partner(neighbours: Sequence[int], rank: int, exchange: int, seed: int) -> int:
    """With whom ``rank`` averages in this ``exchange`` of its own."""
    return random.Random(f"{seed} {rank} {exchange}").choice(neighbours)


def average_pair_(own: Tensor, other: Tensor, delta: Tensor) -> None:
    """Both become their mean, and ``own`` moves on by ``delta``."""
    other.add_(own).mul_(0.5)
    torch.add(other, delta, out=own)


@dataclass(frozen=True)
class AsynchronousGossip(OverGraph):
    """Averaging with one neighbour in ``graph`` every ``every`` steps; nobody waits for a gradient of another's."""

    name: ClassVar[str] = "asynchronous_gossip"
    paper: ClassVar[Reference] = Reference(
        "Lian, Zhang, Zhang & Liu",
        "Asynchronous decentralized parallel stochastic gradient descent",
        2018,
        "arXiv:1710.06952",
        survey="VI-A",
    )
    deterministic: ClassVar[bool] = False
    steadier: ClassVar[str] = "with asynchronous_gossip, a smaller every= or graph='complete'"
    uncompressed: ClassVar[str] = (
        "a pair averages in the middle of others' steps; neither knows what the other knew last."
    )
    choices: ClassVar[tuple[str, ...]] = get_args(Choice)

    graph: Choice = "complete"

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """n elements there and n back."""
        return Traffic() if size == 1 else Traffic(2 * numel * itemsize, 2, every=self.every)

    def problems(self, setting: Setting) -> list[Problem]:
        """A graph that there is not, or no memory in which neighbours reach each other."""
        found = super().problems(setting)
        if setting.shares_memory or setting.one_sided or setting.workers == 1:
            return found
        unshared = Problem(
            f"{self} on transport={setting.transport}",
            "a worker averages with a neighbour that computes on, in memory that both reach.",
            "Use transport=shared, threads or mpi, or gossip(graph='matching'), whose pairs wait for each other.",
        )
        return [*found, unshared]

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return AsynchronousGossipWorker(replica, comm, self)


class AsynchronousGossipWorker(IndependentWorker):
    """Computes on a copy of its own row; the row is where neighbours find it."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: AsynchronousGossip) -> None:
        super().__init__(replica, comm)
        self._strategy = strategy
        self._lay_out()

    def _lay_out(self) -> None:
        """A row and a lock for each worker of the group."""
        strategy, pieces = self._strategy, self.replica.pieces
        self._alone = self.comm.size == 1
        self._rows = (
            []
            if self._alone
            else [
                rows_between(group, piece.flat.numel(), piece.flat.dtype)
                for piece, group in zip(pieces, self.groups, strict=True)
            ]
        )
        self._locks = [] if self._alone else [group.locks(group.size) for group in self.groups]
        self._neighbours = [strategy.rounds(group.size)[0].receivers(group.rank) for group in self.groups]
        self._published = False  # whether the rows hold what the workers have

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        if self._alone:
            return self.own_step(batch)
        if not self._published:
            self._publish()
        before = [self._fetch(i) for i in range(len(self.groups))]
        loss = self.own_step(batch)
        meets = self.steps % self._strategy.every == 0
        for i, start in enumerate(before):
            self._exchange(i, start) if meets else self._put(i, start)
        return loss

    def _publish(self) -> None:
        for piece, rows, group in zip(self.replica.pieces, self._rows, self.groups, strict=True):
            rows.get(group.rank).copy_(piece.flat)
            rows.put(group.rank)
        with self.comm.counting("control"):
            self.comm.barrier()
        self._published = True

    def _fetch(self, i: int) -> Tensor:
        """Own parameters as neighbours have left them, into the model; a copy."""
        flat, rank = self.replica.pieces[i].flat, self.groups[i].rank
        with self._locks[i][rank]:
            flat.copy_(self._rows[i].get(rank))
        return flat.clone()

    def _put(self, i: int, start: Tensor) -> None:
        """Add what the optimizer did to what neighbours have made of the row meanwhile."""
        flat, rank, rows = self.replica.pieces[i].flat, self.groups[i].rank, self._rows[i]
        with self._locks[i][rank]:
            own = rows.get(rank).add_(flat.sub_(start))
            rows.put(rank)
            flat.copy_(own)

    def _exchange(self, i: int, start: Tensor) -> None:
        flat, rank, rows, locks = self.replica.pieces[i].flat, self.groups[i].rank, self._rows[i], self._locks[i]
        exchange = self.steps // self._strategy.every
        other = partner(self._neighbours[i], rank, exchange, self._strategy.seed)
        flat.sub_(start)
        with locks[min(rank, other)], locks[max(rank, other)]:
            self.groups[i].access("pull", flat)
            own, others = rows.get(rank), rows.get(other)
            average_pair_(own, others, flat)
            self.groups[i].access("push", flat)
            rows.put(rank)
            rows.put(other)
            flat.copy_(own)

    def consensus(self) -> Parameters:
        """The mean of the rows, once everybody has stopped writing."""
        if self._alone or not self._published:
            return super().consensus()
        with self.comm.counting("consensus"):
            self.comm.barrier()
        self._adopt_row()
        return super().consensus()

    def finish(self) -> None:
        """Adopt the consensus; the rows are stale then."""
        super().finish()
        self._published = False

    def _adopt_row(self) -> None:
        if self._published:
            for piece, rows, group in zip(self.replica.pieces, self._rows, self.groups, strict=True):
                piece.flat.copy_(rows.get(group.rank))

    def regroup(self, comm: Communicator) -> None:
        """Each keeps its row. What a worker that is gone has in its own is lost, as is what was averaged into it."""
        self._adopt_row()
        super().regroup(comm)
        self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """Own parameters are those of the row. Called when nobody trains."""
        self._adopt_row()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict(state)
        self._published = False
