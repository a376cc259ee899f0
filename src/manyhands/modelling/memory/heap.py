"""What a process keeps of the memory that its tensors have had: glibc's malloc, replayed.

``allocator="tuned"`` (`training.allocator`) serves every block from one heap and hands nothing back, so a process
keeps what its heap ever reached, holes included. The rules, of malloc/malloc.c in glibc 2.26 and later:

    take    the smallest hole that is large enough, the lowest of equals, else the top of the heap
    align   tensors begin at multiples of 64 bytes, for which a hole must be 80 bytes larger than the block
    give    a hole joins the holes beside it, and at the top the top
    settle  after the first step something small and lasting (a cache, a log's record) stands where the heap ended, and
            what lies below is a hole that grows no more: the next step's largest blocks may not fit into it

The last rule is what makes a process larger in its later steps than in its first. Approximation: it happens once here
and none to two times in processes, so that the same run may end with one of its largest blocks more or less. Blocks
below 1 KiB are taken as they are, as they come out of bins of their own.
"""

from __future__ import annotations

import bisect

#: A chunk's header, what chunks are multiples of, and what `posix_memalign` aligns torch's tensors to.
_HEADER, _STEP, _ALIGN = 16, 16, 64
#: `_int_memalign` asks for alignment and a smallest chunk more than it needs, and gives back what is too much.
_MORE = _ALIGN + 32
#: Served by bins of equal chunks.
SMALL_B = 1024


class Heap:
    """A heap that only grows; `top` is what it has reached, less what lies at its end unused."""

    def __init__(self) -> None:
        self.top = 0
        self.reached = 0
        self._sizes: list[tuple[int, int]] = []  # holes by (size, address)
        self._holes: dict[int, int] = {}  # size by address
        self._ends: dict[int, int] = {}  # address by end
        self._blocks: dict[object, tuple[int, int]] = {}
        self._small = 0

    def take(self, block: object, size_B: int) -> None:
        """Place a block."""
        if size_B < SMALL_B:
            self._small += size_B
            self._blocks[block] = (-1, size_B)
        else:
            need = -(-(size_B + _HEADER) // _STEP) * _STEP
            at, room = self._find(need + _MORE)
            start = -(-(at + _HEADER) // _ALIGN) * _ALIGN - _HEADER
            if 0 < start - at < 32:  # no chunk is so small
                start += _ALIGN
            if start > at:
                self._open(at, start - at)
            if at + room > start + need:
                self._open(start + need, at + room - start - need)
            self._blocks[block] = start, need
        self.reached = max(self.reached, self.top + self._small)

    def give(self, block: object) -> None:
        """Free a block."""
        at, size = self._blocks.pop(block)
        if at < 0:
            self._small -= size
            return
        self._open(at, size)

    def settle(self) -> None:
        """Something small stays where the heap has ended."""
        end, at = self.reached - self._small, self.top
        if end > at:
            self.top = end + 1  # so that the hole does not join it
            self._open(at, end - at)
        self.top = end + _ALIGN
        self.reached = self.top + self._small

    def _find(self, need: int) -> tuple[int, int]:
        i = bisect.bisect_left(self._sizes, (need, -1))
        if i < len(self._sizes):
            size, at = self._sizes[i]
            self._close(at, size)
            return at, size
        at = self.top
        self.top += need
        return at, need

    def _open(self, at: int, size: int) -> None:
        if at in self._ends:
            before = self._ends[at]
            size += self._holes[before]
            self._close(before, self._holes[before])
            at = before
        after = at + size
        if after in self._holes:
            more = self._holes[after]
            self._close(after, more)
            size += more
        if at + size == self.top:
            self.top = at
            return
        bisect.insort(self._sizes, (size, at))
        self._holes[at], self._ends[at + size] = size, at

    def _close(self, at: int, size: int) -> None:
        del self._sizes[bisect.bisect_left(self._sizes, (size, at))]
        del self._holes[at], self._ends[at + size]
