"""What every transport offers: collectives, messages and symmetric memory, with each operation counted.

`Communicator` is the seam. A transport subclasses it and fills in the underscored methods; checking arguments,
counting bytes and naming the operation for error messages are done here, once.

Payload bytes follow the *reference algorithm* of each operation (P ranks, n bytes of payload), whatever the transport
really does; a transport that knows better reports what it moved in ``Counters.moved_B``:

    all_reduce       ring                    2(P−1)/P · n   (Patarasu & Yuan 2009)
    reduce_scatter   ring                     (P−1)/P · n
    all_gather       ring                     (P−1)/P · n   n = the gathered vector
    all_to_all       pairwise                 (P−1)/P · n
    broadcast        chain from the root              n     (0 for the last rank of the chain)
    send, pull, push                                  n   pull, push: between memory that stands for a server and a rank
    get, put                                          n   of a `Window`; to and from a rank's own memory 0

Each is counted for a purpose (`Communicator.counting`):

    step                       a strategy's payload, as it declares it
    cut                        within forward and backward of a model that is cut
    state                      optimizer state that is averaged
    buckets, parcels, service  what a payload really left as, beside its entry under ``step``
    control                    a few bytes that ranks tell each other: who has a finite loss, how long a payload is
    consensus                  somebody looks: an evaluation, a checkpoint, the end of the run
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from manyhands.communication.compression.meter import Meter
from manyhands.communication.reduction import check_veto, slices
from manyhands.communication.topology import Mesh
from manyhands.errors import BadInput, CommunicationError

#: What is summed. Moving (gather, broadcast, messages) is for whatever the transport's engine knows.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)

#: Purposes of what is no part of a step and takes none of its time.
LOOKING = frozenset({"consensus"})
#: … and of what carries nothing that a step is about: ranks meet for it, but its bytes are no price worth measuring.
ASIDE = LOOKING | {"control"}


@functools.lru_cache(maxsize=4096)
def reference_B(operation: str, n_B: int, size: int, rank: int = 0, root: int = 0) -> int:
    """Payload bytes that ``rank`` sends for one operation on ``n_B`` bytes (the table above), rounded down."""
    if size == 1:
        return 0
    if operation == "all_reduce":
        return 2 * (size - 1) * n_B // size
    if operation in ("reduce_scatter", "all_gather", "all_to_all"):
        return (size - 1) * n_B // size
    if operation == "broadcast":
        return 0 if (rank - root) % size == size - 1 else n_B
    if operation in ("send", "pull", "push", "get", "put"):
        return n_B
    return 0


class Work(Protocol):
    """An operation under way. `wait` returns when the result may be read; it raises what went wrong."""

    def wait(self) -> None:
        """Return when the operation is over."""


class Lock(Protocol):
    """Held by one rank at a time; a context manager. Entering has a deadline that names the holder."""

    #: Ranks that died while they held it, as far as this rank has found out by taking it after them.
    lost: list[int]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Board(Protocol):
    """A counter a rank, which all ranks see. Counters only grow."""

    def post(self, value: int) -> None:
        """Set this rank's counter."""

    def read(self) -> list[int]:
        """All counters, in rank order."""

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """The least of all counters, once those of the other ranks (or that of ``rank``) are at least ``least``.

        The deadline's message names who is behind.
        """

    def wait_for_one(self, least: int, doing: str) -> None:
        """Return when one of them is at least ``least``."""


#: Where a part lies in a window, in bytes from its beginning; or where each row of a matrix does.
At = int | Tensor


class Window(Protocol):
    """Memory of every rank's that the others read and write while it goes on with its own work (one-sided).

    What a call moved is there for every rank when it returns. Who may write when is for the caller to settle, by locks.
    """

    def get(self, frm: int, *parts: tuple[At, Tensor]) -> None:
        """Fill the tensors from the memory of rank ``frm``."""

    def put(self, to: int, *parts: tuple[At, Tensor]) -> None:
        """Write the tensors to the memory of rank ``to``."""


class Done:
    """The `Work` of an operation that was finished when the call returned."""

    def wait(self) -> None:
        """Return at once."""
        return


DONE = Done()


@dataclass(frozen=True)
class Received:
    """A message: who sent it and what it says (``tensor`` is the ``like`` that was passed, filled)."""

    source: int
    tensor: Tensor


