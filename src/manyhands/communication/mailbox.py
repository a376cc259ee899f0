"""Messages through shared memory: one ring of bytes per (sender, receiver), one bell per rank.

Each ring has one writer and one reader, so a counter each is enough and nothing is locked:

    sender:    copy bytes in;  tail ← tail + n;  ring the receiver's bell
    receiver:  copy bytes out; head ← head + n;  ring the sender's bell (there is room again)

A message is a header (tag, length) and its bytes; one larger than the ring streams through it. Sending never blocks:
what does not fit waits in the sender and goes on whenever the sender waits for anything (`progress`), so two ranks
that send to each other first and receive afterwards do not deadlock.

A rank that is killed leaves whole messages, which are received, and perhaps the beginning of one, which never is: who
waits for the rest, or for room in a ring that nobody empties any more, is told by `PeerLost`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyhands.communication import futex
from manyhands.communication.communicator import wrong_length
from manyhands.communication.segment import Region, Segment
from manyhands.communication.shared_barrier import LINE_WORDS, NAP_S, SPIN_S
from manyhands.errors import DeadlineExceeded, PeerLost

HEADER_B = 16
RING_HEADER_B = 2 * LINE_WORDS * 8


def ring_B(size: int) -> int:
    """Capacity of one ring: generous for a few ranks, smaller where there are many pairs."""
    return 256 * 1024 if size <= 16 else 64 * 1024


def bytes_needed(size: int) -> int:
    """Bytes of a group's mailbox: a bell per rank and a ring per ordered pair."""
    return size * LINE_WORDS * 8 + size * size * (RING_HEADER_B + ring_B(size))


@dataclass
class Outgoing:
    """A message on its way into a ring."""

    to: int
    header: bytes
    body: memoryview
    sent: int = 0  # of header and body together


@dataclass
class _Incoming:
    """A message on its way out of a ring."""

    tag: int
    body: Tensor
    filled: int = 0


@dataclass
class _Box:
    """What has arrived from one rank and nobody has asked for yet, oldest first, and the one still arriving."""

    complete: deque[tuple[int, Tensor]] = field(default_factory=deque)
    arriving: _Incoming | None = None
    header: bytearray = field(default_factory=bytearray)


