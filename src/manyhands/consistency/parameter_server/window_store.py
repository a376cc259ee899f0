"""Shards in memory of workers that the others reach one-sidedly: a server without a process over MPI (survey §VI-A).

    pull   lock;  get θ and version;  unlock
    push   lock;  get θ, optimizer state and counts;  θ ← u(θ, g);  put them back;  unlock

Shard s lies with worker s mod P, as its lock does, in a `communicator.Window`; its owner takes no part in what others
do with it. Whoever pushes does the server's work on a copy, and the work is `CommonStore`'s own code. Of a table with
sparse gradients only the rows that a batch touches travel, and their state, so the table's size does not matter.

Guarantee: that of `CommonStore`, pushes to one shard happen one after the other and none is lost. Payload is counted
as it counts it, as ``push`` and ``pull``. What the windows move for it is counted as ``service``: n elements for a pull
and, with a state of k vectors, 2 (k + 1) n for a push, plus the counts; nothing for shards of one's own. Of rounds what
`window_rounds` says travels, too. Words of locks and boards are not counted. Memory: each worker has a copy of
everything, in which it works, beside its shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.consistency.parameter_server.common_store import CommonStore
from manyhands.consistency.parameter_server.shards import To
from manyhands.consistency.parameter_server.window_rounds import WindowRounds, behind
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters

WORD_B = 8

Part = tuple[int, Tensor]


class _Place(NamedTuple):
    """Where in its owner's memory each part of a shard lies, with this worker's copy of it."""

    owner: int
    version: Part
    updates: Part
    values: Part
    slots: list[Part]

    def counts(self, to: To) -> list[Part]:
        return [self.version, self.updates] if to is To.UPDATE else [self.version]

    def vectors(self, to: To) -> list[Part]:
        return [self.values, *self.slots] if to is To.UPDATE else [self.values]


class WindowStore(CommonStore):
    """See the file's head; what `CommonStore` has in common memory (`flats`, counts) are copies here."""

    def _lay_out(self) -> None:
        """Copies of all, and everybody's memory: where to stop, what is in use (of rank 0), and the shards."""
        super()._lay_out()
        comm = self.comm
        self._stop_word = 0, torch.from_numpy(self._stop)
        self._in_use = WORD_B, torch.zeros(self.parameters, dtype=torch.int64)
        versions, updates = torch.from_numpy(self._versions), torch.from_numpy(self._updates)
        ends = [WORD_B + WORD_B * self.parameters] * comm.size
        self._places: list[_Place] = []

        def lay(owner: int, copy: Tensor) -> Part:
            at, ends[owner] = behind(ends[owner], copy)
            return at, copy

        for s, (i, lo, hi, units, _) in enumerate(self.shards):
            owner = s % comm.size
            version, update, values = (
                lay(owner, x) for x in (versions[s : s + 1], updates[units], self.flats[i][lo:hi])
            )
            slots = [lay(owner, slot[lo:hi]) for slot in self._slots[i]]
            self._places.append(_Place(owner, version, update, values, slots))
        self._window = comm.window(ends[comm.rank])
        for place in self._places:
            if place.owner == comm.rank:
                self._window.put(comm.rank, *place.slots)

    @contextlib.contextmanager
    def _holding(self, s: int, to: To, rows: Tensor | None = None) -> Iterator[None]:
        comm, place = self.comm, self._places[s]
        counts, vectors = place.counts(to), place.vectors(to)
        with self._locks[s]:
            if rows is None:
                with comm.counting("service"):
                    self._window.get(place.owner, *counts, *vectors)
                yield
                if to is not To.READ:
                    with comm.counting("service"):
                        self._window.put(place.owner, *counts, *vectors)
                return
            width = self.replica.pieces[self.shards[s].piece].width
            rows = rows - self.shards[s].lo // width
            tables = [copy.view(-1, width) for _, copy in vectors]
            there = [
                at + rows * table.stride(0) * table.element_size()
                for (at, _), table in zip(vectors, tables, strict=True)
            ]
            with comm.counting("service"):
                some = [table.new_empty(len(rows), width) for table in tables]
                self._window.get(place.owner, *counts, *zip(there, some, strict=True))
            for table, got in zip(tables, some, strict=True):
                table[rows] = got
            yield
            if to is not To.READ:
                with comm.counting("service"):
                    changed = [table[rows] for table in tables]
                    self._window.put(place.owner, *counts, *zip(there, changed, strict=True))

    def share_what_is_in_use(self) -> None:
        """What others have reached is read before, and what only this worker has, is added after."""
        _, theirs = self._in_use
        if not self._used.all():
            with self.comm.counting("service"):
                self._window.get(0, self._in_use)
            self._used |= theirs.numpy()
        super().share_what_is_in_use()
        if (self._used > theirs.numpy()).any():
            with self._locks[0], self.comm.counting("service"):
                self._window.get(0, self._in_use)
                theirs |= torch.from_numpy(self._used)
                self._window.put(0, self._in_use)

    def rounds(self, needed: int, rule: Aggregation) -> WindowRounds:
        """See `Store.rounds`."""
        return WindowRounds(self, needed, rule)

    def look_at_version(self) -> None:
        """Get the first shard's."""
        with self.comm.counting("service"):
            self._window.get(self._places[0].owner, self._places[0].version)

    def rebase(self) -> None:
        """See `Store.rebase`."""
        if self.comm.rank == 0:
            with self.comm.counting("service"):
                for shard, place in zip(self.shards, self._places, strict=True):
                    at, copy = place.values
                    copy.copy_(self.replica.pieces[shard.piece].flat[shard.lo : shard.hi])
                    self._window.put(place.owner, (at, copy))
        self.comm.barrier()

    def snapshot(self) -> Parameters:
        """See `Store.snapshot`; counted are n elements pulled."""
        with self.comm.counting("consensus"):
            self.comm.barrier()
            for place in self._places:
                self.comm.access("pull", place.values[1])
        with self.comm.counting("service"):
            for place in self._places:
                self._window.get(place.owner, place.values)
        return super().snapshot()

    def stop(self, step: int) -> None:
        """See `Store.stop`: everybody finds it with himself."""
        super().stop(step)
        with self.comm.counting("service"):
            for rank in range(self.comm.size):
                self._window.put(rank, self._stop_word)

    @property
    def stopped(self) -> bool:
        """See `Store.stopped`."""
        self._window.get(self.comm.rank, self._stop_word)
        return super().stopped

    def state_dict(self) -> dict[str, Any]:
        """See `Store.state_dict`."""
        if self.comm.rank == 0:
            with self.comm.counting("service"):
                for place in self._places:
                    self._window.get(place.owner, *place.counts(To.UPDATE), *place.slots)
                self._window.get(0, self._in_use)
            self._used |= self._in_use[1].numpy()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Store.load_state_dict`."""
        super().load_state_dict(state)
        if self.comm.rank == 0:
            self._in_use[1].copy_(torch.from_numpy(self._used))
            with self.comm.counting("service"):
                for place in self._places:
                    self._window.put(place.owner, *place.counts(To.UPDATE), *place.slots)
                self._window.put(0, self._in_use)
        self.comm.barrier()