@dataclass
class Tally:
    """One operation's count: calls, messages and payload bytes under the reference algorithm."""

    calls: int = 0
    messages: int = 0
    sent_B: int = 0


@dataclass
class Counters:
    """What a rank has communicated so far, by purpose (the table above) and operation."""

    tallies: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Tally)))
    #: Bytes really copied to where other ranks see them, or fetched from there instead, where the transport knows;
    #: summands that are read where they lie are not moved.
    moved_B: int = 0
    wait_s: float = 0.0  # time spent waiting for peers
    communicate_s: float = 0.0  # time inside operations, waiting excluded
    compression: Meter = field(default_factory=Meter)

    def sent_B(self, purpose: str = "step") -> int:
        """Payload bytes sent for ``purpose``."""
        return sum(t.sent_B for t in self.tallies[purpose].values())

    def messages(self, purpose: str = "step") -> int:
        """Messages sent for ``purpose`` under the reference algorithms."""
        return sum(t.messages for t in self.tallies[purpose].values())


@dataclass
class Context:
    """What a communicator and the groups split from it have in common."""

    counters: Counters = field(default_factory=Counters)
    purpose: str = "step"  # what is being communicated for
    step: int | None = None  # the training step, for messages


class Communicator(ABC):
    """One rank's end of a group of ranks.

    Collectives must be called by all ranks of the group in the same order with equal shapes and dtypes. Tensors are
    contiguous; one from `allocate` is *symmetric*: transports that can, work on it without a copy.
    """

    transport: ClassVar[str]
    #: Whether `allocate` with ``common=True`` really gives one copy that all ranks see (HOGWILD and the like need it).
    shares_memory: ClassVar[bool] = False
    #: Whether accesses to a server wait for each other by themselves, as in a simulation that looks at sizes only.
    serves_in_line: bool = False
    #: Whether there is a `window`, and locks and boards by which to share what lies in it.
    one_sided: ClassVar[bool] = False
    #: Whether ``counters.moved_B`` is kept.
    counts_moved: ClassVar[bool] = False
    #: Whether operations that return `Work` go on while the caller computes, so that bucketed overlap can pay.
    overlaps: ClassVar[bool] = False
    #: Whether the group can still meet. Where an engine ends a group at its first failure, that is over then.
    usable: bool = True

    def __init__(self, rank: int, size: int, *, timeout_s: float = 60.0) -> None:
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        #: All ranks, the workers first, where there are server ranks; see `apart`.
        self.servers: Communicator | None = None
        self.context = Context()
        self._mesh = Mesh(data=size)
        self._groups: dict[frozenset[str], Communicator] | None = None  # of this mesh; None: not made yet
        self._made: list[Communicator] = []  # groups that `over` has made, of this mesh or the last, to be closed

    @property
    def mesh(self) -> Mesh:
        """The axes along which the ranks are arranged. All ranks set the same; groups of the last mesh then end."""
        return self._mesh

    @mesh.setter
    def mesh(self, mesh: Mesh) -> None:
        if mesh.size != self.size:
            raise BadInput(f"{mesh} on {self.size} ranks: it is for {mesh.size}. A mesh arranges all ranks of a group.")
        self._mesh = mesh
        self._groups = None

    @property
    def counters(self) -> Counters:
        """What this rank has communicated, through this communicator and groups split from it."""
        return self.context.counters

    @property
    def step(self) -> int | None:
        """The training step, which error messages name."""
        return self.context.step

    @step.setter
    def step(self, value: int | None) -> None:
        self.context.step = value
        self._publish_step(value)

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, numel: int, dtype: torch.dtype = torch.float32, *, common: bool = False) -> Tensor:
        """Zero-filled symmetric memory of ``numel`` elements. Collective.

        ``common=True`` says that the caller keeps all ranks' contents equal, so one copy may serve them all; where
        `shares_memory` holds it is one copy, elsewhere each rank gets its own.
        """
        if numel < 0:
            raise BadInput(f"allocate({numel}): a size is a whole number from 0.")
        return self._allocate(numel, dtype, common)

    def is_common(self, x: Tensor) -> bool:
        """Whether ``x`` lies in memory that all ranks see as one copy."""
        return False

    def window(self, size_B: int) -> Window:
        """Zero-filled memory, of this rank ``size_B`` bytes, that all ranks may get and put. Collective.

        Only where `one_sided`; given back at the next `release`, or when this group is closed.
        """
        raise BadInput(f"transport={self.transport} has no memory that another worker reaches; mpi has windows.")

    def locks(self, count: int) -> list[Lock]:
        """So many locks that all ranks share, for what they write in common memory or in windows. Collective.

        Only where `shares_memory` or `one_sided`; a strategy that needs it says so when the plan is made.
        """
        raise BadInput(f"transport={self.transport} has no memory that its workers share, so there is nothing to lock.")

    def board(self) -> Board:
        """A new board of counters, all 0. Collective; only where `shares_memory` or `one_sided`."""
        raise BadInput(f"transport={self.transport} has no memory that its workers share, so there is no board in it.")

    def access(self, operation: str, x: Tensor, *, at: int = 0) -> None:
        """Count ``x`` as payload that comes from (``pull``) or goes to (``push``) memory which stands for a server.

        Called before the memory is touched. In virtual time its price passes, ranks that are earlier go first, and
        those that want something of one place, number ``at`` (modulo the ranks), come one after the other.
        """
        self._count(operation, x, 1)
        if self.size > 1:
            self._access(operation, x, at)

    def mark(self) -> int:
        """This moment, for `release`. Collective; of the communicator of all ranks only."""
        return 0

    def release(self, mark: int) -> None:
        """Give back the memory and the groups made since ``mark``. Collective; may be repeated for the same mark.

        For ranks that do one job after another. Memory on which some rank still has a tensor (or a group) stays until
        a later release finds it dropped. The mesh becomes ``data=size`` again, and groups got from `over` end.
        """
        self.mesh = Mesh(data=self.size)
        if self.size > 1:
            self._barrier()  # the others may be in one of the groups yet
        self._close_made()

    # -- collectives -----------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, weight: float | None = None) -> Work:
        """``x ← Σ_p x_p`` on every rank, or the weighted mean ``Σ w_p x_p / Σ w_p`` where weights are given.

        ``x`` must not be touched before ``wait()``. Either every rank gives a weight or none does. A weight of 0
        excludes a rank whatever its ``x`` holds; if all are 0 the result is 0; one that is not finite is a veto, upon
        which every rank raises `Vetoed` in this call or in ``wait()``. One rank's ``x`` is untouched bit for
        bit. The weight itself rides along and is not counted as payload.
        """
        _check_sum(x, weight)
        self._count("all_reduce", x, 2 * (self.size - 1))
        if self.size == 1:
            check_veto([weight])
            return DONE
        return self._all_reduce(_flat(x), weight)

    def reduce_scatter(self, x: Tensor, *, weight: float | None = None) -> tuple[int, int]:
        """Reduce as `all_reduce` does, but only this rank's slice: returns its bounds ``(lo, hi)`` in ``x.view(-1)``.

        ``x[lo:hi]`` then holds the result; the rest of ``x`` is undefined. Peers may still be reading ``x`` when this
        returns: outside ``[lo, hi)`` it must not be written before the next collective of this group.
        """
        _check_sum(x, weight)
        self._count("reduce_scatter", x, self.size - 1)
        if self.size == 1:
            check_veto([weight])
            return 0, x.numel()
        self._reduce_scatter(_flat(x), weight)
        return slices(x.numel(), self.size)[self.rank]

    def all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]] | None = None) -> Work:
        """Fill ``x`` in place: rank p contributes ``x[lo_p:hi_p]``; default bounds are those of `reduce_scatter`.

        On common memory there is one copy already and this is a barrier.
        """
        self._count("all_gather", x, self.size - 1)
        if bounds is not None and len(bounds) != self.size:
            raise BadInput(f"all_gather with {len(bounds)} bounds for {self.size} ranks: each contributes one slice.")
        if self.size == 1:
            return DONE
        return self._all_gather(_flat(x), slices(x.numel(), self.size) if bounds is None else bounds)

    def all_to_all(self, x: Tensor) -> Tensor:
        """``x`` is P equal chunks; returns the chunks addressed to this rank, in rank order."""
        if x.numel() % self.size:
            raise BadInput(f"all_to_all of {x.numel()} elements over {self.size} ranks: the chunks must be equal.")
        self._count("all_to_all", x, self.size - 1)
        return x.clone() if self.size == 1 else self._all_to_all(_flat(x)).view(x.shape)

    def broadcast(self, x: Tensor, root: int = 0) -> Work:
        """``x`` becomes the root's ``x`` on every rank."""
        self._peer(root)
        self._count("broadcast", x, 1, root=root)
        return DONE if self.size == 1 else self._broadcast(_flat(x), root)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._tally("barrier").calls += 1
        if self.size > 1:
            self._barrier()

    # -- messages --------------------------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int, tag: int = 0) -> Work:
        """Send ``x``; ``x`` must not be changed before ``wait()``. Messages of one (sender, tag) arrive in order."""
        self._peer(to)
        self._count("send", x, 1)
        return self._send(_flat(x), to, tag)

    def recv(self, like: Tensor, frm: int | None = None, tag: int = 0) -> Received:
        """Receive into ``like`` from rank ``frm``, or from anyone (the sender is told).

        A message of another length than ``like``'s is an error; what `GlooCommunicator` makes of it is said there.
        """
        if frm is not None:
            self._peer(frm)
        return Received(self._recv(_flat(like), frm, tag).source, like)

    def arrived(self, tag: int = 0) -> bool:
        """Whether a message of ``tag`` from anyone is here, so that `recv` takes one without waiting.

        For choosing what to do first, never for ending a wait: where a transport cannot tell (gloo, nccl) it is False.
        """
        return self.size > 1 and self._arrived(tag)

    def listen(self, like: Tensor, frm: Collection[int], tag: int = 0) -> Received:
        """`recv` from any of the ranks ``frm``, with no deadline: for a rank that serves them as long as they live.

        Raises `PeerLost` when one of them fails. All calls of one rank have the same ``like`` and tag.
        """
        return Received(self._listen(_flat(like), frm, tag).source, like)

    # -- groups ----------------------------------------------------------------------------------------------------

    def apart(self, servers: int) -> Communicator:
        """The group of all ranks but the last ``servers``, whose `servers` is this; on those, the group of them.

        Collective. The group ends with this one, or at its next `release`.
        """
        group = self.split(int(self.rank >= self.size - servers))
        group.servers = self
        self._made.append(group)
        return group

    def split(self, color: int) -> Communicator:
        """The group of the ranks that gave the same ``color``, in rank order. Collective over this group."""
        group = self._split(color)
        group.context = self.context
        return group

    def arranged(self, mesh: Mesh) -> Communicator:
        """The same ranks as a group of its own with another mesh. Collective. The group ends with this one."""
        group = self.split(0)
        group.mesh = mesh
        self._made.append(group)
        return group

    def over(self, axes: frozenset[str]) -> Communicator:
        """The ranks that differ from this one only along ``axes`` of the mesh; kept until another mesh is set.

        The first use after a mesh is set is collective if the mesh has several axes: it makes all groups there are, so
        that ranks may ask for whichever they need, in any order.
        """
        if self._groups is None:
            self._groups = self._make_groups()
        key = frozenset(a for a in axes if self._mesh[a] > 1)
        if key not in self._groups:  # along no axis: this rank
            alone = self._groups[key] = self._alone()
            alone.context, alone.mesh = self.context, Mesh()
            self._made.append(alone)
        return self._groups[key]

    def _make_groups(self) -> dict[frozenset[str], Communicator]:
        mesh = self._mesh
        long = [a for a in mesh if mesh[a] > 1]
        groups: dict[frozenset[str], Communicator] = {frozenset(long): self}
        made: list[Communicator] = []
        for count in range(1, len(long)):
            for axes in map(frozenset, itertools.combinations(long, count)):
                group = groups[axes] = self.split(mesh.color(self.rank, axes))
                group.mesh = Mesh((a, mesh[a]) for a in mesh if a in axes)
                # What differs along fewer axes yet is the same ranks, seen from here or from there.
                group._groups = {a: g for a, g in groups.items() if a <= axes}
                made.append(group)
                self._close_made()  # no rank is in a group of the last mesh any more: all have split
        self._made += made
        return groups

    def _close_made(self) -> None:
        while self._made:
            self._made.pop().close()

    def lost(self) -> list[int]:
        """The ranks of this group of which a launcher has said by now that they have died and the others go on.

        See `Strategy.survives`. A message from one of them, or to it, ends in `PeerLost`.
        """
        return []

    def goes_on_without(self, rank: int) -> bool:
        """Whether ``rank``, of which a `PeerLost` tells, is one of the `lost`; waits for the launcher's word on it."""
        return rank in self.lost()

    def agree_on_lost(self) -> list[int]:
        """The `lost` ranks, as far as all others know alike, who then need a group `without` them. Collective of those.

        Rank 0 is never one of them. One that dies after it has come here is not in the list: whatever comes next with
        it ends in `PeerLost`.
        """
        return []

    def without(self, lost: Sequence[int]) -> Communicator:
        """The group of the other ranks, in their order. Collective of those."""
        raise BadInput(f"transport={self.transport} cannot go on without a rank.")

    def fail(self) -> None:
        """Tell the peers that this rank has failed, where there is a way to; they stop waiting for it."""
        return

    def close(self) -> None:
        """Give back what this end and its groups hold; safe to call twice.

        Collective over each group on mpi, which takes back windows and groups only from all their ranks at once.
        """
        self._close_made()

    # -- counting --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def counting(self, purpose: str) -> Iterator[None]:
        """Count what happens inside for another purpose than ``step`` (the table above)."""
        before, self.context.purpose = self.context.purpose, purpose
        try:
            yield
        finally:
            self.context.purpose = before

    def _tally(self, operation: str) -> Tally:
        return self.counters.tallies[self.context.purpose][operation]

    def _count(self, operation: str, x: Tensor, messages: int, *, root: int | None = None) -> None:
        context, size = self.context, self.size
        tally = context.counters.tallies[context.purpose][operation]
        tally.calls += 1
        if size > 1:
            tally.messages += messages
            place = 0 if root is None else (self.rank - root) % size
            tally.sent_B += reference_B(operation, x.nbytes, size, place)

    def _peer(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise BadInput(f"rank {rank}: this group has ranks 0 to {self.size - 1}.")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Account the time inside as waiting for peers."""
        t0 = time.perf_counter()
        try:
            yield
        finally:
            self.counters.wait_s += time.perf_counter() - t0

    def _publish_step(self, step: int | None) -> None:
        """The step has changed; a transport whose peers can look makes it visible to them."""
        return

    # -- what a transport fills in: x is contiguous and flat, size > 1 --------------------------------------------

    def _access(self, operation: str, x: Tensor, at: int) -> None:
        return

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        return torch.zeros(numel, dtype=dtype)

    @abstractmethod
    def _all_reduce(self, x: Tensor, weight: float | None) -> Work: ...

    @abstractmethod
    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None: ...

    @abstractmethod
    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work: ...

    @abstractmethod
    def _all_to_all(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _broadcast(self, x: Tensor, root: int) -> Work: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _send(self, x: Tensor, to: int, tag: int) -> Work: ...

    @abstractmethod
    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received: ...

    def _arrived(self, tag: int) -> bool:
        return False

    def _listen(self, like: Tensor, frm: Collection[int], tag: int) -> Received:
        raise BadInput(f"transport={self.transport} has no server ranks; gloo has.")

    @abstractmethod
    def _split(self, color: int) -> Communicator: ...

    @abstractmethod
    def _alone(self) -> Communicator:
        """The group of this rank only, made without the others; also where size is 1."""


def wrong_length(rank: int, source: int, tag: int, sent_B: int, like: Tensor) -> CommunicationError:
    """The error of a message that does not fit ``like``; ranks are those of the world."""
    return CommunicationError(
        f"rank {rank} received {sent_B} bytes from rank {source} (tag {tag}) into a tensor of {like.numel()} × "
        f"{like.element_size()} bytes: a message is received into a tensor of its own length and dtype"
    )


def _check_sum(x: Tensor, weight: float | None) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise BadInput(f"a sum of {x.dtype}: sums are of {known}. Convert it, or view complex numbers as real ones.")
    if weight is not None and not x.dtype.is_floating_point:
        raise BadInput(f"a weighted mean of {x.dtype}: whole numbers can only be summed (leave the weight out).")


def _flat(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise BadInput(f"a tensor of shape {tuple(x.shape)} that is not contiguous: pass x.contiguous().")
    return x.view(-1)
