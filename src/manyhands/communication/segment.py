"""One anonymous memory file that all workers of a host map: no name, no port, nothing left after ``kill -9``.

The launcher makes it with ``memfd_create`` and hands the descriptor down. It grows by regions: one member of a group
reserves a region (bump allocation under a record lock) and the others map it by its offset. Pages cost memory only
once touched, so generous regions are free. It shrinks as a stack does: whoever knows that nobody maps anything beyond
an offset hands back all that lies there (`truncate`).

Header words (64 bit): 0 = first free byte, 1 = rank + 1 of the first rank known to have failed (0 = all is well),
2 = how many ranks are gone without ending the run, from 8 on a word for each rank, 1 if it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import threading
import weakref

import torch
from torch import Tensor

PAGE_B = mmap.PAGESIZE
_FREE, _FAILED, _GONE, _EACH = 0, 1, 2, 8
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

if sys.platform == "linux":
    _fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


#: A record lock is a process's: it keeps other processes out, and not the threads of this one.
_THREADS = threading.Lock()


class Segment:
    """A process's view of the memory file behind ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._header = mmap.mmap(fd, PAGE_B)
        self._words = memoryview(self._header).cast("Q")
        self._mapped: list[tuple[int, weakref.ref[mmap.mmap]]] = []  # where each region that we mapped ends

    @classmethod
    def create(cls) -> Segment:
        """A fresh, empty segment; the descriptor is inherited only where it is handed down."""
        fd = os.memfd_create("manyhands", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_B)
        segment = cls(fd)
        segment._words[_FREE] = PAGE_B
        return segment

    def reserve(self, size_B: int) -> int:
        """Reserve ``size_B`` zeroed bytes; returns their page-aligned offset. Any process may call it at any time."""
        with _THREADS:
            fcntl.lockf(self.fd, fcntl.LOCK_EX, 1)
            try:
                offset = self._words[_FREE]
                end = offset + -(-max(size_B, 1) // PAGE_B) * PAGE_B
                if os.fstat(self.fd).st_size < end:
                    os.ftruncate(self.fd, end)
                self._words[_FREE] = end
                return offset
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1)

    def map(self, offset: int, size_B: int) -> Region:
        """Map ``size_B`` bytes from ``offset`` on; every process that maps them sees the same bytes."""
        memory = mmap.mmap(self.fd, -(-max(size_B, 1) // PAGE_B) * PAGE_B, offset=offset)
        self._mapped.append((offset + len(memory), weakref.ref(memory)))
        return Region(memory, offset, size_B)

    @property
    def end(self) -> int:
        """Where the next region will begin."""
        return self._words[_FREE]

    def mapped_until(self, offset: int) -> int:
        """Where the last region ends that lives in this process, tensors on it included; at least ``offset``."""
        self._mapped = [(end, memory) for end, memory in self._mapped if memory() is not None]
        return max([offset, *(end for end, _ in self._mapped)])

    def truncate(self, offset: int) -> None:
        """Give everything from ``offset`` on back to the system. No process may map any of it any more."""
        end, self._words[_FREE] = self._words[_FREE], offset
        # Not ftruncate: it would make a mapping that somebody forgot about deadly. What a kernel refuses stays in use.
        if end > offset and _fallocate(self.fd, _KEEP_SIZE | _PUNCH_HOLE, offset, end - offset) != 0:
            self._words[_FREE] = end

    @property
    def failed(self) -> int | None:
        """The rank that failed first, if one did."""
        return self._words[_FAILED] - 1 if self._words[_FAILED] else None

    def report_failure(self, rank: int) -> None:
        """Tell everyone that ``rank`` has failed; the first report stays."""
        if not self._words[_FAILED]:
            self._words[_FAILED] = rank + 1

    def report_gone(self, rank: int) -> None:
        """Tell everyone that ``rank``'s process has died, and that the others go on; the launcher's word."""
        if _EACH + rank < len(self._words) and not self._words[_EACH + rank]:
            self._words[_EACH + rank] = 1
            self._words[_GONE] += 1

    def gone(self, rank: int) -> bool:
        """Whether that has been said of ``rank``."""
        return bool(self._words[_GONE]) and bool(self._words[_EACH + rank])

    def close(self) -> None:
        """Unmap the header and close the descriptor; regions live as long as their tensors."""
        if self.fd >= 0:
            self._words.release()
            self._header.close()
            os.close(self.fd)
            self.fd = -1


class Region:
    """Mapped bytes, as tensors, as 64-bit words and by address."""

    def __init__(self, memory: mmap.mmap, offset: int, size_B: int) -> None:
        self.memory = memory
        self.offset = offset
        self.size_B = size_B
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, count=max(size_B, 1))
        self.address = self.bytes.data_ptr()

    def words(self) -> memoryview:
        """The region as unsigned 64-bit words; one word is loaded and stored in one piece."""
        return memoryview(self.memory).cast("Q")

    def doubles(self) -> memoryview[float]:
        """The region as float64."""
        return memoryview(self.memory).cast("d")

    def tensor(self, offset_B: int, numel: int, dtype: torch.dtype) -> Tensor:
        """``numel`` elements at ``offset_B``."""
        return self.bytes[offset_B : offset_B + numel * dtype.itemsize].view(dtype)