class Mailbox:
    """One rank's end of all rings of its group; ``names`` are the members' ranks in the world."""

    def __init__(self, region: Region, segment: Segment, rank: int, names: Sequence[int], *, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, (size := len(names)), timeout_s
        self._names = names
        self._served = size - 1  # whose message a receive from anyone took last
        self.wait_s = 0.0
        self._segment = segment
        self._words = region.words()
        self._bytes = memoryview(region.memory)
        self._capacity = ring_B(size)
        self._rings_B = size * LINE_WORDS * 8
        self._region = region
        self._outgoing: dict[int, deque[Outgoing]] = {}
        self._boxes = [_Box() for _ in range(size)]
        self._spins = size <= futex.cores()

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int, tag: int, step: int | None) -> Outgoing | None:
        """Start sending; None when all of it is in the ring already, else what `wait_until_sent` takes."""
        if self._segment.gone(self._names[to]):
            raise PeerLost(self._names[self.rank], self._names[to], step, "send")
        body = x.view(torch.uint8).numpy().data if x.numel() else memoryview(b"")
        header = tag.to_bytes(8, "little", signed=True) + len(body).to_bytes(8, "little")
        message = Outgoing(to, header, body)
        queue = self._outgoing.setdefault(to, deque())
        queue.append(message)
        self._push(to, queue)
        return message if message.sent < HEADER_B + len(body) else None

    def progress(self) -> bool:
        """Push what still waits to be sent; returns whether some is left."""
        for to, queue in list(self._outgoing.items()):
            if queue:
                self._push(to, queue)
        return any(self._outgoing.values())

    def wait_until_sent(self, message: Outgoing, step: int | None) -> None:
        """Block until the last byte of ``message`` is in the ring: its tensor may be changed again."""
        total = HEADER_B + len(message.body)

        def sent() -> bool:
            self.progress()
            return message.sent >= total

        if not sent():
            try:
                self._wait(sent, f"rank {self._names[message.to]} to receive", "send", step, (message.to,))
            except PeerLost:
                self._outgoing[message.to].clear()  # else every later wait would try to push it
                raise

    def _push(self, to: int, queue: deque[Outgoing]) -> None:
        base = self._ring(self.rank, to)
        words, head, tail = self._words, base // 8, base // 8 + LINE_WORDS
        moved = False
        while queue:
            message = queue[0]
            total = HEADER_B + len(message.body)
            room = self._capacity - (words[tail] - words[head])
            while message.sent < total and room:
                source = message.header if message.sent < HEADER_B else message.body
                at = message.sent if message.sent < HEADER_B else message.sent - HEADER_B
                position = words[tail] % self._capacity
                n = min(len(source) - at, room, self._capacity - position)
                start = base + RING_HEADER_B + position
                self._bytes[start : start + n] = memoryview(source)[at : at + n].cast("B")
                words[tail] = words[tail] + n
                message.sent += n
                room -= n
                moved = True
            if message.sent < total:
                break
            queue.popleft()
        if moved:
            self._ring_bell(to)

    # -- receiving -------------------------------------------------------------------------------------------------

    def recv(self, like: Tensor, frm: int | None, tag: int, step: int | None) -> int:
        """Fill ``like`` with the oldest message of ``tag`` from ``frm``; returns the sender.

        From anyone (None): ranks take turns, beginning after the one served last, so that none starves.
        """
        first = self._served + 1
        sources = (*range(first, self.size), *range(first)) if frm is None else (frm,)
        found: list[tuple[int, Tensor]] = []

        def arrived() -> bool:
            self.progress()
            for source in sources:
                self._pull(source)
                box = self._boxes[source].complete
                for i, (t, body) in enumerate(box):
                    if t == tag:
                        del box[i]
                        found.append((source, body))
                        return True
            return False

        if not arrived():
            who = "anyone" if frm is None else f"rank {self._names[frm]}"
            others = [p for p in sources if p != self.rank]
            self._wait(arrived, who, f"recv(from {who}, tag {tag})", step, others)
        source, body = found[0]
        if frm is None:
            self._served = source
        if body.numel() != like.nbytes:
            raise wrong_length(self._names[self.rank], self._names[source], tag, body.numel(), like)
        if like.numel():
            like.copy_(body.view(like.dtype))
        return source

    def arrived(self, tag: int) -> bool:
        """Whether a whole message of ``tag`` from anyone is here."""
        self.progress()
        for source in range(self.size):
            self._pull(source)
        return any(t == tag for box in self._boxes for t, _ in box.complete)

    def _pull(self, source: int) -> None:
        base = self._ring(source, self.rank)
        words, head, tail = self._words, base // 8, base // 8 + LINE_WORDS
        box, moved = self._boxes[source], False
        while (available := words[tail] - words[head]) > 0:
            position = words[head] % self._capacity
            start = base + RING_HEADER_B + position
            n = min(available, self._capacity - position)
            if box.arriving is None:
                n = min(n, HEADER_B - len(box.header))
                box.header += self._bytes[start : start + n]
                if len(box.header) == HEADER_B:
                    tag = int.from_bytes(box.header[:8], "little", signed=True)
                    length = int.from_bytes(box.header[8:], "little")
                    box.arriving = _Incoming(tag, torch.empty(length, dtype=torch.uint8))
                    box.header.clear()
            else:
                incoming = box.arriving
                n = min(n, incoming.body.numel() - incoming.filled)
                incoming.body[incoming.filled : incoming.filled + n] = self._region.bytes[start : start + n]
                incoming.filled += n
            words[head] = words[head] + n
            moved = True
            if box.arriving is not None and box.arriving.filled == box.arriving.body.numel():
                box.complete.append((box.arriving.tag, box.arriving.body))
                box.arriving = None
        if moved:
            self._ring_bell(source)

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _ring(self, source: int, to: int) -> int:
        return self._rings_B + (source * self.size + to) * (RING_HEADER_B + self._capacity)

    def _ring_bell(self, rank: int) -> None:
        if rank != self.rank:
            # Two ranks may ring at once and count as one; both wake, and a sleeper looks up every few ms anyway.
            self._words[rank * LINE_WORDS] = (self._words[rank * LINE_WORDS] + 1) & 0xFFFFFFFF
            futex.wake(self._region.address + rank * LINE_WORDS * 8)

    def _wait(self, ready: Any, who: str, doing: str, step: int | None, of: Sequence[int]) -> None:
        """Until it is ``ready``, which any rank of ``of`` can bring about as long as it lives."""
        clock = time.perf_counter
        t0 = clock()
        nap, bell = 0.001, self.rank * LINE_WORDS
        while True:
            seen = self._words[bell]
            gone = bool(of) and all(self._segment.gone(self._names[p]) for p in of)  # before the last look
            futex.fence()
            if ready():
                break
            if gone:
                self.wait_s += clock() - t0
                raise PeerLost(self._names[self.rank], self._names[of[0]], step, doing)
            failed, me = self._segment.failed, self._names[self.rank]
            elapsed = clock() - t0
            if failed is not None and failed != me:
                self.wait_s += elapsed
                raise PeerLost(me, failed, step, doing)
            if elapsed > self.timeout_s:
                self.wait_s += elapsed
                raise DeadlineExceeded(me, who, step, elapsed, doing)
            if self._spins and elapsed < SPIN_S:
                continue
            futex.wait(self._region.address + bell * 8, seen, nap)
            nap = min(2 * nap, NAP_S)
        self.wait_s += clock() - t0
