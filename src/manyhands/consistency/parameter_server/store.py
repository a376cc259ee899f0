"""A parameter server: parameters that nobody owns, pulled and pushed a shard at a time (survey §VI-A).

    pull   read a shard, and its version
    push   the shard's own optimizer takes a gradient: θ ← u(θ, g), version ← version + 1
    add    θ ← θ + δ, version ← version + 1

Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014; the shards, each with its own
optimizer and version, are DistBelief's (Dean et al. 2012). Shards cut every piece into equal slices, so that all have
the same amount to do. What a push finds newer than what its worker has pulled is its *staleness*, in updates.

`CommonStore` is the server without a process: the shards lie in memory that all workers see, and whoever pushes does
the server's work itself, under the shard's lock. A worker that dies meanwhile leaves a lock for the next to take over.
Where no memory is shared the shards lie in memory that workers reach at each other, see `window_store`, or on ranks of
their own, see `server` and `remote_store`.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyhands.communication.board import NEVER
from manyhands.communication.communicator import Board, Communicator
from manyhands.communication.compression.compressor import Compressor, Shape
from manyhands.communication.reduction import slices
from manyhands.consistency.compressed import Parcels, layout_for, layout_of
from manyhands.consistency.parameter_server.rounds import END_OF_A_ROUND, Outcome, Round, late_for_a_round
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters, Replica, Traffic
from manyhands.errors import DeadlineExceeded
from manyhands.models.update_rules import Rule, rule_of


class Shard(NamedTuple):
    """``pieces[piece].flat[lo:hi]``; ``units`` are the parts of it that belong to single parameters."""

    piece: int
    lo: int
    hi: int
    units: slice  # in the store's list of all units
    server: int = 0  # which of them has it


class Unit(NamedTuple):
    """The part of one parameter that lies in one shard: it has been updated as a whole or not at all."""

    lo: int
    hi: int
    parameter: int  # counted over all pieces


def bounds(numel: int, servers: int, width: int = 0) -> list[tuple[int, int]]:
    """How a piece is cut among the servers, a table between its rows; small pieces have fewer shards."""
    if width:
        cuts = [numel // width * s // servers * width for s in range(servers + 1)]
        return [(lo, hi) for lo, hi in itertools.pairwise(cuts) if hi > lo]
    return [(lo, hi) for lo, hi in slices(numel, servers) if hi > lo]


def traffic(
    shapes: Sequence[Shape],
    size: int,
    itemsize: int,
    servers: int,
    *,
    every: int = 1,
    compressor: Compressor | None = None,
) -> Traffic:
    """Of pulling or pushing all shards of a piece once in ``every`` steps: n elements, or a payload a shard.

    A worker alone sends nothing.
    """
    if size == 1:
        return Traffic()
    numel = sum(map(math.prod, shapes))
    shards = bounds(numel, servers)
    if compressor is None:
        return Traffic(numel * itemsize, len(shards), every)
    layout = layout_for(shapes, itemsize)
    return Traffic(sum(compressor.payload_B(layout.part(lo, hi)) for lo, hi in shards), len(shards), every)


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

    def open_rounds(self, needed: int, rule: Aggregation) -> None:
        """From here on gradients come by `bring`, ``needed`` to an update, joined by ``rule``. Collective.

        Only where all shards lie on one server, see `rounds`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rounds")

    def bring(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> tuple[int, Outcome]:
        """A gradient a piece, to the round whose parameters this worker has; then all shards are pulled.

        Returns how many rounds it came too late, and if in time (0) what became of the round, once that has ended.
        For ``weight`` and ``votes`` see `Round.take`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rounds")

    def aside(self, by: int) -> None:
        """Rounds do not wait for this worker from here on (1), or do again (−1)."""
        raise NotImplementedError(f"{type(self).__name__} has no rounds")

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
        """The workers are now those of ``comm``, fewer than before."""
        raise NotImplementedError(f"{type(self).__name__} cannot go on without a worker")

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


class To(Enum):
    """What is done with a shard: READ values and version, change (ADD to) them, or UPDATE the optimizer's state too."""

    READ, ADD, UPDATE = range(3)


class CommonStore(Store):
    """Shards in common memory, each under a lock.

    ``optimizer`` is what a push does, with the hyper-parameters that it has then; without one there is only `add`.
    ``scaled``: the learning rate is divided by 1 + staleness (Zhang et al. 2016, arXiv:1511.05950).
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
        super().__init__(replica, comm, servers, compressor)
        self._comm, self._scaled = comm, scaled
        self._optimizer = optimizer
        self.flats = [comm.allocate(p.flat.numel(), p.flat.dtype, common=True) for p in replica.pieces]
        self._rules = [None if optimizer is None else self._rule(i) for i in range(len(replica.pieces))]
        self._slots = [
            [comm.allocate(p.flat.numel(), p.flat.dtype, common=True) for _ in range(rule.slots if rule else 0)]
            for p, rule in zip(replica.pieces, self._rules, strict=True)
        ]
        self._versions, self._updates, self._used, self._stop = (
            counters(comm, n) for n in (len(self.shards), len(self.units), self.parameters, 1)
        )
        self._locks = comm.locks(len(self.shards))
        # Workers begin with different shards, so that they meet at a lock only by chance.
        first = comm.rank * len(self.shards) // comm.size
        self._order = [*range(first, len(self.shards)), *range(first)]
        for i, piece in enumerate(replica.pieces):
            if piece.width:
                for slot in self._slots[i]:  # Adagrad's squares; what is looked up late begins like the rest
                    slot.fill_(self._first_value(i))
                replica.before_lookup(i, functools.partial(self._pull_rows, i))
        self._lay_out()
        self.rebase()

    def _rule(self, i: int) -> Rule:
        assert self._optimizer is not None
        rule = rule_of(self._optimizer, self._group_of(i))
        assert rule is not None, "the plan has been checked"
        return rule

    def _first_value(self, i: int) -> float:
        assert self._optimizer is not None
        return float(self._optimizer.param_groups[self._group_of(i)].get("initial_accumulator_value", 0.0))

    def _group_of(self, i: int) -> int:
        """A server's optimizer of its own has one group for all pieces."""
        assert self._optimizer is not None
        return self.replica.pieces[i].group if self._optimizer is self.replica.optimizer else 0

    def _lay_out(self) -> None:
        """All is allocated, and the slots hold what they begin with."""

    def _holding(self, s: int, to: To, rows: Tensor | None = None) -> AbstractContextManager[None]:
        """Inside, shard ``s`` (or some ``rows`` of its table) is this worker's alone, ``to`` do that with it."""
        return self._locks[s]

    def regroup(self, comm: Communicator) -> None:
        """Memory and locks stay where they are."""
        self._comm = comm

    def rebase(self) -> None:
        """The shards become what rank 0's pieces hold. Collective."""
        if self._comm.rank == 0:
            for flat, piece in zip(self.flats, self.replica.pieces, strict=True):
                flat.copy_(piece.flat)
        self._comm.barrier()

    def pull(self) -> None:
        """See `Store.pull`."""
        for s in self._order:
            shard = self.shards[s]
            if self.replica.pieces[shard.piece].width:
                continue  # rows come when they are looked up
            theirs, mine = self._both(shard)
            self._comm.access("pull", mine, at=shard.server)
            with self._holding(s, To.READ):
                mine.copy_(theirs)
                self.read[s] = int(self._versions[s])

    def push(self, vectors: Sequence[Tensor], *, pull: bool = False) -> None:
        """See `Store.push`."""
        self._share_what_is_in_use()
        payloads, vectors = self._pack(vectors)
        for s in self._order:
            shard = self.shards[s]
            if self.replica.pieces[shard.piece].width:
                self._push_rows(s, vectors[shard.piece])
                continue
            theirs, mine = self._both(shard)
            self._comm.access("push", payloads[s], at=shard.server)
            if pull:
                self._comm.access("pull", mine, at=shard.server)
            with self._holding(s, To.UPDATE):
                late = int(self._versions[s]) - self.read[s]
                self._update(shard, vectors[shard.piece], late)
                self._versions[s] += 1
                if pull:
                    mine.copy_(theirs)
                    self.read[s] = int(self._versions[s])
            self.staleness[late] += 1

    def _pull_rows(self, i: int, rows: Tensor) -> None:
        """The rows that a forward is about to look up."""
        piece = self.replica.pieces[i]
        for s, shard in enumerate(self.shards):
            if shard.piece != i:
                continue
            own = within(rows, shard, piece.width)
            if len(own):
                mine, theirs = (flat.view(-1, piece.width) for flat in (piece.flat, self.flats[i]))
                self._comm.access("pull", own, at=shard.server)  # the request
                self._comm.access("pull", mine[: len(own)], at=shard.server)  # the answer
                with self._holding(s, To.READ, own):
                    mine[own] = theirs[own]
                    self.read[s] = int(self._versions[s])

    def _push_rows(self, s: int, values: Tensor) -> None:
        """Of a sparse piece, what lies in shard ``s``."""
        shard = self.shards[s]
        piece = self.replica.pieces[shard.piece]
        assert piece.rows is not None
        own = within(piece.rows, shard, piece.width)
        if not len(own):
            return
        first = int(torch.searchsorted(piece.rows, own[0]))
        gradient = values.view(-1, piece.width)[first : first + len(own)]
        self._comm.access("push", own, at=shard.server)
        self._comm.access("push", gradient, at=shard.server)
        with self._holding(s, To.UPDATE, own):
            late = int(self._versions[s]) - self.read[s]
            self._update_rows(shard, own, gradient, late)
            self._versions[s] += 1
        self.staleness[late] += 1

    def _update_rows(self, shard: Shard, rows: Tensor, gradient: Tensor, late: int) -> None:
        """The servers' optimizer on some rows of a table; all others it would leave as they are."""
        rule, group = self._rule_and_group(shard, late)
        updates = self._updates[shard.units]
        updates += 1
        shape = -1, self.replica.pieces[shard.piece].width
        table, slots = self.flats[shard.piece].view(shape), [s.view(shape) for s in self._slots[shard.piece]]
        theta, state = table[rows], [slot[rows] for slot in slots]
        rule.apply(theta, gradient, state, int(updates[0]), group)
        table[rows] = theta
        for slot, values in zip(slots, state, strict=True):
            slot[rows] = values

    def open_rounds(self, needed: int, rule: Aggregation) -> None:
        """See `Store.open_rounds`."""
        self._round = self._new_round(needed, rule)
        (self._round_lock,) = self._comm.locks(1)
        self._ended = self._comm.board()  # a worker's: the last round that it has ended, plus 1
        self._came = self._comm.board()  # … that it has come to; for messages alone, and nobody waits for it

    def _new_round(self, needed: int, rule: Aggregation) -> Round:
        allocate = functools.partial(self._comm.allocate, common=True)
        return Round(self.replica.pieces, needed, self._comm.size, rule, allocate=allocate)

    def bring(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> tuple[int, Outcome]:
        """See `Store.bring`."""
        if weight:
            for x in vectors:
                self._comm.access("push", x)
        number = self.read[0]
        with self._holding_round(To.UPDATE):
            self._share_what_is_in_use()
            late = int(self._versions[0]) - number
            if not late:
                self._round.take(vectors, weight, votes=votes)
                self._came.post(number + 1)
                self._end_round()
        if not late:
            try:
                self._ended.wait_for_one(number + 1, END_OF_A_ROUND)
            except DeadlineExceeded as e:
                raise late_for_a_round(e, number, self._came.read()) from e
        with self._holding_round(To.READ):
            self.pull()
            return late, self._round.outcome(number)

    def aside(self, by: int) -> None:
        """See `Store.aside`."""
        with self._holding_round(To.UPDATE):
            self._came.post(NEVER if by > 0 else 0)
            self._round.aside(by)
            self._end_round()

    def _holding_round(self, to: To) -> AbstractContextManager[object]:
        """Inside, the round under way is this worker's alone, READ or UPDATEd, and the shards stay as they are."""
        return self._round_lock

    def _end_round(self) -> bool:
        """Whoever completes a round applies it, and opens the next: its number is the shards' version."""
        if not self._round.complete:
            return False
        vectors = self._round.end(int(self._versions[0]))
        for s, shard in enumerate(self.shards):
            with self._holding(s, To.UPDATE):
                if vectors is not None:
                    self._update(shard, vectors[shard.piece], 0)
                self._versions[s] += 1
        self._ended.post(int(self._versions[0]))
        return True

    def add(self, vectors: Sequence[Tensor]) -> None:
        """See `Store.add`."""
        payloads, vectors = self._pack(vectors)
        for s in self._order:
            shard = self.shards[s]
            change = vectors[shard.piece][shard.lo : shard.hi]
            self._comm.access("push", payloads[s], at=shard.server)
            with self._holding(s, To.ADD):
                self.flats[shard.piece][shard.lo : shard.hi].add_(change)
                self._versions[s] += 1

    def _both(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """The shard itself, and where this worker has its copy."""
        own = self.replica.pieces[shard.piece].flat
        return self.flats[shard.piece][shard.lo : shard.hi], own[shard.lo : shard.hi]

    def _share_what_is_in_use(self) -> None:
        """A parameter that some worker's backward has reached is in use for all."""
        if not self.replica.watching:
            if not self._used.all():
                self._used[:] = 1
            return
        reached, first = self.replica.reached(), 0
        settled = {}
        for i, piece in enumerate(self.replica.pieces):
            used = self._used[first : first + max(len(piece.spans), 1)]
            if i in reached:
                used |= reached[i].numpy().astype(np.int64)
                settled[i] = torch.from_numpy(used.astype(np.float32))
            else:
                used[:] = 1
            first += len(used)
        self.replica.settle(settled)

    def _update(self, shard: Shard, vector: Tensor, late: int) -> None:
        """The servers' optimizer on the parameters that are in use."""
        rule, group = self._rule_and_group(shard, late)
        flat, slots = self.flats[shard.piece], self._slots[shard.piece]
        for lo, hi, t in self._runs(shard):
            rule.apply(flat[lo:hi], vector[lo:hi], [slot[lo:hi] for slot in slots], t, group)

    def _rule_and_group(self, shard: Shard, late: int) -> tuple[Rule, Mapping[str, Any]]:
        rule, optimizer = self._rules[shard.piece], self._optimizer
        assert rule is not None
        assert optimizer is not None
        group: Mapping[str, Any] = optimizer.param_groups[self._group_of(shard.piece)]
        if self._scaled and late:
            group = {**group, "lr": group["lr"] / (1 + late)}
        return rule, group

    def _runs(self, shard: Shard) -> list[tuple[int, int, int]]:
        """``(lo, hi, t)``: neighbours in use that are all updated for the t-th time now."""
        updates = self._updates[shard.units]
        if not self.replica.watching and (updates == updates[0]).all():
            updates += 1
            return [(shard.lo, shard.hi, int(updates[0]))]
        runs: list[tuple[int, int, int]] = []
        for k, unit in enumerate(self.units[shard.units]):
            if not self._used[unit.parameter]:
                continue
            updates[k] += 1
            t = int(updates[k])
            if runs and runs[-1][1] == unit.lo and runs[-1][2] == t:
                runs[-1] = (runs[-1][0], unit.hi, t)
            else:
                runs.append((unit.lo, unit.hi, t))
        return runs

    def snapshot(self) -> Parameters:
        """See `Store.snapshot`."""
        with self._comm.counting("consensus"):
            self._comm.barrier()
            agreed = tuple(flat.clone() for flat in self.flats)
            self._comm.barrier()
        return agreed

    def board(self) -> Board:
        """See `Store.board`."""
        return self._comm.board()

    def stop(self, step: int) -> None:
        """See `Store.stop`."""
        self._stop[0] = step + 1

    @property
    def stopped(self) -> bool:
        """See `Store.stopped`."""
        return bool(self._stop[0])

    def state_dict(self) -> dict[str, Any]:
        """Of this worker its versions; of rank 0 the servers' state, too, without the parameters themselves."""
        state: dict[str, Any] = {"read": list(self.read), **self.left_over()}
        if self._comm.rank == 0:
            state["slots"] = [[slot.clone() for slot in slots] for slots in self._slots]
            state |= {name: each.tolist() for name, each in self._counts().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        self.read = list(state["read"])
        self.take_left_over(state)
        if self._comm.rank == 0:
            for slots, saved in zip(self._slots, state["slots"], strict=True):
                for slot, values in zip(slots, saved, strict=True):
                    slot.copy_(values)
            for name, each in self._counts().items():
                each[:] = state[name]
        self._comm.barrier()

    def _counts(self) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        return {"versions": self._versions, "updates": self._updates, "used": self._used}


def within(rows: Tensor, shard: Shard, width: int) -> Tensor:
    """Those of ``rows``, which are in order, that lie in ``shard``."""
    first, last = torch.searchsorted(rows, torch.tensor([shard.lo // width, shard.hi // width])).tolist()
    return rows[first:last]


def counters(comm: Communicator, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``n`` whole numbers that all workers see; torch's own access to one element takes ten times as long."""
    result: np.ndarray[Any, np.dtype[np.int64]] = comm.allocate(n, torch.int64, common=True).numpy()
    return result
