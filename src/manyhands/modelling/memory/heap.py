"""What a process keeps of the memory that its tensors have had: glibc's malloc, replayed.

``allocator="tuned"`` (`training.allocator`) serves every block from one heap and hands nothing back, so a process
keeps what its heap ever reached, holes included. The rules, of malloc/malloc.c in glibc 2.26 to 2.37:

    take    the smallest hole that is large enough, the lowest of equals, else the top of the heap
    align   tensors begin at multiples of 64 bytes; for that, 112 bytes more are asked for than the block wants, and
            what is before and behind it is given back: a leader and a trailer of 32 to 112 bytes
    cache   the first seven of a size that are given back stay in the thread's cache and join no hole. So a block that
            has gone leaves a hole that is too small for the next one like it, which goes elsewhere
    give    a hole joins the holes beside it, and at the top the top
    settle  after the first step something small and lasting (a cache, a log's record) stands where the heap ended, and
            what lies below is a hole that grows no more: the next step's largest blocks may not fit into it

The last two make a process larger in its later steps than in its first. Approximation: in a process leaders and
trailers also serve small blocks, which come and go and leave some of them elsewhere, and what lasts stands in several
places; so the same run may end with one of its largest blocks more or less.
"""

from __future__ import annotations

import bisect
from collections import Counter

#: A chunk's header, what chunks are multiples of, and what `posix_memalign` aligns torch's tensors to.
_HEADER, _STEP, _ALIGN = 16, 16, 64
#: The smallest chunk. What is left of a hole and smaller stays with the block, and so does a trailer of this size.
_LEAST = 32
#: `_int_memalign` asks for alignment and a smallest chunk more than it needs, in whole steps.
_MORE = _ALIGN + _LEAST + _STEP
#: TCACHE_FILL_COUNT: chunks of a size in a thread's cache.
_CACHED = 7


class Heap:
    """A heap that only grows; `top` is what it has reached, less what lies at its end unused."""

    def __init__(self) -> None:
        self.top = 0
        self.reached = 0
        self._sizes: list[tuple[int, int]] = []  # holes by (size, address)
        self._holes: dict[int, int] = {}  # size by address
        self._ends: dict[int, int] = {}  # address by end
        self._blocks: dict[object, tuple[int, int]] = {}
        self._cached: Counter[int] = Counter()  # how many, by size

    def take(self, block: object, size_B: int) -> None:
        """Place a block."""
        need = -(-(size_B + _HEADER // 2) // _STEP) * _STEP  # the second half of a header is the block's before
        at, room = self._find(need + _MORE)
        if room >= need + _MORE + _LEAST:
            self._open(at + need + _MORE, room - need - _MORE)
            room = need + _MORE
        start = -(-(at + _HEADER) // _ALIGN) * _ALIGN - _HEADER
        if 0 < start - at < _LEAST:
            start += _ALIGN
        if start > at:
            self._spare(at, start - at)
        if (left := at + room - start - need) > _LEAST:
            self._spare(start + need, left)
        else:
            need += left
        self._blocks[block] = start, need
        self.reached = max(self.reached, self.top)

    def give(self, block: object) -> None:
        """Free a block."""
        self._open(*self._blocks.pop(block))

    def settle(self) -> None:
        """Something small stays where the heap has ended."""
        end, at = self.reached, self.top
        if end > at:
            self.top = end + 1  # so that the hole does not join it
            self._open(at, end - at)
        self.top = self.reached = end + _ALIGN

    def _spare(self, at: int, size: int) -> None:
        """A leader or a trailer."""
        if self._cached[size] < _CACHED:
            self._cached[size] += 1
        else:
            self._open(at, size)

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
