"""Asynchronous SGD over a parameter server: nobody waits for anybody (survey §VI-A).

    each worker:   pull θ;  g = ∇ at θ over its share;  push:  θ ← u(θ, g)

A gradient is applied to parameters that others have changed since it was taken: by how many updates is its staleness,
P − 1 on average, and measured. ``staleness_aware`` divides the learning rate of an update by 1 + its staleness (Zhang,
Gupta, Lian & Liu 2016, arXiv:1511.05950). The servers apply the user's optimizer, so its state exists once; each push
is a whole update, and P workers make P of them in the time of a step: a learning rate that is right in lock-step may be
P times too large here.

Payload per rank and step: n pushed and n pulled. Of a table with sparse gradients only the rows that a batch looks up
are pulled, at the lookup, and pushed, each with its number: what a step costs does not depend on the table's size.
``compress`` pushes something shorter than gradients, see `strategy.OnShards`.
Approximation: which updates a gradient misses is decided by a race, so results differ from run to run, and a resume
takes up parameters, server state and versions exactly but not the race. One worker is plain SGD bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.opening import opened
from manyhands.consistency.parameter_server.strategy import OnShards
from manyhands.consistency.parameter_server.worker import ServedWorker
from manyhands.contract import Batch, Reference, Replica, Worker


@dataclass(frozen=True)
class Asynchronous(OnShards):
    """Every gradient is applied as it comes; ``servers``: in how many shards (None: as many as pay)."""

    name: ClassVar[str] = "asynchronous"
    bears_stages: ClassVar[bool] = True
    by_itself: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Agarwal & Duchi", "Distributed delayed stochastic optimization", 2011, "arXiv:1104.5525", survey="VI-A"
    )
    sparse: ClassVar[bool] = True
    steadier: ClassVar[str] = "with asynchronous, fewer workers or staleness_aware=True"

    staleness_aware: bool = False

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        kept = opened(
            replica, comm, self.shards, optimizer=replica.optimizer, scaled=self.staleness_aware, compressor=self.pushes
        )
        return AsynchronousWorker(replica, comm, kept)


class AsynchronousWorker(ServedWorker):
    """Pushes and pulls in one go, so that a shard is locked once a step."""

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        loss, usable = self.gradients(batch)
        if usable:
            self.store.push([piece.grad for piece in self.replica.pieces], pull=True)
        else:
            self.store.pull()
        return loss
