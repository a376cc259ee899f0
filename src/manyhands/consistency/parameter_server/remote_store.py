"""The worker's end of servers that are ranks: shards travel as messages, over gloo (survey §VI-A).

Shard j of every piece lies on server j, the rank P + j of ``comm.servers``; what it does there, `server` says. A worker
asks all servers at once and takes the answers in the servers' order, so that no two of them can wait for each other.

Payload is counted as `CommonStore` counts it, as ``push`` and ``pull``; the messages that carry it, with their headers,
as ``service``. A server that dies ends the workers' waits by a `PeerLost` with its rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Board, Work
from manyhands.consistency.compressed import layout_of
from manyhands.consistency.parameter_server.remote_board import RemoteBoard
from manyhands.consistency.parameter_server.remote_rounds import RemoteRounds
from manyhands.consistency.parameter_server.requests import (
    ANSWER,
    ANSWERED_B,
    PAYLOAD,
    REQUEST,
    Ask,
    finish,
    frame,
    header,
)
from manyhands.consistency.parameter_server.shards import Shard, within
from manyhands.consistency.parameter_server.store import Store
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.contract import Parameters


class RemoteStore(Store):
    """See the file's head."""

    def _lay_out(self) -> None:
        comm = self.comm
        assert comm.servers is not None
        self.world = comm.servers
        self._stopped, self._boards = False, 0
        self.held: dict[int, list[int]] = {}  # by server: its shards
        for s, shard in enumerate(self.shards):
            first = next(t for t, other in enumerate(self.shards) if other.piece == shard.piece)
            self.held.setdefault(comm.size + s - first, []).append(s)
        self._at = {s: (rank, i) for rank, held in sorted(self.held.items()) for i, s in enumerate(held)}
        self._frames = [frame(s.hi - s.lo, self.replica.pieces[s.piece].flat.dtype) for s in self.shards]
        comm.barrier()  # all have done with the store before
        if comm.rank == 0:
            with comm.counting("service"):
                for rank, held in self.held.items():
                    self._open(rank, held)

    # -- requests --------------------------------------------------------------------------------------------------

    def _open(self, rank: int, held: Sequence[int]) -> None:
        described = []
        for s in held:
            shard = self.shards[s]
            described.append(
                {
                    "numel": shard.hi - shard.lo,
                    "dtype": str(self.replica.pieces[shard.piece].flat.dtype).removeprefix("torch."),
                    "width": self.replica.pieces[shard.piece].width,
                    "spans": [(u.lo - shard.lo, u.hi - shard.lo) for u in self.units[shard.units]],
                    **({} if self.optimizer is None else self._updating(shard.piece)),
                    **({} if self.compressor is None else self._packing(shard)),
                }
            )
        text = json.dumps({"shards": described, "updates": self.optimizer is not None, "scaled": self.scaled}).encode()
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        works = self.ask(rank, header(Ask.OPEN, count=len(payload)), payload)
        self.answer(rank)
        finish(works)

    def _packing(self, shard: Shard) -> dict[str, Any]:
        """How to read payloads of a shard."""
        shapes = layout_of(self.replica.pieces[shard.piece]).shapes
        return {"compress": str(self.compressor), "shapes": shapes, "lo": shard.lo, "hi": shard.hi}

    def _updating(self, i: int) -> dict[str, Any]:
        """How to update what lies of piece ``i``."""
        rule = self.rules[i]
        assert rule is not None
        return {"rule": rule.apply.__name__, "slots": rule.slots, "first": self._first_value(i)}

    def ask(self, rank: int, request: Tensor, *payload: Tensor) -> list[Work]:
        """Send a request and what it announces; to be finished."""
        asked = self.world.send(request, rank, REQUEST)
        return [asked, *(self.world.send(x, rank, PAYLOAD) for x in payload if x.numel())]

    def answer(self, rank: int) -> None:
        """One without values, of no shard."""
        whole, beginning, _ = frame(0, torch.uint8)
        self.world.recv(whole, rank, ANSWER)
        self._stopped |= bool(beginning[2])

    def answer_of(self, s: int, *, values: bool) -> tuple[int, int, Tensor]:
        """Version, lateness, and the values if they are awaited; those until the shard's next answer."""
        whole, beginning, there = self._frames[s]
        self.world.recv(whole if values else whole[:ANSWERED_B], self._at[s][0], ANSWER)
        version, late, stopped = beginning.tolist()
        self._stopped |= bool(stopped)
        return int(version), int(late), there

    def _packed(self, payload: Tensor) -> int:
        """See `requests.header`."""
        return 0 if self._parcels is None else 1 + payload.numel()

    def slice(self, s: int, vectors: Sequence[Tensor]) -> Tensor:
        """Of ``vectors``, a piece each, what shard ``s`` has."""
        shard = self.shards[s]
        return vectors[shard.piece][shard.lo : shard.hi]

    # -- what a store does -----------------------------------------------------------------------------------------

    def rebase(self) -> None:
        """The shards become what rank 0's pieces hold. Collective."""
        if self.comm.rank == 0:
            with self.comm.counting("service"):
                flats = [piece.flat for piece in self.replica.pieces]
                self._give(Ask.SET, [self.slice(s, flats) for s in range(len(self.shards))], [0] * len(self.shards))
        self.comm.barrier()

    def pull(self) -> None:
        """See `Store.pull`."""
        dense = [s for s in self._at if not self.replica.pieces[self.shards[s].piece].width]  # rows come at a look-up
        self._fetch([piece.flat for piece in self.replica.pieces], dense, noting=True)

    def push(self, vectors: Sequence[Tensor], *, pull: bool = False) -> None:
        """See `Store.push`."""
        assert self.optimizer is not None
        in_use = self.share_what_is_in_use()
        packed, _ = self._pack(vectors)
        pushed = {s: payload for s in self._at if (payload := self._payload(s, packed[s], vectors))}
        returned = {s for s, payload in pushed.items() if pull and len(payload) == 1}
        mine = [piece.flat for piece in self.replica.pieces]
        for s, payload in pushed.items():
            for x in payload:
                self.comm.access("push", x)
            if s in returned:
                self.comm.access("pull", self.slice(s, mine))
        with self.comm.counting("service"):
            works = []
            for s, payload in pushed.items():
                rank, i = self._at[s]
                group = self.optimizer.param_groups[self.group_of(self.shards[s].piece)]
                what, count = (Ask.PUSH, s in returned) if len(payload) == 1 else (Ask.PUSH_ROWS, len(payload[0]))
                rows_here = payload if len(payload) == 1 else (self._here(s, payload[0]), payload[1])
                length = self._packed(payload[0]) if len(payload) == 1 else 0
                asked = header(what, i, read=self.read[s], count=count, in_use=in_use, packed=length, group=group)
                works += self.ask(rank, asked, *rows_here)
            for s in pushed:
                version, late, values = self.answer_of(s, values=s in returned)
                self.staleness[late] += 1
                if s in returned:
                    self.slice(s, mine).copy_(values)
                    self.read[s] = version
            finish(works)

    def _payload(self, s: int, packed: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a push to shard ``s`` carries: its gradient; of a table the rows in it, if any, and theirs."""
        shard = self.shards[s]
        piece = self.replica.pieces[shard.piece]
        if not piece.width:
            return (packed,)
        assert piece.rows is not None
        rows = within(piece.rows, shard, piece.width)
        if not len(rows):
            return ()
        first = int(torch.searchsorted(piece.rows, rows[0]))
        return rows, vectors[shard.piece].view(-1, piece.width)[first : first + len(rows)]

    def _here(self, s: int, rows: Tensor) -> Tensor:
        """Rows as the server of shard ``s`` counts them."""
        shard = self.shards[s]
        return rows - shard.lo // self.replica.pieces[shard.piece].width

    def _look_up(self, i: int, rows: Tensor) -> None:
        piece = self.replica.pieces[i]
        table = piece.flat.view(-1, piece.width)
        wanted = {s: within(rows, self.shards[s], piece.width) for s in self._at if self.shards[s].piece == i}
        wanted = {s: own for s, own in wanted.items() if len(own)}
        for own in wanted.values():
            self.comm.access("pull", own)  # the request
            self.comm.access("pull", table[: len(own)])  # the answer
        with self.comm.counting("service"):
            works = []
            for s, own in wanted.items():
                rank, number = self._at[s]
                works += self.ask(rank, header(Ask.LOOK_UP, number, count=len(own)), self._here(s, own))
            for s, own in wanted.items():
                whole, beginning, values = frame(len(own) * piece.width, piece.flat.dtype)
                self.world.recv(whole, self._at[s][0], ANSWER)
                table[own] = values.view(-1, piece.width).to(table.device)
                self.read[s] = int(beginning[0])
                self._stopped |= bool(beginning[2])
            finish(works)

    def add(self, vectors: Sequence[Tensor]) -> None:
        """See `Store.add`."""
        packed, _ = self._pack(vectors)
        for s in self._at:
            self.comm.access("push", packed[s])
        with self.comm.counting("service"):
            self._give(Ask.ADD, packed, [self._packed(x) for x in packed])

    def _give(self, what: Ask, parts: Sequence[Tensor], packed: Sequence[int]) -> None:
        """A part a shard, which may be a payload of so many bytes less 1."""
        works = []
        for s, (rank, i) in self._at.items():
            works += self.ask(rank, header(what, i, packed=packed[s]), parts[s])
        for s in self._at:
            self.answer_of(s, values=False)
        finish(works)

    def _fetch(self, into: Sequence[Tensor], shards: Sequence[int], *, noting: bool) -> None:
        """Whole shards; ``noting``: their versions, because what is computed next is computed at them."""
        for s in shards:
            self.comm.access("pull", self.slice(s, into))
        with self.comm.counting("service"):
            works = [work for s in shards for work in self.ask(self._at[s][0], header(Ask.PULL, self._at[s][1]))]
            for s in shards:
                version, _, values = self.answer_of(s, values=True)
                self.slice(s, into).copy_(values)
                if noting:
                    self.read[s] = version
            finish(works)

    def share_what_is_in_use(self) -> bool:
        """A parameter that some worker's backward has reached is in use for all. Whether all are."""
        if not self.replica.watching:
            return True
        reached = self.replica.reached()
        used: list[int] = []
        for i, piece in enumerate(self.replica.pieces):
            used += reached[i].long().tolist() if i in reached else [1] * max(len(piece.spans), 1)
        with self.comm.counting("service"):
            works = []
            units = {r: [u for s in held for u in self.units[self.shards[s].units]] for r, held in self.held.items()}
            for rank, its in units.items():
                mine = torch.tensor([used[u.parameter] for u in its], dtype=torch.int64)
                works += self.ask(rank, header(Ask.USE, count=len(its)), mine)
            for rank, its in sorted(units.items()):
                everybodys = self.world.recv(torch.zeros(len(its), dtype=torch.int64), rank, ANSWER).tensor
                for unit, any_ in zip(its, everybodys.tolist(), strict=True):
                    used[unit.parameter] |= any_
            finish(works)
        first, settled = 0, {}
        for i, piece in enumerate(self.replica.pieces):
            count = max(len(piece.spans), 1)
            if i in reached:
                settled[i] = torch.tensor(used[first : first + count], dtype=torch.float32)
            first += count
        self.replica.settle(settled)
        return not self.replica.watching

    def rounds(self, needed: int, rule: Aggregation) -> RemoteRounds:
        """See `Store.rounds`."""
        return RemoteRounds(self, needed, rule)

    def snapshot(self) -> Parameters:
        """See `Store.snapshot`."""
        agreed = tuple(torch.empty_like(piece.flat) for piece in self.replica.pieces)
        with self.comm.counting("consensus"):
            self.comm.barrier()
            self._fetch(agreed, list(self._at), noting=False)
            self.comm.barrier()
        return agreed

    def stop(self, step: int) -> None:
        """See `Store.stop`."""
        with self.comm.counting("service"):
            works = [work for rank in self.held for work in self.ask(rank, header(Ask.STOP, read=step))]
            for rank in self.held:
                self.answer(rank)
            finish(works)

    def board(self) -> Board:
        """See `Store.board`."""
        self._boards += 1
        return RemoteBoard(self.comm, self._boards)

    @property
    def stopped(self) -> bool:
        """As far as this worker has heard: see `Store.stopped`."""
        return self._stopped

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What `CommonStore.state_dict` says, rank 0's fetched from the servers."""
        state: dict[str, Any] = {"read": list(self.read), **self.left_over()}
        if self.comm.rank != 0:
            return state
        slots = [
            [torch.empty_like(piece.flat, device="cpu") for _ in range(rule.slots if rule else 0)]
            for piece, rule in zip(self.replica.pieces, self.rules, strict=True)
        ]
        versions, updates, used = [0] * len(self.shards), [0] * len(self.units), [0] * self.parameters
        with self.comm.counting("service"):
            for s, (rank, i) in self._at.items():
                works = self.ask(rank, header(Ask.KEEP, i))
                counts, *parts = self._parts(s, slots)
                for part in (counts, *parts):
                    self.world.recv(part, rank, ANSWER)
                finish(works)
                shard, n = self.shards[s], (len(counts) - 1) // 2
                versions[s] = int(counts[0])
                updates[shard.units] = counts[1 : n + 1].tolist()
                for unit, reached in zip(self.units[shard.units], counts[n + 1 :].tolist(), strict=True):
                    used[unit.parameter] |= reached
        return state | {"slots": slots, "versions": versions, "updates": updates, "used": used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        self.read = list(state["read"])
        self.take_left_over(state)
        if self.comm.rank == 0:
            with self.comm.counting("service"):
                for s, (rank, i) in self._at.items():
                    shard = self.shards[s]
                    counts, *parts = self._parts(s, state["slots"])
                    used = [state["used"][unit.parameter] for unit in self.units[shard.units]]
                    counts.copy_(torch.tensor([state["versions"][s], *state["updates"][shard.units], *used]))
                    works = self.ask(rank, header(Ask.RESTORE, i), counts, *parts)
                    self.answer_of(s, values=False)
                    finish(works)
        self.comm.barrier()

    def _parts(self, s: int, slots: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of a shard: version, updates and use of its units, to be filled; and its parts of the slots."""
        shard = self.shards[s]
        counts = torch.zeros(1 + 2 * (shard.units.stop - shard.units.start), dtype=torch.int64)
        return [counts, *(slot[shard.lo : shard.hi] for slot in slots[shard.piece])]
