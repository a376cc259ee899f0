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

import time
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyhands.communication.communicator import DONE, Communicator, Received, Work
from manyhands.communication.mailbox import Mailbox, bytes_needed
from manyhands.communication.reduction import coefficients, reduce_into, slices
from manyhands.communication.segment import PAGE_B, Region, Segment
from manyhands.communication.shared_barrier import LINE_WORDS, SharedBarrier, words_needed

#: Bytes of one staging buffer of one rank; larger tensors go through in chunks.
STAGING_B = 4 * 2**20
#: Up to this many bytes every rank reduces all of a staged tensor itself, which saves a barrier.
ONE_SHOT_B = 16 * 1024
#: Slots are this much more than whole pages apart: equal offsets modulo the page make a store to one slot look like
#: a conflict with a load from another ("4K aliasing", Intel Optimization Manual).
SLOT_SHIFT_B = 21 * 64


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
    mine: Tensor
    slots: list[Tensor]
    slices: list[list[Tensor]]  # [slice][rank]


class _Allocation(NamedTuple):
    first: int  # address of this rank's first byte
    last: int
    common: bool
    region: Region
    stride_B: int


class SharedCommunicator(Communicator):
    """One process's end of a group on one host."""

    transport: ClassVar[str] = "shared"
    shares_memory: ClassVar[bool] = True
    counts_moved: ClassVar[bool] = True

    def __init__(self, segment: Segment, control_offset: int, rank: int, size: int, *, timeout_s: float = 60.0) -> None:
        self._segment = segment
        self._layout = _Control.of(size)
        self._control = segment.map(control_offset, self._layout.end)
        self._doubles = self._control.doubles()
        self._words = self._control.words()
        super().__init__(rank, size, timeout_s=timeout_s)
        self._enter = SharedBarrier(self._control, segment, rank, size, timeout_s=timeout_s)
        self._mailbox: Mailbox | None = None
        self._mail_region = (control_offset + self._layout.mailbox, bytes_needed(size))
        self._turn = 0  # which of the two exchange words is next
        self._staging_turn = 0
        self._allocations: list[_Allocation] = []
        self._symmetric: dict[tuple[int, int, torch.dtype], _Symmetric | None] = {}
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
        self._segment.report_failure(self.rank)

    # -- state that others may see -----------------------------------------------------------------------------

    def _publish_step(self, step: int | None) -> None:
        self._words[self._layout.steps // 8 + self.rank] = 0 if step is None else step + 1

    def _meet(self, doing: str) -> None:
        mailbox = self._mailbox
        self._enter(self.context.step, doing, mailbox.progress if mailbox is not None else None)

    def _exchange(self, value: float | None, doing: str) -> list[float | None]:
        """Everybody's number (None travels as NaN); one barrier."""
        self._turn ^= 1
        base = self._layout.exchange // 8 + self._turn * self.size * LINE_WORDS
        doubles = self._doubles
        doubles[base + self.rank * LINE_WORDS] = float("nan") if value is None else value
        self._meet(doing)
        numbers = [doubles[base + p * LINE_WORDS] for p in range(self.size)]
        return [None if x != x else x for x in numbers]

    # -- memory ------------------------------------------------------------------------------------------------

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        used_B = max(numel * dtype.itemsize, 1)
        stride_B = 0 if common else -(-used_B // PAGE_B) * PAGE_B + SLOT_SHIFT_B
        total_B = used_B + stride_B * (self.size - 1)
        region = self._reserve(total_B, "allocate")
        start = stride_B * self.rank
        first = region.address + start
        self._allocations.append(_Allocation(first, first + used_B, common, region, stride_B))
        self._symmetric.clear()
        return region.tensor(start, numel, dtype)

    def _reserve(self, size_B: int, doing: str) -> Region:
        offset = float(self._segment.reserve(size_B)) if self.rank == 0 else None
        agreed = self._exchange(offset, doing)[0]
        assert agreed is not None
        return self._segment.map(int(agreed), size_B)

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
        found = None
        end = key[0] + x.numel() * x.element_size()
        for a in self._allocations:
            if a.first <= key[0] and end <= a.last and x.numel():
                at = key[0] - a.first
                slots = [a.region.tensor(a.stride_B * p + at, x.numel(), x.dtype) for p in range(self.size)]
                bounds = slices(x.numel(), self.size)
                found = _Symmetric(a.common, slots[self.rank], slots, [[s[lo:hi] for s in slots] for lo, hi in bounds])
        self._symmetric[key] = found
        return found

    def _stage(self, dtype: torch.dtype, numel: int) -> list[Tensor]:
        """Everybody's staging buffer of this turn, as ``numel`` elements."""
        if self._staging is None:
            self._staging = self._reserve(2 * self.size * (STAGING_B + SLOT_SHIFT_B), "staging")
        step_B = STAGING_B + SLOT_SHIFT_B
        self._staging_turn ^= 1
        base = self._staging_turn * self.size * step_B
        return [self._staging.tensor(base + p * step_B, numel, dtype) for p in range(self.size)]

    # -- collectives -------------------------------------------------------------------------------------------

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        if symmetric is not None and not symmetric.common and x.numel() * x.element_size() > ONE_SHOT_B:
            factors = coefficients(self._exchange(weight, "all_reduce"))
            self._reduce_everywhere(symmetric.slices[self.rank], factors)
            self._meet("all_reduce")
            self.counters.moved_B += (self.size - 1) * symmetric.slices[self.rank][0].nbytes
        else:
            self._staged_all_reduce(x, weight)
        self._account(t0, waited)
        return DONE

    def _reduce_everywhere(self, parts: list[Tensor], factors: list[float] | None) -> None:
        mine = parts[self.rank]
        reduce_into(mine, parts, factors)
        for p, part in enumerate(parts):
            if p != self.rank:
                part.copy_(mine)

    def _staged_all_reduce(self, x: Tensor, weight: float | None) -> None:
        chunk = STAGING_B // x.element_size()
        for at in range(0, max(x.numel(), 1), chunk):
            part = x[at : at + chunk]
            stage = self._stage(x.dtype, part.numel())
            stage[self.rank].copy_(part)
            factors = coefficients(self._exchange(weight, "all_reduce"))
            if part.nbytes <= ONE_SHOT_B:
                reduce_into(part, [s if p != self.rank else part for p, s in enumerate(stage)], factors)
            else:
                lo, hi = slices(part.numel(), self.size)[self.rank]
                self._reduce_everywhere([s[lo:hi] for s in stage], factors)
                self._meet("all_reduce")
                part.copy_(stage[self.rank])
            self.counters.moved_B += part.nbytes

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        if symmetric is not None and not symmetric.common:
            factors = coefficients(self._exchange(weight, "reduce_scatter"))
            parts = symmetric.slices[self.rank]
            reduce_into(parts[self.rank], parts, factors)
        else:
            self._staged_all_reduce(x, weight)
        self._account(t0, waited)

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        symmetric = self._find(x)
        if symmetric is not None and symmetric.common:
            self._meet("all_gather")
        elif symmetric is not None:
            self._meet("all_gather")
            for p, (lo, hi) in enumerate(bounds):
                if p != self.rank and hi > lo:
                    x[lo:hi].copy_(symmetric.slots[p][lo:hi])
            self._meet("all_gather")
        else:
            self._staged_all_gather(x, bounds)
        self._account(t0, waited)
        return DONE

    def _staged_all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        chunk = STAGING_B // x.element_size()
        longest = max(hi - lo for lo, hi in bounds)
        for at in range(0, max(longest, 1), chunk):
            stage = self._stage(x.dtype, min(chunk, longest - at))
            ranges = [(min(lo + at, hi), min(lo + at + chunk, hi)) for lo, hi in bounds]
            lo, hi = ranges[self.rank]
            stage[self.rank][: hi - lo].copy_(x[lo:hi])
            self._meet("all_gather")
            for p, (lo, hi) in enumerate(ranges):
                if p != self.rank:
                    x[lo:hi].copy_(stage[p][: hi - lo])
            self.counters.moved_B += (hi - lo) * x.element_size()

    def _all_to_all(self, x: Tensor) -> Tensor:
        t0, waited = time.perf_counter(), self._enter.wait_s
        result = torch.empty_like(x)
        outgoing, incoming = x.view(self.size, -1), result.view(self.size, -1)
        chunk = max(STAGING_B // x.element_size() // self.size, 1)
        for at in range(0, max(outgoing.shape[1], 1), chunk):
            part = outgoing[:, at : at + chunk]
            stage = [s.view(self.size, -1) for s in self._stage(x.dtype, part.numel())]
            stage[self.rank].copy_(part)
            self._meet("all_to_all")
            for p in range(self.size):
                incoming[p, at : at + chunk].copy_(stage[p][self.rank])
            self.counters.moved_B += part.nbytes
        self._account(t0, waited)
        return result

    def _broadcast(self, x: Tensor, root: int) -> Work:
        t0, waited = time.perf_counter(), self._enter.wait_s
        if self.is_common(x):
            self._meet("broadcast")
            self._account(t0, waited)
            return DONE
        chunk = STAGING_B // x.element_size()
        for at in range(0, max(x.numel(), 1), chunk):
            part = x[at : at + chunk]
            stage = self._stage(x.dtype, part.numel())[root]
            if self.rank == root:
                stage.copy_(part)
                self.counters.moved_B += part.nbytes
            self._meet("broadcast")
            if self.rank != root:
                part.copy_(stage)
        self._account(t0, waited)
        return DONE

    def _barrier(self) -> None:
        t0, waited = time.perf_counter(), self._enter.wait_s
        self._meet("barrier")
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
            self._mailbox = Mailbox(region, self._segment, self.rank, self.size, timeout_s=self.timeout_s)
        return self._mailbox

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        t0 = time.perf_counter()
        pending = self._mail.send(x, to, tag)
        self.counters.moved_B += x.nbytes
        self.counters.communicate_s += time.perf_counter() - t0
        return DONE if pending is None else pending

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        t0, waited = time.perf_counter(), self._mail.wait_s
        source = self._mail.recv(like, frm, tag, self.step)
        waited = self._mail.wait_s - waited
        self.counters.wait_s += waited
        self.counters.communicate_s += time.perf_counter() - t0 - waited
        return Received(source, like)

    # -- groups ------------------------------------------------------------------------------------------------

    def _split(self, color: int) -> Communicator:
        colors = [int(c or 0) for c in self._exchange(float(color), "split")]
        members = [p for p in range(self.size) if colors[p] == color]
        offset = None
        if members[0] == self.rank:
            offset = float(self._segment.reserve(self.control_B(len(members))))
        offsets = self._exchange(offset, "split")
        place = offsets[members[0]]
        assert place is not None
        return SharedCommunicator(
            self._segment, int(place), members.index(self.rank), len(members), timeout_s=self.timeout_s
        )
