"""The rank that is a parameter server: it holds shards, and answers whoever asks, one after the other (survey §VI-A).

Server ranks come after the workers' and are in no mesh. They know no model and no data, only what rank 0 describes,
and what they do with a shard is `CommonStore`'s own code. A server ends when all workers have left, or one is lost
without whom the others do not go on (`Communicator.goes_on_without`); else a request of which only a part has arrived
is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.board import NEVER
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot
from manyhands.communication.compression.parcel import unpacked
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.consistency.compressed import layout_for
from manyhands.consistency.parameter_server.common_store import CommonStore
from manyhands.consistency.parameter_server.remote_board import Boards
from manyhands.consistency.parameter_server.requests import (
    ANSWER,
    ANSWERED_B,
    FIXED,
    HEADER,
    PAYLOAD,
    REQUEST,
    Ask,
    frame,
    group_of,
    header,
)
from manyhands.consistency.parameter_server.rounds import Round
from manyhands.consistency.robust.aggregation import aggregation_from
from manyhands.contract import Piece
from manyhands.errors import CommunicationError, DamagedPayload, NonFiniteLoss, PeerLost
from manyhands.models.update_rules import Rule, adagrad_, adam_, sgd_

RULES = {rule.__name__: rule for rule in (sgd_, adagrad_, adam_)}


@contextlib.contextmanager
def serving(world: Communicator, servers: int) -> Iterator[Communicator | None]:
    """The workers' group, through whose `servers` the last ``servers`` ranks of ``world`` are reached; ``world`` itself
    if there are none. None on a server, once it has served. Collective.
    """
    if not servers:
        yield world
        return
    workers = world.size - servers
    comm = world.apart(servers)
    if world.rank >= workers:
        _serve(world, workers)
        yield None
        return
    try:
        yield comm
    except NonFiniteLoss:  # on all workers alike, with nothing wrong between them
        _leave(world, workers)
        raise
    _leave(world, workers)


def _leave(world: Communicator, workers: int) -> None:
    with world.counting("service"):
        for work in [world.send(header(Ask.LEAVE), to, REQUEST) for to in range(workers, world.size)]:
            work.wait()


def _serve(world: Communicator, workers: int) -> None:
    """Answer the first ``workers`` ranks until all have left."""
    there = set(range(workers))
    held: _Held | None = None
    boards = Boards(world, workers)
    request = torch.zeros(HEADER, dtype=torch.float64)
    with world.counting("service"):
        while there:
            try:
                worker = world.listen(request, there, REQUEST).source
                what, shard, read, count, in_use, packed = map(int, request[:FIXED].tolist())
                if what == Ask.LEAVE:
                    there.discard(worker)
                elif what == Ask.OPEN:
                    text = world.recv(torch.empty(count, dtype=torch.uint8), worker, PAYLOAD).tensor
                    held, boards = _Held(world, json.loads(bytes(text.tolist()))), Boards(world, workers)
                    held.answer(worker)
                elif what == Ask.POST:
                    boards.post(worker, shard, read)
                elif what == Ask.WAIT:
                    boards.wait(worker, shard, read, count)
                elif held is None:
                    raise CommunicationError(f"server {world.rank}: {Ask(what).name} from rank {worker} before OPEN")
                elif what in (Ask.PUSH, Ask.PUSH_ROWS):
                    rows = count if what == Ask.PUSH_ROWS else 0
                    group = group_of(request[FIXED:].tolist())
                    late = held.push_from(worker, shard, read, group, rows=rows, in_use=bool(in_use), packed=packed)
                    held.answer(worker, shard, late, values=bool(count and not rows))
                elif what == Ask.ROUNDS:
                    text = world.recv(torch.empty(count, dtype=torch.uint8), worker, PAYLOAD).tensor
                    held.hold_rounds(worker, json.loads(bytes(text.tolist())))
                elif what == Ask.BRING:
                    held.bring_from(worker, read, votes=bool(count), in_use=bool(in_use))
                elif what == Ask.ASIDE:
                    held.aside_from(worker, read)
                elif what in (Ask.USE, Ask.KEEP, Ask.LOOK_UP):
                    held.tell(worker, Ask(what), shard, count)
                else:
                    held.change(worker, Ask(what), shard, read, packed)
            except PeerLost as e:
                if e.peer is None or not world.goes_on_without(e.peer):
                    raise
                there.discard(e.peer)
                boards.lose(e.peer)


class _Held(CommonStore):
    """One server's shards: each a piece to itself, in a frame that is sent as it is."""

    def __init__(self, world: Communicator, description: Mapping[str, Any]) -> None:
        self._world = world
        self._described: Sequence[Mapping[str, Any]] = description["shards"]
        pieces = []
        for i, each in enumerate(self._described):
            nothing = torch.empty(each["numel"], dtype=getattr(torch, each["dtype"]), device="meta")
            spans = [(lo, hi) for lo, hi in each["spans"]]
            pieces.append(Piece(nothing, nothing, frozenset(), group=i, spans=spans, width=each["width"]))
        optimizer: Any = SimpleNamespace(param_groups=[{} for _ in pieces])
        replica: Any = SimpleNamespace(
            pieces=pieces, optimizer=optimizer, watching=True, before_lookup=lambda piece, tell: None
        )
        updates = optimizer if description["updates"] else None
        super().__init__(replica, SingleCommunicator(), 1, optimizer=updates, scaled=description["scaled"])
        self._frames = [frame(p.flat.numel(), p.flat.dtype) for p in pieces]
        self.flats = [values for _, _, values in self._frames]
        self._readers: dict[int, tuple[OneShot, Layout]] = {}

    def _rule(self, i: int) -> Rule:
        return Rule(RULES[self._described[i]["rule"]], self._described[i]["slots"])

    def _first_value(self, i: int) -> float:
        return float(self._described[i]["first"])

    def rebase(self) -> None:
        """Values come by SET."""

    def push_from(
        self, worker: int, s: int, read: int, group: Mapping[str, Any], *, rows: int, in_use: bool, packed: int
    ) -> int:
        """Update shard ``s`` by the gradient that follows, of so many rows or of the whole; how late it is."""
        assert self.optimizer is not None
        which = self._rows(worker, rows)
        gradient = self._like(self._table(s)[:rows], worker) if rows else self._vector(s, worker, packed)
        used = self._used[self.shards[s].units]  # a parameter here is a unit
        if in_use:
            used[:] = 1
        self.replica.watching = not used.all()
        self.optimizer.param_groups[s] = dict(group)
        late = int(self._versions[s]) - read
        if rows:
            self._update_rows(self.shards[s], which, gradient, late)
        else:
            self._update(self.shards[s], gradient, late)
        self._versions[s] += 1
        return late

    def hold_rounds(self, worker: int, described: Mapping[str, Any]) -> None:
        """What ROUNDS describes: how many are waited for, of how many, and the rule."""
        rule = aggregation_from(described["rule"])
        workers, allocate = described["workers"], functools.partial(self.comm.allocate, common=True)
        self._round = Round(self.replica.pieces, described["needed"], workers, rule, allocate=allocate)
        self._last_rounds = torch.zeros(workers, dtype=torch.int64)  # see `late_for_a_round`
        self._waiting: list[int] = []
        self.answer(worker)

    def bring_from(self, worker: int, read: int, *, votes: bool, in_use: bool) -> None:
        """Take the gradient that follows into the round under way, if it is of that; say who has come, and is late."""
        about = self._world.recv(torch.empty(1 + len(self.flats) * HEADER, dtype=torch.float64), worker, PAYLOAD).tensor
        weight, headers = float(about[0]), about[1:].view(-1, HEADER)
        gradients = [self._like(flat, worker) for flat in self.flats] if weight else []
        late = self.version - read
        if not late:
            self._last_rounds[worker] = read + 1
        self._world.send(self._last_rounds, worker, ANSWER).wait()
        if late:
            self._answer_round(worker, late)
            return
        if in_use:
            self._used[:] = 1
        self.replica.watching = not self._used.all()
        self.replica.optimizer.param_groups[:] = [group_of(numbers[FIXED:]) for numbers in headers.tolist()]
        self._round.take(gradients, weight, votes=votes)
        self._waiting.append(worker)
        self._end_and_tell()

    def aside_from(self, worker: int, by: int) -> None:
        """So many workers more are not waited for."""
        self._round.aside(by)
        self._last_rounds[worker] = NEVER if by > 0 else 0  # nobody waits for it
        self._end_and_tell()
        self.answer(worker)

    def _end_and_tell(self) -> None:
        """Tell those who wait for the round's end, if it has ended."""
        number = self.version
        if not self.finish(self._round):
            return
        for waiter in self._waiting:
            self._answer_round(waiter, -self._round.outcome(number))
        self._waiting.clear()

    def _answer_round(self, worker: int, late: int) -> None:
        for s in range(len(self.flats)):
            self.answer(worker, s, late, values=True)

    def change(self, worker: int, what: Ask, s: int, read: int, packed: int) -> None:
        """What is answered as usual: SET, PULL, ADD, RESTORE, STOP."""
        if what == Ask.SET:
            self._world.recv(self.flats[s], worker, PAYLOAD)
        elif what == Ask.ADD:
            self.flats[s].add_(self._vector(s, worker, packed))
            self._versions[s] += 1
        elif what == Ask.RESTORE:
            counts, *slots = self._state(s)
            for part in (counts, *slots):
                self._world.recv(part, worker, PAYLOAD)
            units = self.shards[s].units
            self._versions[s] = int(counts[0])
            self._updates[units], self._used[units] = counts[1:].view(2, -1).numpy()
        elif what == Ask.STOP:
            self.stop(read)
        self.answer(worker, s, values=what == Ask.PULL)

    def tell(self, worker: int, what: Ask, s: int, count: int) -> None:
        """What has an answer of its own: USE, KEEP, LOOK_UP."""
        if what == Ask.USE:
            reached = self._world.recv(torch.zeros(count, dtype=torch.int64), worker, PAYLOAD).tensor
            self._used |= reached.numpy()
            told = [torch.from_numpy(self._used)]
        elif what == Ask.KEEP:
            told = self._state(s)
        else:
            values = self._table(s)[self._rows(worker, count)].view(-1)
            whole, beginning, there = frame(values.numel(), values.dtype)
            self._address(beginning, s)
            there.copy_(values)
            told = [whole]
        for part in told:
            self._world.send(part, worker, ANSWER).wait()

    def answer(self, worker: int, s: int = 0, late: int = 0, *, values: bool = False) -> None:
        """Version and lateness, and the shard's values if they are wanted."""
        whole, beginning, _ = self._frames[s]
        self._address(beginning, s, late)
        self._world.send(whole if values else whole[:ANSWERED_B], worker, ANSWER).wait()

    def _address(self, beginning: Tensor, s: int, late: int = 0) -> None:
        beginning.copy_(torch.tensor([self._versions[s], late, self.stopped], dtype=torch.float64))

    def _table(self, s: int) -> Tensor:
        return self.flats[s].view(-1, self.replica.pieces[s].width)

    def _vector(self, s: int, worker: int, packed: int) -> Tensor:
        """A vector of shard ``s`` that follows, as it is or as a payload; see `requests.header`."""
        if not packed:
            return self._like(self.flats[s], worker)
        compressor, layout = self._readers.get(s) or self._readers.setdefault(s, self._reader(s))
        length, most_B = packed - 1, compressor.payload_B(layout)
        if not 0 <= length <= most_B:
            raise DamagedPayload(f"a payload of {length} bytes from rank {worker}; {most_B} are the most")
        payload = torch.empty(length, dtype=torch.uint8)
        if length:
            payload = self._world.recv(payload, worker, PAYLOAD).tensor
        return unpacked(payload, compressor, layout)

    def _reader(self, s: int) -> tuple[OneShot, Layout]:
        """What reads payloads of shard ``s``."""
        described = self._described[s]
        shapes = [tuple(shape) for shape in described["shapes"]]
        compressor = compressor_from(described["compress"])
        assert isinstance(compressor, OneShot)
        return compressor, layout_for(shapes, self.flats[s].element_size()).part(described["lo"], described["hi"])

    def _like(self, other: Tensor, worker: int) -> Tensor:
        return self._world.recv(torch.empty_like(other), worker, PAYLOAD).tensor

    def _rows(self, worker: int, count: int) -> Tensor:
        rows = torch.empty(count, dtype=torch.int64)
        return self._world.recv(rows, worker, PAYLOAD).tensor if count else rows

    def _state(self, s: int) -> list[Tensor]:
        """Version, updates and use of a shard, and its slots."""
        units = self.shards[s].units
        counts = torch.tensor([self._versions[s], *self._updates[units], *self._used[units]], dtype=torch.int64)
        return [counts, *self._slots[s]]
