"""Workers as processes of one host that share memory: the default, and the reason to be fast.

There is one copy of what all ranks keep equal (``allocate(common=True)``: parameters), and a slot per rank of what
they do not (gradients). An operation on such *symmetric* memory moves nothing it does not have to:

    reduce_scatter   barrier; every rank adds its own slice of all slots, in rank order
    all_gather       of common memory: a barrier
    all_reduce       barrier; every rank reduces its slice and writes it to all slots; barrier

Other tensors pass through two staging buffers used in turn, which saves the trailing barrier: before a rank can write
a buffer again, every other rank has arrived at the operation in between, so has left the one that read it.

Linux on x86-64. Results are bit-identical from run to run and to `threads` and `simulated` (rank order).
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import math
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyhands.communication import robust_mutex
from manyhands.communication.board import SharedBoard, board_B
from manyhands.communication.communicator import DONE, Board, Communicator, Lock, Received, Work
from manyhands.communication.mailbox import Mailbox, Outgoing, bytes_needed
from manyhands.communication.reduction import coefficients, reduce_into, slices
from manyhands.communication.segment import PAGE_B, Region, Segment
from manyhands.communication.shared_barrier import LINE_WORDS, SharedBarrier, words_needed
from manyhands.communication.topology import Mesh
from manyhands.errors import BadInput

#: Bytes of one staging buffer of one rank; larger tensors go through in chunks.
STAGING_B = 4 * 2**20
#: Up to this many bytes every rank reduces all of a staged tensor itself, which saves a barrier.
ONE_SHOT_B = 16 * 1024
#: Slots are this much more than whole pages apart: equal offsets modulo the page make a store to one slot look like
#: a conflict with a load from another ("4K aliasing", Intel Optimization Manual).
SLOT_SHIFT_B = 21 * 64
#: So many slices of symmetric memory are remembered with their counterparts; a training step uses a handful.
CACHED = 1024
_NAN, _INFINITY = math.nan, math.inf
#: Of a whole number that a float64 holds exactly.
_BITS = 52

# What a rank comes to a barrier for, in a word: operation (bits 0–3), dtype (4–10), an adverb (11), the root (12–23),
# the number of elements (from 24). Ranks that disagree are told so; it costs 0.1 to 0.3 µs.
_OPERATIONS = (
    "barrier",
    "split",
    "mark",
    "release",
    "allocate",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
)
_BARRIER, _SPLIT, _MARK, _RELEASE = range(4)
_ALLOCATE, _ALL_REDUCE, _REDUCE_SCATTER, _ALL_GATHER, _ALL_TO_ALL, _BROADCAST = range(4, 10)
_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
_DTYPE = {dtype: code << 4 for code, dtype in enumerate(_DTYPES)}
_WEIGHTED = _COMMON = 1 << 11
_ROOT = 1 << 12
_NUMEL = 1 << 24


def _payload(x: Tensor) -> int:
    """The word's part that says what is communicated."""
    return _DTYPE[x.dtype] + x.numel() * _NUMEL


