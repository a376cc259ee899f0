"""A board of counters in shared memory, one a rank: all may read them, and wait until they have come far enough.

A barrier is a board on which everyone waits for everyone's same number; waiting for a number that is ``s`` lower is
stale-synchronous training, and not waiting at all is none. Counters only grow. One writer each and no lock:

    post:  words[me] ← value;  fence;  if somebody sleeps: change the release word and wake all who sleep on it
    wait:  spin a little; then  asleep[me] ← 1;  fence;  look once more;  sleep on the release word

Store–fence–load on both sides, as in `shared_barrier`: the sleeper sees the post or the poster sees the sleeper.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from manyhands.communication import futex
from manyhands.communication.communicator import Context
from manyhands.communication.segment import Region, Segment
from manyhands.communication.shared_barrier import LINE_WORDS, NAP_S, SPIN_S
from manyhands.errors import DeadlineExceeded, PeerLost

#: Further than any counter comes.
NEVER = 2**62


def board_B(size: int) -> int:
    """Bytes of a board: for each rank a line for its counter and one for its sleep, and one for the release."""
    return (2 * size + 1) * LINE_WORDS * 8


class SharedBoard:
    """See `communicator.Board`; ``names`` are the members' ranks in the world."""

    def __init__(
        self, region: Region, segment: Segment, rank: int, names: Sequence[int], context: Context, *, timeout_s: float
    ) -> None:
        self._words, self._segment = region.words(), segment
        self._rank, self._size, self._names = rank, len(names), names
        self._context, self._timeout_s = context, timeout_s
        self._others = [p for p in range(self._size) if p != rank]
        self._asleep = [(self._size + p) * LINE_WORDS for p in range(self._size)]
        self._release = 2 * self._size * LINE_WORDS
        self._release_address = region.address + self._release * 8
        self._spins = self._size <= futex.cores()

    def post(self, value: int) -> None:
        """Set this rank's counter."""
        words = self._words
        words[self._rank * LINE_WORDS] = value
        futex.fence()
        if any(words[a] for a in self._asleep):
            words[self._release] = (words[self._release] + 1) & 0xFFFFFFFF
            futex.wake(self._release_address)

    def read(self) -> list[int]:
        """All counters, in rank order; of a rank whose process is gone `NEVER`, as nobody waits for it."""
        gone = self._segment.gone
        return [NEVER if gone(self._names[p]) else self._words[p * LINE_WORDS] for p in range(self._size)]

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """The least of all counters, once those of the other ranks (or that of ``rank``) are at least ``least``."""
        self._until(functools.partial(self._behind, least, self._others if rank is None else (rank,)), doing)
        return min(self.read())

    def wait_for_one(self, least: int, doing: str) -> None:
        """Return when one of them is at least ``least``."""
        self._until(functools.partial(self._nobody, least), doing)

    def _behind(self, least: int, among: Sequence[int]) -> int | None:
        """Somebody who has not come so far."""
        behind = (p for p in among if self._words[p * LINE_WORDS] < least)
        return next((p for p in behind if not self._segment.gone(self._names[p])), None)

    def _nobody(self, least: int) -> int | None:
        """Somebody, if none has come so far."""
        counters = (self._words[p * LINE_WORDS] for p in range(self._size))
        return None if max(counters) >= least else (self._others or [self._rank])[0]

    def _until(self, missing: Callable[[], int | None], doing: str) -> None:
        """Return when ``missing`` finds nobody."""
        if missing() is None:
            return
        t0 = time.perf_counter()
        words, mine = self._words, self._asleep[self._rank]
        try:
            while self._spins and time.perf_counter() - t0 < SPIN_S:
                if missing() is None:
                    return
            while True:
                words[mine] = 1
                futex.fence()
                seen = words[self._release]
                behind = missing()
                if behind is None:
                    return
                futex.wait(self._release_address, seen, NAP_S)
                self._check(behind, missing, time.perf_counter() - t0, doing)
        finally:
            words[mine] = 0
            self._context.counters.wait_s += time.perf_counter() - t0

    def _check(self, behind: int, missing: Callable[[], int | None], waited_s: float, doing: str) -> None:
        me, step, failed = self._names[self._rank], self._context.step, self._segment.failed
        if failed is not None and failed != me and missing() is not None:
            raise PeerLost(me, failed, step, doing)
        if waited_s > self._timeout_s and missing() is not None:
            raise DeadlineExceeded(me, f"rank {self._names[behind]}", step, waited_s, doing)
