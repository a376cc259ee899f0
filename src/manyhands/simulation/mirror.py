"""One rank of many with its numbers, and nobody else there: for measuring what a rank computes.

A strategy's worker and a cut model run here as they would among ``size`` ranks, on real tensors and in real time, but
no collective moves anything: the peers are taken to hold what this rank holds. What the exchanges inside a model's own
forward and backward (those counted as ``cut``) would have taken is added up by ``price``, since nobody else sees them.
What is gathered is filled with copies of this rank's part, so that whoever reads it finds something valid.

Guarantee: the same operators on the same shapes as on a real rank, in the same order. The numbers are not those of
training (a gradient stays this rank's own, slices that others would update stay as they are); whatever is not a
collective raises `NotAlike`, but for messages and for memory that stands for a server where it is said that ranks are
alike in those. What is done under such a server's lock is its price's business, and no work of this rank's.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.communication.communicator import DONE, Board, Communicator, Lock, Received, Work
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.events import Operation
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.simulation.folded import NotAlike, addressed

#: A receive looks for what is like it among so many of the last messages sent.
SENT = 64


@dataclass
class Spent:
    """Seconds that exchanges would take, and that this stand-in for them has taken, which is nobody's work."""

    priced_s: float = 0.0
    here_s: float = 0.0
    #: What was asked of a server's memory under one lock: of the lock that is held, and of all so far.
    visit: list[str] = field(default_factory=list)
    visits: set[tuple[str, ...]] = field(default_factory=set)


