"""A parameter server: parameters that nobody owns, pulled and pushed a shard at a time (survey §VI-A).

    pull   read a shard, and its version
    push   the shard's own optimizer takes a gradient: θ ← u(θ, g), version ← version + 1
    add    θ ← θ + δ, version ← version + 1

Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014; the shards, each with its own
optimizer and version, are DistBelief's (Dean et al. 2012). What a push finds newer than what its worker has pulled is
its *staleness*, in updates.

`Store` is a worker's end of it. The shards lie in memory that all workers see (`common_store`), in memory that workers
reach at each other (`window_store`), or on ranks of their own (`server`, seen through `remote_store`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from manyhands.communication.communicator import Board, Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.consistency.compressed import Parcels, layout_of
from manyhands.consistency.parameter_server.rounds import Rounds
from manyhands.consistency.parameter_server.shards import Shard, Unit, bounds
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters, Replica


class Store(ABC):
    """One worker's end of the servers.

    With a ``compressor`` what is pushed and added are its payloads, one a shard, and what they leave out is kept here.
    Rows of tables go as they are.
    """

    def __init__(
        self, replica: Replica, comm: Communicator, servers: int, compressor: Compressor | None = None
    ) -> None:
        self.replica = replica
        #: How often an update was so many updates late.
        self.staleness: Counter[int] = Counter()
        self.shards: list[Shard] = []
        self.units: list[Unit] = []
        parameters = 0
        for i, piece in enumerate(replica.pieces):
            spans = list(piece.spans) or [(0, piece.flat.numel())]
            for server, (lo, hi) in enumerate(bounds(piece.flat.numel(), servers, piece.width)):
                first = len(self.units)
                for p, (start, stop) in enumerate(spans):
                    if max(lo, start) < min(hi, stop):
                        self.units.append(Unit(max(lo, start), min(hi, stop), parameters + p))
                self.shards.append(Shard(i, lo, hi, slice(first, len(self.units)), server))
            parameters += len(spans)
        self.parameters = parameters
        self.read = [0] * len(self.shards)  # the version of each shard that this worker has pulled
        self._parcels: Parcels | None = None
        if compressor is not None and comm.size > 1:
            wholes = [layout_of(piece) for piece in replica.pieces]
            self._parcels = Parcels(replica, comm, compressor, [wholes[s.piece].part(s.lo, s.hi) for s in self.shards])

    def _pack(self, vectors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """What goes to each shard of ``vectors``, a piece each, and vectors of what that stands for."""
        if self._parcels is None:
            return [vectors[s.piece][s.lo : s.hi] for s in self.shards], vectors
        told = [x if piece.width else x.clone() for x, piece in zip(vectors, self.replica.pieces, strict=True)]
        payloads = []
        for i, s in enumerate(self.shards):
            own = told[s.piece][s.lo : s.hi]
            payloads.append(own if self.replica.pieces[s.piece].width else self._parcels.pack_(i, own))
        return payloads, told

    @abstractmethod
    def pull(self) -> None:
        """All shards into the replica's pieces."""

    @abstractmethod
    def push(self, vectors: Sequence[Tensor], *, pull: bool = False) -> None:
        """A gradient a piece, to the servers' optimizer; with ``pull`` each shard comes back as it then is."""

    @abstractmethod
    def add(self, vectors: Sequence[Tensor]) -> None:
        """A change a piece, added as it is."""

    @abstractmethod
    def rounds(self, needed: int, rule: Aggregation) -> Rounds:
        """From here on gradients come in rounds, ``needed`` to an update, joined by ``rule``. Collective.

        All shards must lie on one server, see `rounds`.
        """

    @abstractmethod
    def snapshot(self) -> Parameters:
        """Everything as it is once all workers have come here. Collective, counted as ``consensus``."""

    @abstractmethod
    def stop(self, step: int) -> None:
        """Tell the other workers to come to a `Worker.meet`, because of what happened in ``step``."""

    @property
    @abstractmethod
    def stopped(self) -> bool:
        """Whether somebody has called `stop`."""

    @abstractmethod
    def regroup(self, comm: Communicator) -> None:
        """The workers are now those of ``comm``, fewer than before."""

    @abstractmethod
    def board(self) -> Board:
        """A new board of counters, all 0. Collective."""

    @abstractmethod
    def rebase(self) -> None:
        """The shards become what rank 0's pieces hold. Collective."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Of this worker its versions; of rank 0 the servers' state, too, without the parameters themselves."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""

    def left_over(self) -> dict[str, Any]:
        """What a compressor keeps of this worker's pushes."""
        return {} if self._parcels is None else {"compression": self._parcels.state_dict()}

    def take_left_over(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        if self._parcels is not None:
            self._parcels.load_state_dict(state["compression"])