def _describe(what: int) -> str:
    """``all_reduce(3 float32, weighted)``."""
    name, dtype = _OPERATIONS[what % 16], _DTYPES[what // 16 % 128]
    if what % 16 < _ALLOCATE:
        return name
    how = ", weighted" if name != "allocate" else ", common"
    root = f", from rank {what // _ROOT % 2**12}" if name == "broadcast" else ""
    return f"{name}({what // _NUMEL} {str(dtype).removeprefix('torch.')}{how if what & _WEIGHTED else ''}{root})"


class _Control(NamedTuple):
    """Byte offsets within a group's control region."""

    exchange: int  # two alternating 64-bit words per rank: a number to all
    steps: int  # the training step of each rank, for messages
    mailbox: int
    end: int

    @classmethod
    def of(cls, size: int) -> _Control:
        exchange = words_needed(size) * 8
        steps = exchange + 2 * size * LINE_WORDS * 8
        mailbox = -(-(steps + size * 8) // PAGE_B) * PAGE_B
        return cls(exchange, steps, mailbox, mailbox + bytes_needed(size))


class _Symmetric(NamedTuple):
    """A tensor of this rank's and, at the same place in theirs, everybody's."""

    common: bool
    payload: int  # `_payload` of it
    slots: list[Tensor]
    slices: list[list[Tensor]]  # [slice][rank]


class _Allocation(NamedTuple):
    first: int  # address of this rank's first byte
    last: int
    common: bool
    region: Region
    stride_B: int


class _Leaving:
    """The `Work` of a message that did not fit into the ring at once."""

    def __init__(self, comm: SharedCommunicator, message: Outgoing) -> None:
        self._comm, self._message = comm, message

    def wait(self) -> None:
        comm = self._comm
        with comm._exchanging(comm._mail):
            comm._mail.wait_until_sent(self._message, comm.step)


class SharedCommunicator(Communicator):
    """One process's end of a group on one host."""

    transport: ClassVar[str] = "shared"
    shares_memory: ClassVar[bool] = True
    counts_moved: ClassVar[bool] = True

    def __init__(
        self,
        segment: Segment,
        control_offset: int,
        rank: int,
        size: int,
        *,
        timeout_s: float = 60.0,
        within: tuple[SharedCommunicator, Sequence[int]] | None = None,
    ) -> None:
        self._segment = segment
        self._within = within
        #: The world's rank of each rank of this group.
        self._names: Sequence[int] = range(size) if within is None else [within[0]._names[r] for r in within[1]]
        self._layout = _Control.of(size)
        self._control = segment.map(control_offset, self._layout.end)
        self._doubles = self._control.doubles()
        self._words = self._control.words()
        super().__init__(rank, size, timeout_s=timeout_s)
        self._enter = SharedBarrier(self._control, segment, rank, self._names, timeout_s=timeout_s, describe=_describe)
        self._mailbox: Mailbox | None = None
        self._mail_region = (control_offset + self._layout.mailbox, bytes_needed(size))
        self._turn = 0  # which of the two exchange words is next
        self._staging_turn = 0
        self._allocations: list[_Allocation] = []  # by address
        self._symmetric: dict[tuple[int, int, torch.dtype], _Symmetric] = {}
        self._staging: Region | None = None

    @staticmethod
    def control_B(size: int) -> int:
        """Bytes to reserve for the control region of a group of ``size``."""
        return _Control.of(size).end

    @staticmethod
    def step_of(segment: Segment, control_offset: int, rank: int, size: int) -> int | None:
        """The training step that ``rank`` published last; for a launcher whose worker can no longer say."""
        layout = _Control.of(size)
        word = segment.map(control_offset, layout.mailbox).words()[layout.steps // 8 + rank]
        return word - 1 if word else None

    def fail(self) -> None:
        """Peers that wait for this rank raise `PeerLost` at their next look-up."""
        self._segment.report_failure(self._names[self.rank])

    # -- state that others may see -----------------------------------------------------------------------------

    def _publish_step(self, step: int | None) -> None:
        self._words[self._layout.steps // 8 + self.rank] = 0 if step is None else step + 1

    def _meet(self, doing: str, what: int) -> None:
        mailbox = self._mailbox
        self._enter(what, self.context.step, doing, mailbox.progress if mailbox is not None else None)

    def _exchange(self, value: float | None, doing: str, what: int) -> list[float | None]:
        """Everybody's number; one barrier. None travels as NaN, and what is not a number as infinity: a veto, too."""
        self._turn ^= 1
        base = self._layout.exchange // 8 + self._turn * self.size * LINE_WORDS
        doubles = self._doubles
        doubles[base + self.rank * LINE_WORDS] = _NAN if value is None else value if value == value else _INFINITY
        self._meet(doing, what)
        numbers = [doubles[base + p * LINE_WORDS] for p in range(self.size)]
        return [None if x != x else x for x in numbers]

    # -- memory ------------------------------------------------------------------------------------------------

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        used_B = max(numel * dtype.itemsize, 1)
        stride_B = 0 if common else -(-used_B // PAGE_B) * PAGE_B + SLOT_SHIFT_B
        total_B = used_B + stride_B * (self.size - 1)
        what = _ALLOCATE + _DTYPE[dtype] + (_COMMON if common else 0) + numel * _NUMEL
        region = self._reserve(total_B, "allocate", what)
        start = stride_B * self.rank
        first = region.address + start
        bisect.insort(self._allocations, _Allocation(first, first + used_B, common, region, stride_B))
        return region.tensor(start, numel, dtype)

    def _reserve(self, size_B: int, doing: str, what: int) -> Region:
        offset = float(self._segment.reserve(size_B)) if self.rank == 0 else None
        agreed = self._exchange(offset, doing, what)[0]
        assert agreed is not None
        return self._segment.map(int(agreed), size_B)

    def locks(self, count: int) -> list[Lock]:
        """Robust mutexes in memory of their own."""
        size_B = max(count, 1) * robust_mutex.LINE_B
        region = self._reserve(size_B, "allocate", _ALLOCATE + _DTYPE[torch.uint8] + size_B * _NUMEL)
        if self.rank == 0:
            for i in range(count):
                robust_mutex.initialise(region.address + i * robust_mutex.LINE_B)
        self._meet("allocate", _BARRIER)
        return [
            robust_mutex.RobustMutex(region, i, self._names[self.rank], self.context, timeout_s=self.timeout_s)
            for i in range(count)
        ]

    def board(self) -> Board:
        """A board in memory of its own."""
        size_B = board_B(self.size)
        region = self._reserve(size_B, "allocate", _ALLOCATE + _DTYPE[torch.uint8] + size_B * _NUMEL)
        return SharedBoard(region, self._segment, self.rank, self._names, self.context, timeout_s=self.timeout_s)

    def mark(self) -> int:
        """Where the memory file ends now."""
        if self._within is not None:
            raise BadInput("mark and release: they are for the communicator of all ranks, not for a group.")
        return int(self._exchange(float(self._segment.end), "mark", _MARK)[0] or 0)

    def release(self, mark: int) -> None:
        """Give back all memory reserved since ``mark`` but what lies before the last region still in use somewhere."""
        if self._within is not None:
            raise BadInput("mark and release: they are for the communicator of all ranks, not for a group.")
        super().release(mark)
        self._symmetric.clear()
        if self._staging is not None and self._staging.offset >= mark:
            self._staging = None
        # Only weak references are kept while we look which regions somebody else holds, through a tensor or a group.
        later = [
            (weakref.ref(a.region.memory), a.region.offset, a.region.size_B, a[:3], a.stride_B)
            for a in self._allocations
            if a.region.offset >= mark
        ]
        self._allocations = [a for a in self._allocations if a.region.offset < mark]
        end = self._segment.mapped_until(mark)
        if end > mark:
            gc.collect()
            end = self._segment.mapped_until(mark)
        end = max(int(e or 0) for e in self._exchange(float(end), "release", _RELEASE))
        for weak, offset, size_B, place, stride_B in later:
            memory = weak()
            if memory is not None:
                bisect.insort(self._allocations, _Allocation(*place, Region(memory, offset, size_B), stride_B))
        if self.rank == 0:
            self._segment.truncate(end)
        self._meet("release", _RELEASE)

    def is_common(self, x: Tensor) -> bool:
        """Whether ``x`` lies in the one copy that all ranks see."""
        found = self._find(x)
        return found is not None and found.common

    def _find(self, x: Tensor) -> _Symmetric | None:
        """The symmetric counterparts of ``x``; None for a tensor from elsewhere."""
        key = (x.data_ptr(), x.numel(), x.dtype)
        try:
            return self._symmetric[key]
        except KeyError:
            pass
        # The only one that can hold it is the last that begins no later.
        i = bisect.bisect_right(self._allocations, (key[0], math.inf)) - 1
        if i >= 0 and key[1] and key[0] + x.nbytes <= self._allocations[i].last:
            a = self._allocations[i]
            at, common = key[0] - a.first, a.common
            slots = [a.region.tensor(a.stride_B * p + at, key[1], x.dtype) for p in range(self.size)]
        elif self._within is not None and (wider := self._within[0]._find(x)) is not None:
            common, slots = wider.common, [wider.slots[r] for r in self._within[1]]
        else:
            return None
        if len(self._symmetric) >= CACHED:
            self._symmetric.clear()
        parts = [[s[lo:hi] for s in slots] for lo, hi in slices(key[1], self.size)]
        found = self._symmetric[key] = _Symmetric(common, _payload(x), slots, parts)
        return found

    def _stage(self, dtype: torch.dtype, numel: int, doing: str, what: int) -> list[Tensor]:
        """Everybody's staging buffer of this turn, as ``numel`` elements."""
        if self._staging is None:
            self._staging = self._reserve(2 * self.size * (STAGING_B + SLOT_SHIFT_B), doing, what)
        step_B = STAGING_B + SLOT_SHIFT_B
        self._staging_turn ^= 1
        base = self._staging_turn * self.size * step_B
        return [self._staging.tensor(base + p * step_B, numel, dtype) for p in range(self.size)]

    # -- collectives -------------------------------------------------------------------------------------------

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        what = (
            _ALL_REDUCE
            + (_payload(x) if symmetric is None else symmetric.payload)
            + (0 if weight is None else _WEIGHTED)
        )
        if symmetric is not None and symmetric.common:
            self._reduce_common(symmetric.slices[self.rank], weight, "all_reduce", what)
            self._meet("all_reduce", what)
        elif symmetric is not None and x.numel() * x.element_size() > ONE_SHOT_B:
            factors = coefficients(self._exchange(weight, "all_reduce", what))
            self._reduce_everywhere(symmetric.slices[self.rank], factors)
            self._meet("all_reduce", what)
        else:
            self._staged_all_reduce(x, weight, "all_reduce", what)
        self._account(t0, waited)
        return DONE

    def _reduce_everywhere(self, parts: list[Tensor], factors: list[float] | None) -> None:
        mine = parts[self.rank]
        reduce_into(mine, parts, factors)
        for p, part in enumerate(parts):
            if p != self.rank:
                part.copy_(mine)
        self.counters.moved_B += (self.size - 1) * mine.nbytes

    def _reduce_common(self, parts: list[Tensor], weight: float | None, doing: str, what: int) -> None:
        """This rank's slice of the one copy, which is every rank's summand, becomes their sum."""
        factors = coefficients(self._exchange(weight, doing, what))
        scratch = torch.empty_like(parts[0])  # a running sum would read itself
        reduce_into(scratch, parts, factors)
        parts[0].copy_(scratch)
        self.counters.moved_B += scratch.nbytes

    def _staged_all_reduce(self, x: Tensor, weight: float | None, doing: str, what: int) -> None:
        chunk = STAGING_B // x.element_size()
        for at in range(0, max(x.numel(), 1), chunk):
            part = x[at : at + chunk]
            stage = self._stage(x.dtype, part.numel(), doing, what)
            stage[self.rank].copy_(part)
            self.counters.moved_B += part.nbytes
            factors = coefficients(self._exchange(weight, doing, what))
            if part.nbytes <= ONE_SHOT_B:
                reduce_into(part, [s if p != self.rank else part for p, s in enumerate(stage)], factors)
            else:
                lo, hi = slices(part.numel(), self.size)[self.rank]
                self._reduce_everywhere([s[lo:hi] for s in stage], factors)
                self._meet(doing, what)
                part.copy_(stage[self.rank])

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        what = (
            _REDUCE_SCATTER
            + (_payload(x) if symmetric is None else symmetric.payload)
            + (0 if weight is None else _WEIGHTED)
        )
        if symmetric is None:
            self._staged_all_reduce(x, weight, "reduce_scatter", what)
        elif symmetric.common:
            self._reduce_common(symmetric.slices[self.rank], weight, "reduce_scatter", what)
        else:
            factors = coefficients(self._exchange(weight, "reduce_scatter", what))
            parts = symmetric.slices[self.rank]
            reduce_into(parts[self.rank], parts, factors)
        self._account(t0, waited)

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        what = _ALL_GATHER + (_payload(x) if symmetric is None else symmetric.payload)
        if symmetric is not None and symmetric.common:
            self._meet("all_gather", what)
        elif symmetric is not None:
            self._meet("all_gather", what)
            for p, (lo, hi) in enumerate(bounds):
                if p != self.rank and hi > lo:
                    x[lo:hi].copy_(symmetric.slots[p][lo:hi])
                    self.counters.moved_B += (hi - lo) * x.element_size()
            self._meet("all_gather", what)
        else:
            self._staged_all_gather(x, bounds, what)
        self._account(t0, waited)
        return DONE

    def _staged_all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]], what: int) -> None:
        chunk = STAGING_B // x.element_size()
        longest = max(hi - lo for lo, hi in bounds)
        for at in range(0, max(longest, 1), chunk):
            stage = self._stage(x.dtype, min(chunk, longest - at), "all_gather", what)
            ranges = [(min(lo + at, hi), min(lo + at + chunk, hi)) for lo, hi in bounds]
            lo, hi = ranges[self.rank]
            stage[self.rank][: hi - lo].copy_(x[lo:hi])
            self.counters.moved_B += (hi - lo) * x.element_size()
            self._meet("all_gather", what)
            for p, (lo, hi) in enumerate(ranges):
                if p != self.rank:
                    x[lo:hi].copy_(stage[p][: hi - lo])

    def _all_to_all(self, x: Tensor) -> Tensor:
        t0, waited = time.perf_counter(), self._enter.wait_s
        what = _ALL_TO_ALL + _payload(x)
        result = torch.empty_like(x)
        outgoing, incoming = x.view(self.size, -1), result.view(self.size, -1)
        chunk = max(STAGING_B // x.element_size() // self.size, 1)
        for at in range(0, max(outgoing.shape[1], 1), chunk):
            part = outgoing[:, at : at + chunk]
            stage = [s.view(self.size, -1) for s in self._stage(x.dtype, part.numel(), "all_to_all", what)]
            stage[self.rank].copy_(part)
            self._meet("all_to_all", what)
            for p in range(self.size):
                incoming[p, at : at + chunk].copy_(stage[p][self.rank])
            self.counters.moved_B += part.nbytes
        self._account(t0, waited)
        return result

    def _broadcast(self, x: Tensor, root: int) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        what = _BROADCAST + _payload(x) + _ROOT * root
        if self.is_common(x):
            self._meet("broadcast", what)
            self._account(t0, waited)
            return DONE
        chunk = STAGING_B // x.element_size()
        for at in range(0, max(x.numel(), 1), chunk):
            part = x[at : at + chunk]
            stage = self._stage(x.dtype, part.numel(), "broadcast", what)[root]
            if self.rank == root:
                stage.copy_(part)
                self.counters.moved_B += part.nbytes
            self._meet("broadcast", what)
            if self.rank != root:
                part.copy_(stage)
        self._account(t0, waited)
        return DONE

    def _barrier(self) -> None:
        t0, waited = time.perf_counter(), self._enter.wait_s
        self._meet("barrier", _BARRIER)
        self._account(t0, waited)

    def _account(self, t0: float, waited_before: float) -> None:
        waited = self._enter.wait_s - waited_before
        self.counters.wait_s += waited
        self.counters.communicate_s += time.perf_counter() - t0 - waited

    # -- messages ----------------------------------------------------------------------------------------------

    @property
    def _mail(self) -> Mailbox:
        if self._mailbox is None:
            region = self._segment.map(*self._mail_region)
            self._mailbox = Mailbox(region, self._segment, self.rank, self._names, timeout_s=self.timeout_s)
        return self._mailbox

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        t0 = time.perf_counter()
        pending = self._mail.send(x, to, tag, self.step)
        self.counters.moved_B += x.nbytes
        self.counters.communicate_s += time.perf_counter() - t0
        return DONE if pending is None else _Leaving(self, pending)

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        mail = self._mail
        with self._exchanging(mail):
            source = mail.recv(like, frm, tag, self.step)
        return Received(source, like)

    def _arrived(self, tag: int) -> bool:
        return self._mail.arrived(tag)

    @contextlib.contextmanager
    def _exchanging(self, mail: Mailbox) -> Iterator[None]:
        """Account the time inside as ``mail`` divides it, also where it ends in an error."""
        t0, waited = time.perf_counter(), mail.wait_s
        try:
            yield
        finally:
            waited = mail.wait_s - waited
            self.counters.wait_s += waited
            self.counters.communicate_s += time.perf_counter() - t0 - waited

    # -- groups ------------------------------------------------------------------------------------------------

    def lost(self) -> list[int]:
        """Those that the launcher has marked in the memory file."""
        return [p for p in range(self.size) if self._segment.gone(self._names[p])]

    def agree_on_lost(self) -> list[int]:
        """Two barriers that do not wait for the dead: after the first all know of them, with the second all say so."""
        if self.size == 1:
            return []
        with self._enter.passing_without_the_gone():
            self._meet("agree_on_lost", _BARRIER)
            gone = self.lost()
            return [p for first in range(0, self.size, _BITS) for p in self._said_to_be(gone, first)]

    def _said_to_be(self, gone: Sequence[int], first: int) -> list[int]:
        """Of the ranks from ``first`` on, as many as a number has bits, those that anybody names.

        Such numbers are negative. What a rank that has died meanwhile left of another exchange is not, or is an older
        one of these, which names nobody who is alive.
        """
        mine = sum(1 << p - first for p in gone if first <= p < first + _BITS)
        said = self._exchange(float(-1 - mine), "agree_on_lost", _BARRIER)
        masks = [int(-1 - x) for x in said if x is not None and -math.inf < x < 0]
        return [first + bit for bit in range(_BITS) if any(mask >> bit & 1 for mask in masks)]

    def without(self, lost: Sequence[int]) -> Communicator:
        """A group as `split` makes one, by those who are left."""
        members = [p for p in range(self.size) if p not in lost]
        offset = float(self._segment.reserve(self.control_B(len(members)))) if members[0] == self.rank else None
        with self._enter.passing_without_the_gone():
            place = self._exchange(offset, "without", _BARRIER)[members[0]]
        assert place is not None
        group = self._group(int(place), members)
        group.context, group.mesh = self.context, Mesh(data=len(members))
        return group

    def _split(self, color: int) -> Communicator:
        colors = [int(c or 0) for c in self._exchange(float(color), "split", _SPLIT)]
        members = [p for p in range(self.size) if colors[p] == color]
        offset = None
        if members[0] == self.rank:
            offset = float(self._segment.reserve(self.control_B(len(members))))
        offsets = self._exchange(offset, "split", _SPLIT)
        place = offsets[members[0]]
        assert place is not None
        return self._group(int(place), members)

    def _alone(self) -> Communicator:
        return self._group(self._segment.reserve(self.control_B(1)), [self.rank])

    def _group(self, control_offset: int, members: list[int]) -> Communicator:
        rank, size, within = members.index(self.rank), len(members), (self, members)
        return SharedCommunicator(self._segment, control_offset, rank, size, timeout_s=self.timeout_s, within=within)
