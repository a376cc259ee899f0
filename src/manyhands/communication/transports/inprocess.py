"""Ranks that are threads of one process: how they meet, whatever the way in which they wait.

A collective is a `Meeting`: every rank lays down its tensor, the last one to arrive moves the data for all
(`exchange`), and then everybody goes on. A message is a copy in the receiver's mailbox. Both are *events*, and the
only question left open is how a rank lets time pass until an event is due; a `World` answers it:

    single     there is nobody to wait for
    threads    ranks run freely and sleep on conditions, each wait with a deadline
    simulated  one rank runs at a time, the one whose virtual clock is earliest

so that the three transports share every line that touches data.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyhands.communication.communicator import DONE, Board, Communicator, Lock, Received, Work
from manyhands.communication.transports import exchange
from manyhands.communication.transports.events import (
    Counters,
    Elapsed,
    Event,
    FarEnough,
    Group,
    Meeting,
    Message,
    OneFarEnough,
    Operation,
    Receive,
    Turn,
    Turns,
    amount,
    name_ranks,
)
from manyhands.errors import CommunicationError, PeerLost, WorkerFailed


class World(ABC):
    """All ranks of one run, and how they wait for each other."""

    #: Seconds from when a lock is given back until who has waited for it goes on; where clocks are real they show it.
    woken_s = 0.0

    def __init__(self, size: int, *, timeout_s: float = 60.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.everyone = Group(tuple(range(size)))
        self.failure: tuple[int | None, str] | None = None
        # Common memory by the address of its storage. It is kept until `run` ends: an address is told apart only while
        # nothing else can take it.
        self.common: dict[int, tuple[Tensor, frozenset[int]]] = {}

    @abstractmethod
    def join(self, group: Group, index: int) -> InProcessCommunicator:
        """Rank ``index``'s end of ``group``."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Symmetric memory for one rank, or for all that share it."""
        return torch.zeros(numel, dtype=dtype)

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[object]:
        """Inside, no other rank changes meetings and mailboxes."""

    @abstractmethod
    def now(self, rank: int) -> float:
        """Seconds on the clock by which this world accounts the time of ``rank``."""

    def settle(self, comm: InProcessCommunicator) -> None:
        """``comm``'s rank is about to do what others may see."""
        return

    @abstractmethod
    def charge(self, operation: Operation, ranks: Sequence[int]) -> tuple[float, float]:
        """``ranks`` begin ``operation`` now: when it is over, and what it costs. Called inside `exclusive`."""

    @abstractmethod
    def wake(self, ranks: Sequence[int]) -> None:
        """Something that ``ranks`` may be waiting for has happened. Called inside `exclusive`."""

    @abstractmethod
    def wait(self, comm: InProcessCommunicator, event: Event) -> None:
        """Return when ``event`` is due. Called outside `exclusive`."""

    def communicator(self, rank: int) -> InProcessCommunicator:
        """The end of ``rank``."""
        return self.join(self.everyone, rank)

    def abort(self, rank: int | None, reason: str) -> None:
        """``rank`` has failed (None: whoever stands outside stops the run): peers that wait raise `PeerLost`."""
        with self.exclusive():
            if self.failure is None:
                self.failure = rank, reason
            self.wake(range(self.size))

    def lost(self, comm: InProcessCommunicator, doing: str) -> CommunicationError:
        """What a rank raises when it meets an aborted world."""
        peer, reason = self.failure or (None, "")
        error = PeerLost(comm.world_rank, peer, comm.step, doing)
        error.add_note(reason)
        return error

    # -- running a function on every rank --------------------------------------------------------------------------

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """``fn(comm, *args)`` on every rank, each a thread of its own; the results in rank order.

        The first rank to fail is raised here and the others are unwound by `PeerLost`: a `CommunicationError` as
        itself, since it names its ranks, anything else as `WorkerFailed` with the original as its cause.
        """
        if self.failure is not None:
            raise CommunicationError(f"this world was ended ({self.failure[1]}); make a new one for another run")
        outcomes: queue.SimpleQueue[tuple[int, Any, BaseException | None, int | None]] = queue.SimpleQueue()

        def body(rank: int) -> None:
            comm = self.communicator(rank)
            self._enter(rank)
            try:
                outcomes.put((rank, fn(comm, *args), None, None))
            except BaseException as e:
                # First told, then aborted: so the cause comes out of the queue before its consequences.
                outcomes.put((rank, None, e, comm.step))
                self.abort(rank, f"{type(e).__name__}: {e}")
            finally:
                self._leave(rank)

        threads = [threading.Thread(target=body, args=(r,), name=f"rank {r}", daemon=True) for r in range(self.size)]
        results: dict[int, Any] = {}
        failed: tuple[int, BaseException, int | None] | None = None
        try:
            for thread in threads:
                thread.start()
            self._open()
            give_up_at = math.inf
            while len(results) < self.size:
                left = None if failed is None else max(0.0, give_up_at - time.monotonic())
                rank, results[rank], error, step = outcomes.get(timeout=left)
                if error is not None and failed is None:
                    failed, give_up_at = (rank, error, step), time.monotonic() + self.timeout_s
        except queue.Empty:
            pass  # a rank that computes on and does not look: it is a daemon thread, and the cause is known
        except BaseException:
            self.abort(None, "the run was interrupted")
            for thread in threads:
                if thread.is_alive():
                    thread.join(timeout=1.0)  # a rank that is inside an operation ends at once
            raise
        else:
            for thread in threads:
                thread.join()
            self.common.clear()
        if failed is None:
            return [results[rank] for rank in range(self.size)]
        rank, error, step = failed
        if isinstance(error, CommunicationError):
            raise error
        raise WorkerFailed(
            rank, step, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        ) from error

    def _enter(self, rank: int) -> None:
        """``rank``'s thread has started."""
        return

    def _leave(self, rank: int) -> None:
        """``rank``'s thread ends."""
        return

    def _open(self) -> None:
        """All threads have started."""
        return


