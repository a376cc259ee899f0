"""Shards in memory that all workers see: a parameter server without a process (survey §VI-A).

    pull   lock;  θ and version;  unlock
    push   lock;  θ ← u(θ, g);  version ← version + 1;  unlock

Whoever pushes does the server's work himself, under the shard's lock, and in virtual time the lock is held as long as
that takes. A worker that dies meanwhile leaves a lock for the next to take over. Guarantee: pushes to one shard happen
one after the other and none is lost. Payload is counted as ``push`` and ``pull``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhands.communication.communicator import Board, Communicator
from manyhands.consistency.parameter_server.common_rounds import CommonRounds
from manyhands.consistency.parameter_server.rounds import Round
from manyhands.consistency.parameter_server.shards import Shard, To, within
from manyhands.consistency.parameter_server.store import Store
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters
from manyhands.models.update_rules import Rule


class CommonStore(Store):
    """Shards in common memory, each under a lock."""

    def _lay_out(self) -> None:
        comm, pieces = self.comm, self.replica.pieces
        self.flats = [comm.allocate(p.flat.numel(), p.flat.dtype, common=True) for p in pieces]
        self._theirs = [self.flats[s.piece][s.lo : s.hi] for s in self.shards]
        self._slots = [
            [comm.allocate(p.flat.numel(), p.flat.dtype, common=True) for _ in range(rule.slots if rule else 0)]
            for p, rule in zip(pieces, self.rules, strict=True)
        ]
        self._versions, self._updates, self._used, self._stop = (
            counters(comm, n) for n in (len(self.shards), len(self.units), self.parameters, 1)
        )
        # Where a server's visitors stand in line, and each visit is one access, a lock would keep nobody out.
        in_line = comm.serves_in_line and self.optimizer is None
        self._locks = [nullcontext()] * len(self.shards) if in_line else comm.locks(len(self.shards))
        # Workers begin with different shards, so that they meet at a lock only by chance.
        first = comm.rank * len(self.shards) // comm.size
        self._order = [*range(first, len(self.shards)), *range(first)]
        for i, piece in enumerate(pieces):
            if piece.width:
                for slot in self._slots[i]:  # Adagrad's squares; what is looked up late begins like the rest
                    slot.fill_(self._first_value(i))

    def _holding(self, s: int, to: To, rows: Tensor | None = None) -> AbstractContextManager[None]:
        """Inside, shard ``s`` (or some ``rows`` of its table) is this worker's alone, ``to`` do that with it."""
        return self._locks[s]

    def rebase(self) -> None:
        """The shards become what rank 0's pieces hold. Collective."""
        if self.comm.rank == 0:
            for flat, piece in zip(self.flats, self.replica.pieces, strict=True):
                flat.copy_(piece.flat)
        self.comm.barrier()

    def pull(self) -> None:
        """See `Store.pull`."""
        for s in self._order:
            shard = self.shards[s]
            if self.replica.pieces[shard.piece].width:
                continue  # rows come when they are looked up
            mine = self._mine(shard)
            with self._holding(s, To.READ):
                self.comm.access("pull", mine, at=shard.server)
                mine.copy_(self._theirs[s])
                self.read[s] = int(self._versions[s])

    def push(self, vectors: Sequence[Tensor], *, pull: bool = False) -> None:
        """See `Store.push`."""
        self.share_what_is_in_use()
        payloads, vectors = self._pack(vectors)
        for s in self._order:
            shard = self.shards[s]
            if self.replica.pieces[shard.piece].width:
                self._push_rows(s, vectors[shard.piece])
                continue
            mine = self._mine(shard)
            with self._holding(s, To.UPDATE):
                self.comm.access("push", payloads[s], at=shard.server)
                late = int(self._versions[s]) - self.read[s]
                self._update(shard, vectors[shard.piece], late)
                self._versions[s] += 1
                if pull:
                    self.comm.access("pull", mine, at=shard.server)
                    mine.copy_(self._theirs[s])
                    self.read[s] = int(self._versions[s])
            self.staleness[late] += 1

    def _look_up(self, i: int, rows: Tensor) -> None:
        piece = self.replica.pieces[i]
        for s, shard in enumerate(self.shards):
            if shard.piece != i:
                continue
            own = within(rows, shard, piece.width)
            if len(own):
                mine, theirs = (flat.view(-1, piece.width) for flat in (piece.flat, self.flats[i]))
                with self._holding(s, To.READ, own):
                    self.comm.access("pull", own, at=shard.server)  # the request
                    self.comm.access("pull", mine[: len(own)], at=shard.server)  # the answer
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
        with self._holding(s, To.UPDATE, own):
            self.comm.access("push", own, at=shard.server)
            self.comm.access("push", gradient, at=shard.server)
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

    def rounds(self, needed: int, rule: Aggregation) -> CommonRounds:
        """See `Store.rounds`."""
        return CommonRounds(self, needed, rule)

    @property
    def version(self) -> int:
        """Of the first shard, as this worker last saw it: where all are updated together, how often that was."""
        return int(self._versions[0])

    def finish(self, round: Round) -> bool:
        """Apply ``round`` if it is complete; its number is the shards' version, which is then the next one's."""
        if not round.complete:
            return False
        vectors = round.end(self.version)
        for s, shard in enumerate(self.shards):
            with self._holding(s, To.UPDATE):
                if vectors is not None:
                    self._update(shard, vectors[shard.piece], 0)
                self._versions[s] += 1
        return True

    def add(self, vectors: Sequence[Tensor]) -> None:
        """See `Store.add`."""
        payloads, told = self._pack(vectors)
        for s in self._order:
            shard = self.shards[s]
            change = payloads[s] if told is vectors else told[shard.piece][shard.lo : shard.hi]
            with self._holding(s, To.ADD):
                self.comm.access("push", payloads[s], at=shard.server)
                self._theirs[s].add_(change)
                self._versions[s] += 1

    def _mine(self, shard: Shard) -> Tensor:
        """Where this worker has its copy of ``shard``."""
        return self.replica.pieces[shard.piece].flat[shard.lo : shard.hi]

    def share_what_is_in_use(self) -> None:
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
        rule, optimizer = self.rules[shard.piece], self.optimizer
        assert rule is not None
        assert optimizer is not None
        group: Mapping[str, Any] = optimizer.param_groups[self.group_of(shard.piece)]
        if self.scaled and late:
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
        with self.comm.counting("consensus"):
            self.comm.barrier()
            agreed = tuple(flat.clone() for flat in self.flats)
            self.comm.barrier()
        return agreed

    def board(self) -> Board:
        """See `Store.board`."""
        return self.comm.board()

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
        if self.comm.rank == 0:
            state["slots"] = [[slot.clone() for slot in slots] for slots in self._slots]
            state |= {name: each.tolist() for name, each in self._counts().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        self.read = list(state["read"])
        self.take_left_over(state)
        if self.comm.rank == 0:
            for slots, saved in zip(self._slots, state["slots"], strict=True):
                for slot, values in zip(slots, saved, strict=True):
                    slot.copy_(values)
            for name, each in self._counts().items():
                each[:] = state[name]
        self.comm.barrier()

    def _counts(self) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        return {"versions": self._versions, "updates": self._updates, "used": self._used}


def counters(comm: Communicator, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``n`` whole numbers that all workers see; torch's own access to one element takes ten times as long."""
    result: np.ndarray[Any, np.dtype[np.int64]] = comm.allocate(n, torch.int64, common=True).numpy()
    return result
