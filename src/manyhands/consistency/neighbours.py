"""What strategies have in common whose workers exchange with their neighbours in a graph only (survey §VI-A).

    every ``every`` steps: send to the neighbours, receive from the neighbours, mix

Nobody waits for anybody but those it hears from in that exchange. All sends leave before the first receive, so no cycle
of ranks that wait can close.

News ride along with every message: once a worker stands still (its loss was not finite) its messages name the exchange
by which all will have heard of it, which the graph bounds; after that exchange all meet and stop. Until then it goes on
passing on the parameters that it had, which are finite. News and a scalar weight are not counted as payload.

A worker that is killed leaves the graph (`Strategy.survives`): its edges are lost as soon as their other ends find them
broken. That concerns those two alone, so nobody waits for what will never come; what becomes of the share that would
have crossed the edge, the subclass says. A parcel of which only a part has arrived is none. At the next meeting the
graph is drawn anew over those who are left. Until then it may be wider than it was, or in parts, so that news reach all
by no known exchange: once a worker is known to be lost, news wait for that meeting, too. That it is known rides along
like the news, and what has been exchanged decides, not what a worker has since been told: neighbours decide alike. (If
one dies, or the launcher's word of it falls, in the very exchanges in which news travel, in a graph in which not all
are neighbours, news of either kind may have reached some and not others: these wait for each other until the deadline.)
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from manyhands.communication import graphs
from manyhands.communication.communicator import Communicator
from manyhands.communication.graphs import Graph, Mixing
from manyhands.consistency.independent import IndependentWorker
from manyhands.contract import Batch, Replica, Setting, Strategy, Traffic
from manyhands.errors import DamagedPayload, PeerLost, Problem

T = TypeVar("T")


@dataclass(frozen=True)
class OverGraph(Strategy):
    """A strategy whose workers exchange along the edges of a graph every ``every`` steps.

    ``degree`` and ``seed`` are for random graphs; no degree: `graphs.default_degree`.
    """

    #: The names in `graphs.GRAPHS` that it can use.
    choices: ClassVar[tuple[str, ...]]

    graph: str
    every: int = 1
    degree: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.graph not in self.choices:
            raise ValueError(f"graph={self.graph!r}: it is {', '.join(self.choices[:-1])} or {self.choices[-1]}")
        _check_whole("every", self.every, 1, "steps from one exchange to the next")
        _check_whole("seed", self.seed, 0, "it draws a random graph")
        if self.degree is not None:
            _check_whole("degree", self.degree, 1, "without neighbours there is nothing to exchange")
            if self.graph not in graphs.OF_A_DEGREE:
                raise ValueError(f"degree={self.degree} with graph={self.graph!r}, which has a degree of its own")

    @property
    def survives(self) -> bool:  # type: ignore[override]
        """On the graphs that there are for any number of workers."""
        return graphs.fits_any_size(self.graph, self.degree)

    alike: ClassVar[bool] = True

    @property
    def lockstep(self) -> bool:
        """News take as many exchanges as the graph is wide."""
        return False

    def rounds(self, size: int) -> Graph:
        """The graph over ``size`` ranks."""
        return _built(self.graph, size, self.degree, self.seed)

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """d · n elements in d messages at every exchange, where d is how many ranks one sends to."""
        if size == 1:
            return Traffic()
        d = len(self.rounds(size)[0].receivers(0))
        return Traffic(d * numel * itemsize, d, every=self.every)

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1

    def problems(self, setting: Setting) -> list[Problem]:
        """A graph that there is not for so many workers."""
        why = graphs.objection(self.graph, setting.workers, self.degree)
        return [] if why is None else [Problem(f"{self} with workers={setting.workers}", *why)]


#: Ranks of one process have one graph.
_built = functools.lru_cache(maxsize=16)(graphs.build)


def _check_whole(name: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: a whole number from {least}; {what}")


class NeighbourWorker(IndependentWorker):
    """Trains alone and exchanges along the graph; a subclass says what comes of what arrives."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: OverGraph) -> None:
        super().__init__(replica, comm)
        self.every, self._strategy = strategy.every, strategy
        self.carry([piece.flat for piece in replica.pieces])
        self._draw()

    def carry(self, likes: Sequence[Tensor]) -> None:
        """What a `swap` of each piece sends is like these."""
        self._outboxes = [_Parcel(like) for like in likes]
        self._inboxes: list[list[_Parcel]] = [[] for _ in likes]

    def _draw(self) -> None:
        """The graph over those who are there."""
        self.graphs = [self._strategy.rounds(group.size) for group in self.groups]
        #: For each piece, the ranks at the other ends of edges that are lost.
        self.broken: list[set[int]] = [set() for _ in self.groups]
        # News that cross a cut of the model travel by `meet` alone.
        self._due = math.inf  # the exchange after which all meet, since one of them stands still
        self._loss = False  # somebody knew of a worker's loss when it sent: then nobody meets before its time
        whole = all(group.size == self.comm.size for group in self.groups)
        self._spread = graphs.reach(self.graphs[0]) if whole else None

    def step(self, batch: Batch) -> Tensor:
        """An update of one's own, then, when it is time, an exchange."""
        loss = self.own_step(batch)
        if self.comm.size > 1 and self.steps % self.every == 0:
            self._exchange(self.steps // self.every)
        return loss

    @abstractmethod
    def mix(self, i: int, mixing: Mixing) -> None:
        """Exchange piece ``i`` in this round (`swap`) and adopt what comes of it."""

    def _exchange(self, k: int) -> None:
        """The k-th of the run, from 1."""
        if self.stands_still and self._spread is not None:
            self._due = min(self._due, k + self._spread - 1)
        if any(self.broken) or (self._due < math.inf and self.comm.lost()):  # nobody asks as long as nothing is due
            self._loss = True
        for i, graph in enumerate(self.graphs):
            self.mix(i, graph[(k - 1) % len(graph)])
        if k >= self._due and not self._loss:
            self.meet()

    def swap(self, i: int, mixing: Mixing, vector: Tensor, weight: float = 1.0) -> dict[int, tuple[Tensor, float]]:
        """Send ``vector``, ``weight`` riding along, to the neighbours; what arrived, by rank, until the next swap.

        Nothing arrives from ranks that are `broken`, and nothing has reached them.
        """
        comm, group, out = self.comm, self.groups[i], self._outboxes[i]
        to, senders = mixing.receivers(group.rank), [p for p in mixing.taken(group.rank) if p != group.rank]
        inbox = self._inboxes[i]
        inbox += [_Parcel(vector) for _ in range(len(senders) - len(inbox))]
        out.pack(vector, self._due, self._loss, weight)
        with comm.counting("parcels"):
            works = {q: self._across(i, q, functools.partial(group.send, out.whole, q)) for q in to}
            for p, parcel in zip(senders, inbox, strict=False):
                self._across(i, p, functools.partial(group.recv, parcel.whole, p))
            for q, work in works.items():
                if work is not None:
                    self._across(i, q, work.wait)
        self._count_sent(len(to) - len(self.broken[i].intersection(to)), vector)
        arrived = {}
        for p, parcel in zip(senders, inbox, strict=False):
            if p not in self.broken[i]:
                due, loss, weight_of_p = parcel.news()
                self._due, self._loss = min(self._due, due), self._loss or bool(loss)
                arrived[p] = parcel.body, weight_of_p
        return arrived

    def swap_payloads(self, i: int, mixing: Mixing, payload: Tensor, most_B: int) -> dict[int, Tensor]:
        """Send bytes to the neighbours; theirs, of any length up to ``most_B``, by rank. Messages that say it go first.

        Only among workers that do not go on without each other.
        """
        comm, group = self.comm, self.groups[i]
        to, senders = mixing.receivers(group.rank), [p for p in mixing.taken(group.rank) if p != group.rank]
        head = torch.tensor([self._due, self._loss, payload.numel()], dtype=torch.float64)
        arrived: dict[int, Tensor] = {}
        with comm.counting("parcels"):
            works = [group.send(x, q) for q in to for x in (head, payload) if x.numel()]
            for p in senders:
                due, loss, length = group.recv(torch.zeros_like(head), p).tensor.tolist()
                if not 0 <= length <= most_B:
                    raise DamagedPayload(f"a payload of {length} bytes from rank {p}; {most_B} are the most")
                self._due, self._loss = min(self._due, due), self._loss or bool(loss)
                like = payload.new_empty(int(length))
                arrived[p] = group.recv(like, p).tensor if length else like
            for work in works:
                work.wait()
        self._count_sent(len(to), payload)
        return arrived

    def _count_sent(self, sent: int, vector: Tensor) -> None:
        """As payload, which news are not."""
        tally = self.comm.counters.tallies[self.comm.context.purpose]["send"]
        tally.calls += sent
        tally.messages += sent
        tally.sent_B += sent * vector.nbytes

    def _across(self, i: int, peer: int, do: Callable[[], T]) -> T | None:
        """What ``do`` gives, unless the edge to ``peer`` is broken or breaks over it."""
        if peer in self.broken[i]:
            return None
        try:
            return do()
        except PeerLost:
            if not self.groups[i].goes_on_without(peer):
                raise
            self.broken[i].add(peer)
            return None

    def regroup(self, comm: Communicator) -> None:
        """A graph of fewer."""
        super().regroup(comm)
        self._draw()


class _Parcel:
    """A message as it travels: three numbers, then a vector like ``like``."""

    def __init__(self, like: Tensor) -> None:
        head_B = 3 * torch.float64.itemsize
        self.whole = like.new_empty(head_B + like.nbytes, dtype=torch.uint8)
        self.head = self.whole[:head_B].view(torch.float64)
        self.body = self.whole[head_B:].view(like.dtype)

    def pack(self, vector: Tensor, due: float, loss: bool, weight: float) -> None:
        """Put it in."""
        self.head.copy_(torch.tensor([due, loss, weight], dtype=torch.float64))
        self.body.copy_(vector)

    def news(self) -> tuple[float, float, float]:
        """What `pack` was told beside the vector; of a parcel that has a size only, that there are none."""
        if self.whole.is_meta:
            return math.inf, 0.0, 1.0
        due, loss, weight = self.head.tolist()
        return due, loss, weight