class MirrorCommunicator(Communicator):
    """Rank ``rank`` of ``size`` on a transport that is not there.

    ``shares_memory`` as the transport would say; nothing `overlaps`, since nothing is under way. ``really``: a
    communicator of as many ranks, mirrors too, for what they tell each other before the first step. ``messages``: what
    is sent comes back where the like is received, for strategies whose ranks are `alike` in that. ``served``: locks
    are always free and all ranks' counters stand where this one's does, for those that push to common memory.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        transport: str,
        shares_memory: bool,
        price: Callable[[Operation], float] = lambda _: 0.0,
        members: tuple[int, ...] | None = None,
        really: Communicator | None = None,
        messages: bool = False,
        served: bool = False,
    ) -> None:
        super().__init__(rank, size)
        self.transport, self.shares_memory = transport, shares_memory  # type: ignore[misc]
        self.price = price
        self._messages, self._served = messages, served
        self._sent: deque[Tensor] = deque(maxlen=SENT)
        #: Until it is None, what all ranks are told they are really told: setting up.
        self.really = really
        self._members = tuple(range(size)) if members is None else members
        #: Of exchanges inside the model's forward and backward, and of a strategy's own; all groups together.
        self.spent_cut, self.spent = Spent(), Spent()
        #: All exchanges, and how often there was each.
        self.exchanges: Counter[Operation] = Counter()
        self._common: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def _meeting(self, name: str, x: Tensor | None, root: int | None = None) -> Iterator[None]:
        """Note what is asked for; what is done inside is no work of this rank's."""
        began = time.perf_counter()
        purpose, n = self.context.purpose, 0 if x is None else x.nbytes
        operation = Operation(name, n, self.size, self._members, root, None, self._holds_for_all(x), purpose)
        spent = self.spent_cut if purpose == "cut" else self.spent
        if purpose == "cut":
            spent.priced_s += self.price(operation)
        self.exchanges[operation] += 1
        yield
        spent.here_s += time.perf_counter() - began

    def _holds_for_all(self, x: Tensor | None) -> bool:
        """Whether it would be one copy for all ranks; here every rank has its own, so `is_common` says no."""
        return x is not None and x.untyped_storage()._cdata in self._common

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        made = torch.zeros(numel, dtype=dtype)
        if common and self.shares_memory:
            self._common[made.untyped_storage()._cdata] = made
        return made

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        with self._meeting("all_reduce", x):
            if weight is None and not x.dtype.is_floating_point:
                x.mul_(self.size)
        return DONE

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        with self._meeting("reduce_scatter", x):
            pass

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        with self._meeting("all_gather", x):
            if not self._holds_for_all(x):
                own = x[slice(*bounds[self.rank])].clone()
                for lo, hi in bounds:
                    if hi - lo <= len(own):
                        x[lo:hi] = own[: hi - lo]
        return DONE

    def _all_to_all(self, x: Tensor) -> Tensor:
        with self._meeting("all_to_all", x):
            return addressed(x, self.rank, self.size)

    def _broadcast(self, x: Tensor, root: int) -> Work:
        with self._meeting("broadcast", x, root):
            return DONE if self.really is None else self.really.broadcast(x, root)

    def _barrier(self) -> None:
        with self._meeting("barrier", None):
            pass

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        if not self._messages:
            raise NotAlike("send")
        with self._meeting("send", x):
            self._sent.append(x)
        return DONE

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        if not self._messages:
            raise NotAlike("recv")
        with self._meeting("recv", None):
            same = (x for x in reversed(self._sent) if x.shape == like.shape and x.dtype == like.dtype)
            sent = next(same, None)
            if sent is not None:
                like.copy_(sent)
        return Received(0 if frm is None else frm, like)

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        if not self._served:
            raise NotAlike(operation)
        self.spent.visit.append(operation)
        with self._meeting(operation, x):
            pass

    def locks(self, count: int) -> list[Lock]:
        """Free ones, of a server; else not here."""
        if not self._served:
            raise NotAlike("locks")
        return [_Free(self.spent) for _ in range(count)]

    def board(self) -> Board:
        """One on which nobody is behind; else not here."""
        if not self._served:
            raise NotAlike("board")
        return _Abreast(self.size)

    def window(self, size_B: int) -> object:  # type: ignore[override]
        """Not here."""
        raise NotAlike("window")

    def _alone(self) -> Communicator:
        return SingleCommunicator()

    def _make_groups(self) -> dict[frozenset[str], Communicator]:
        """As on a real rank, but who is in a group is worked out from the mesh."""
        mesh = self.mesh
        long = frozenset(a for a in mesh if mesh[a] > 1)
        groups: dict[frozenset[str], Communicator] = {long: self}
        for axes in _subsets(long):
            mine = mesh.color(self.rank, axes)
            ranks = [p for p in range(self.size) if mesh.color(p, axes) == mine]
            group = groups[axes] = self._of(ranks)
            group.mesh = Mesh((a, mesh[a]) for a in mesh if a in axes)
        return groups

    def _split(self, color: int) -> Communicator:
        return self._of(range(self.size))  # all do the same, so all have the same color

    def _of(self, ranks: Sequence[int]) -> MirrorCommunicator:
        made = MirrorCommunicator(
            list(ranks).index(self.rank),
            len(ranks),
            transport=self.transport,
            shares_memory=self.shares_memory,
            price=self.price,
            messages=self._messages,
            served=self._served,
            members=tuple(self._members[p] for p in ranks),
        )
        made.context, made.exchanges, made._common = self.context, self.exchanges, self._common
        made.spent, made.spent_cut = self.spent, self.spent_cut
        return made


class _Free:
    """A lock that nobody else wants; what is done while it is held is taken out of this rank's time."""

    def __init__(self, spent: Spent) -> None:
        self._spent = spent
        self.lost: list[int] = []

    def __enter__(self) -> None:
        self._before_s, self._began = self._spent.here_s, time.perf_counter()
        self._spent.visit.clear()

    def __exit__(self, *_: object) -> None:
        spent = self._spent
        spent.here_s = self._before_s + time.perf_counter() - self._began  # what was asked for meanwhile is in it
        if spent.visit:
            spent.visits.add(tuple(spent.visit))


class _Abreast:
    """A board of ranks that are all as far as this one, or as far as is waited for."""

    def __init__(self, size: int) -> None:
        self._size, self._value = size, 0

    def post(self, value: int) -> None:
        self._value = value

    def read(self) -> list[int]:
        return [self._value] * self._size

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        return max(self._value, least)

    def wait_for_one(self, least: int, doing: str) -> None:
        return


def _subsets(axes: frozenset[str]) -> list[frozenset[str]]:
    """Neither empty nor everything."""
    ordered = sorted(axes)
    every = [frozenset(a for i, a in enumerate(ordered) if bits >> i & 1) for bits in range(1, 2 ** len(ordered) - 1)]
    return sorted(every, key=len)
