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

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Board, Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.consistency.compressed import Parcels, layout_of
from manyhands.consistency.parameter_server.rounds import Rounds
from manyhands.consistency.parameter_server.shards import Shard, Unit, bounds
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters, Replica
from manyhands.models.update_rules import Rule, rule_of


class Store(ABC):
    """One worker's end of the servers, which cut each piece into so many shards. Made by all workers together.

    ``optimizer`` is what a push does, with the hyper-parameters that it has then; without one there is only `add`.
    ``scaled``: the learning rate is divided by 1 + staleness (Zhang et al. 2016, arXiv:1511.05950). With a
    ``compressor`` what is pushed and added are its payloads, one a shard, and what they leave out is kept here. Rows of
    tables go as they are.
    """

    def __init__(
        self,
        replica: Replica,
        comm: Communicator,
        servers: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaled: bool = False,
        compressor: Compressor | None = None,
    ) -> None:
        self.replica, self.comm = replica, comm
        self.optimizer, self.scaled = optimizer, scaled
        self.compressor = compressor if comm.size > 1 else None
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
        if self.compressor is not None:
            wholes = [layout_of(piece) for piece in replica.pieces]
            parts = [wholes[s.piece].part(s.lo, s.hi) for s in self.shards]
            self._parcels = Parcels(replica, comm, self.compressor, parts)
        self.rules = [None if optimizer is None else self._rule(i) for i in range(len(replica.pieces))]
        self._lay_out()
        for i, piece in enumerate(replica.pieces):
            if piece.width:
                replica.before_lookup(i, functools.partial(self._look_up, i))
        self.rebase()

    @abstractmethod
    def _lay_out(self) -> None:
        """Make the shards where they lie, with the state that the optimizer begins with. Collective."""

    @abstractmethod
    def _look_up(self, i: int, rows: Tensor) -> None:
        """Pull the rows of piece ``i`` that a forward is about to look up."""

    def _rule(self, i: int) -> Rule:
        assert self.optimizer is not None
        rule = rule_of(self.optimizer, self.group_of(i))
        assert rule is not None, "the plan has been checked"
        return rule

    def _first_value(self, i: int) -> float:
        """What state of piece ``i`` begins with: Adagrad's squares may begin with something."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[self.group_of(i)].get("initial_accumulator_value", 0.0))

    def group_of(self, i: int) -> int:
        """The group of the optimizer that piece ``i`` is in; a server's optimizer of its own has one for all."""
        return self.replica.pieces[i].group if self.optimizer is self.replica.optimizer else 0

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

    def regroup(self, comm: Communicator) -> None:
        """The workers are now those of ``comm``, fewer than before; the servers' memory, locks and ranks stay."""
        self.comm = comm

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