class InProcessCommunicator(Communicator):
    """One rank's end of a group whose ranks are threads of this process."""

    shares_memory: ClassVar[bool] = True
    counts_moved: ClassVar[bool] = True

    def __init__(self, world: World, group: Group, index: int) -> None:
        super().__init__(index, len(group.members), timeout_s=world.timeout_s)
        self.world = world
        self.group = group
        self.world_rank = group.members[index]

    def fail(self) -> None:
        """Peers that wait raise `PeerLost` now, the others at their next operation."""
        self.world.abort(self.world_rank, f"rank {self.world_rank} reported its failure")

    # -- collectives -----------------------------------------------------------------------------------------------

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        world = self.world

        def make(offers: list[None]) -> list[Tensor]:
            if not common:
                return [world.zeros(numel, dtype) for _ in offers]
            one = world.zeros(numel, dtype)
            world.common[_address(one)] = one, frozenset(self.group.members)
            return [one for _ in offers]

        result: Tensor = self._meet("allocate", None, None, make, "common" if common else "", numel, dtype)
        return result

    def is_common(self, x: Tensor) -> bool:
        """Whether ``x`` lies in memory that all ranks see as one copy."""
        entry = self.world.common.get(_address(x))
        return entry is not None and entry[1].issuperset(self.group.members)

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        self._meet("all_reduce", x, (x, weight), _columns(exchange.all_reduce), _weighted(weight))
        self.counters.moved_B += x.nbytes
        return DONE

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        self._meet("reduce_scatter", x, (x, weight), _columns(exchange.reduce_scatter), _weighted(weight))
        self.counters.moved_B += x.nbytes // self.size

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        spans = tuple((lo, hi) for lo, hi in bounds)
        self._meet("all_gather", x, x, lambda parts: exchange.all_gather(parts, spans), spans)
        if not self.is_common(x):
            others = sum(hi - lo for i, (lo, hi) in enumerate(spans) if i != self.rank)
            self.counters.moved_B += others * x.element_size()
        return DONE

    def _all_to_all(self, x: Tensor) -> Tensor:
        result: Tensor = self._meet("all_to_all", x, x, exchange.all_to_all)
        self.counters.moved_B += x.nbytes // self.size * (self.size - 1)
        return result

    def _broadcast(self, x: Tensor, root: int) -> Work:
        self._meet("broadcast", x, x, lambda parts: exchange.broadcast(parts, root), f"from rank {root}", root=root)
        if self.rank != root and not self.is_common(x):
            self.counters.moved_B += x.nbytes
        return DONE

    def _barrier(self) -> None:
        self._meet("barrier", None, None, lambda offers: None)

    def _split(self, color: int) -> Communicator:
        members = self.group.members

        def make(colors: list[int]) -> list[tuple[Group, int]]:
            groups = {}
            for c in set(colors):
                chosen = tuple(r for r, own in zip(members, colors, strict=True) if own == c)
                groups[c] = Group(chosen, f" of {name_ranks(chosen)}")
            return [(groups[c], groups[c].members.index(r)) for r, c in zip(members, colors, strict=True)]

        group, index = self._meet("split", None, color, make)
        return self.world.join(group, index)

    def _alone(self) -> Communicator:
        return self.world.join(Group((self.world_rank,), f" of {name_ranks([self.world_rank])}"), 0)

    # -- common memory ---------------------------------------------------------------------------------------------

    def locks(self, count: int) -> list[Lock]:
        """Locks that go from rank to rank in the order of asking."""

        def make(offers: list[None]) -> list[list[Turns]]:
            return [[Turns(f"lock {i}") for i in range(count)]] * len(offers)

        return [self._lock(turns) for turns in self._meet("allocate", None, None, make, "locks", count)]

    def board(self) -> Board:
        """Counters of the world that know when they changed."""

        def make(offers: list[None]) -> list[Counters]:
            return [Counters(len(offers))] * len(offers)

        return self._board(self._meet("allocate", None, None, make, "board"))

    def _lock(self, turns: Turns) -> Lock:
        return InProcessLock(self, turns)

    def _board(self, counters: Counters) -> Board:
        return InProcessBoard(self, counters)

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        world, me = self.world, self.world_rank
        priced = Operation(
            operation, x.nbytes, 2, (me,), me, self.group.members[at % self.size], True, self.context.purpose
        )
        with self._timed(operation):
            with world.exclusive():
                ends, cost_s = world.charge(priced, (me,))
            world.wait(self, Elapsed(ends, operation, cost_s))
        self.counters.moved_B += x.nbytes

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        world, group = self.world, self.group
        destination = group.members[to]
        ranks = self.world_rank, destination
        operation = Operation("send", x.nbytes, 2, ranks, *ranks, self.is_common(x), self.context.purpose)
        with self._timed(f"send(to rank {destination}, tag {tag})"):
            copy = x.detach().clone()
            with world.exclusive():
                at, cost_s = world.charge(operation, (self.world_rank,))
                group.mailboxes[to][self.rank, tag].append(Message(at, self.rank, copy))
                world.wake((destination,))
            world.wait(self, Elapsed(at, "send", cost_s))
        self.counters.moved_B += x.nbytes
        return DONE

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        receive = Receive(self.group, self.rank, frm, tag)
        with self._timed(str(receive)):
            self.world.wait(self, receive)
            with self.world.exclusive():
                _, source, tensor = receive.take()
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise CommunicationError(
                    f"rank {self.world_rank} in {receive} expects {amount(like.numel(), like.dtype)}, but rank "
                    f"{self.group.members[source]} sent {amount(tensor.numel(), tensor.dtype)}: a message is received "
                    "into a tensor of its own length and dtype"
                )
            with torch.no_grad():
                like.copy_(tensor)
        return Received(source, like)

    def _arrived(self, tag: int) -> bool:
        with self.world.exclusive():
            return Receive(self.group, self.rank, None, tag).due() is not None

    # -- meeting ---------------------------------------------------------------------------------------------------

    def _meet(
        self,
        name: str,
        x: Tensor | None,
        offer: object,
        move: Callable[[list[Any]], Any],
        detail: object = "",
        numel: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Meet all ranks of the group; the last to come calls ``move`` on all offers. Returns this rank's result."""
        world, group = self.world, self.group
        if x is None:
            payload_B, common = 0, False
        else:
            numel, dtype, payload_B, common = x.numel(), x.dtype, x.nbytes, self.is_common(x)
        source = None if root is None else group.members[root]
        operation = Operation(name, payload_B, self.size, group.members, source, None, common, self.context.purpose)
        with self._timed(name):
            with world.exclusive():
                meeting = group.join(self.rank, operation, (name, numel, dtype, detail), offer)
                complete = len(meeting.offers) == self.size
                if meeting.error is not None:
                    meeting.at = world.now(self.world_rank)
                    world.wake(group.members)
            if meeting.error is None:
                if complete:
                    self._conclude(meeting, move)
                world.wait(self, meeting)
        if meeting.error is not None:
            raise CommunicationError(meeting.error)
        if meeting.raised is not None:
            raise _again(meeting.raised)
        return None if meeting.results is None else meeting.results[self.rank]

    def _conclude(self, meeting: Meeting, move: Callable[[list[Any]], Any]) -> None:
        world, group = self.world, self.group
        try:
            # Outside `exclusive`: ranks of other groups go on meanwhile. All of this group are here.
            with torch.no_grad():
                meeting.results = move([meeting.offers[i] for i in range(self.size)])
        except Exception as e:
            meeting.raised = e
        with world.exclusive():
            meeting.at, meeting.cost_s = world.charge(meeting.operation, group.members)
            group.meeting = None
            world.wake(group.members)

    def _timed(self, doing: str) -> _Timed:
        """Account the time inside as communicating, waiting excluded; refuse to begin in an aborted world."""
        return _Timed(self, doing)


class _Timed:
    """See `InProcessCommunicator._timed`; a class, because a generator takes twice as long."""

    __slots__ = ("_begun", "_comm", "_doing", "_waited")

    def __init__(self, comm: InProcessCommunicator, doing: str) -> None:
        self._comm, self._doing = comm, doing

    def __enter__(self) -> None:
        comm = self._comm
        if comm.world.failure is not None:
            raise comm.world.lost(comm, self._doing)
        comm.world.settle(comm)
        self._begun, self._waited = comm.world.now(comm.world_rank), comm.context.counters.wait_s

    def __exit__(self, *_: object) -> None:
        comm = self._comm
        counters = comm.context.counters
        counters.communicate_s += comm.world.now(comm.world_rank) - self._begun - (counters.wait_s - self._waited)


class InProcessBoard:
    """A board, as one rank sees it."""

    def __init__(self, comm: InProcessCommunicator, counters: Counters) -> None:
        self._comm, self._counters = comm, counters

    def post(self, value: int) -> None:
        """Set this rank's counter."""
        comm = self._comm
        comm.world.settle(comm)
        with comm.world.exclusive():
            counters = self._counters
            if counters.post(comm.rank, value, comm.world.now(comm.world_rank)) and counters.waiting:
                comm.world.wake(sorted(counters.waiting))

    def read(self) -> list[int]:
        """All counters, in rank order."""
        return list(self._counters.values)

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """The least of all counters, once those of the other ranks (or that of ``rank``) are at least ``least``."""
        comm = self._comm
        self._until(FarEnough(self._counters, comm.group.members, least, doing, me=comm.rank, only=rank))
        return self._counters.least

    def wait_for_one(self, least: int, doing: str) -> None:
        """Return when one of them is at least ``least``."""
        comm = self._comm
        self._until(OneFarEnough(self._counters, comm.group.members, least, doing, me=comm.rank))

    def _until(self, event: FarEnough) -> None:
        comm, counters = self._comm, self._counters
        with comm._timed(event.doing):
            with comm.world.exclusive():
                counters.careful += event.careful
                counters.waiting.add(comm.world_rank)
            try:
                comm.world.wait(comm, event)
            finally:
                with comm.world.exclusive():
                    counters.careful -= event.careful
                    counters.waiting.discard(comm.world_rank)


class InProcessLock:
    """One lock, as one rank sees it."""

    def __init__(self, comm: InProcessCommunicator, turns: Turns) -> None:
        self._comm, self._turns = comm, turns
        self._turn = Turn(turns, comm.rank, comm.world_rank)
        self.lost: list[int] = []  # a thread's death ends the world

    def __enter__(self) -> None:
        comm, turns = self._comm, self._turns
        comm.world.settle(comm)
        with comm.world.exclusive():
            turns.queue.append(self._turn.me)
            free = len(turns.queue) == 1 and turns.free_at <= comm.world.now(comm.world_rank)
        if not free or comm.world.failure is not None:
            with comm._timed(turns.label):
                comm.world.wait(comm, self._turn)

    def __exit__(self, *_: object) -> None:
        world, turns = self._comm.world, self._turns
        with world.exclusive():
            turns.queue.popleft()
            turns.free_at = world.now(self._comm.world_rank)
            if turns.queue:
                turns.free_at += world.woken_s
                world.wake([turns.queue[0][1]])


def _columns(move: Callable[[list[Tensor], list[float | None]], None]) -> Callable[[list[Any]], None]:
    return lambda offers: move([x for x, _ in offers], [w for _, w in offers])


def _again(e: Exception) -> Exception:
    """An exception like ``e``: what the last to come ran into is everybody's, and each thread raises its own."""
    twin = type(e).__new__(type(e))
    twin.__dict__.update(e.__dict__)
    twin.args = e.args
    return twin


def _weighted(weight: float | None) -> str:
    return "" if weight is None else "weighted"


def _address(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)  # unlike data_ptr also told apart on the meta device
