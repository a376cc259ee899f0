"""A barrier of per-rank sequence words in shared memory: spin while cores are free, then sleep on a futex.

Every rank counts its own arrivals in a word of its own, so no atomic read-modify-write is needed (Python has none):

    arrive:  what[me] ← what this rank came for;  words[me] ← n;  fence
    pass:    when words[p] ≥ n for every p;  raise unless what[p] is the same for every p

A rank that finds everybody arrived passes, and wakes the sleepers, if any. A rank that does not either spins (as many
cores as ranks: a peer is working on its own core and will be here in a moment) or announces that it sleeps, fences,
looks once more, and sleeps on the release word. Store–fence–load on both sides (Dekker) means that either the sleeper
sees the last arrival or the last arrival sees the sleeper. Mellor-Crummey & Scott (1991) survey the alternatives;
their central counter needs an atomic decrement.

What a rank came for is a word of one's own, too, on the same cache line; two of them are used in turn, since a rank
may arrive at the next barrier while another still compares.

Cost for 2 ranks on 2 cores: about 2 µs; for 8 ranks on 2 cores: three to five context switches a core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from manyhands.communication import futex
from manyhands.communication.segment import Region, Segment
from manyhands.errors import CommunicationError, DeadlineExceeded, PeerLost

LINE_WORDS = 8  # 64 bytes: one word per cache line, so that ranks do not disturb each other
#: A peer with a core of its own is here within this time, or is busy for so long that a wake-up (about 50 µs) does not
#: matter. Measured beside one busy process on 2 cores, mean step of the perceptron at batch 50: 16.7 ms with 2 ms of
#: spinning, 2.8 ms with 0.2 ms; left alone, 0.05 ms and less made the median worse.
SPIN_S = 0.0002
#: A wait this long is looked into: the peer may sit on the very core that this rank spins on, where it cannot arrive
#: before the spinning ends. The kernel leaves two such processes together for a second and more (seen: 229 µs a barrier
#: instead of 5), so the one that spins moves away.
SUSPICIOUS_S = 0.00002
#: A sleeper looks up this often, to notice failed peers and its deadline.
NAP_S = 0.05


def words_needed(size: int) -> int:
    """Words of the control block: a line per rank for its arrivals, its sleep and its core, one release line."""
    return (3 * size + 1) * LINE_WORDS


class SharedBarrier:
    """A barrier on the control words at the start of ``region``; ``names`` are the members' ranks in the world."""

    def __init__(
        self,
        region: Region,
        segment: Segment,
        rank: int,
        names: Sequence[int],
        *,
        timeout_s: float,
        describe: Callable[[int], str] = str,
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, (size := len(names)), timeout_s
        self._names, self._describe = names, describe
        self._segment = segment
        self._words = region.words()
        self._count = 0
        self._mine = rank * LINE_WORDS
        self._peers = [p * LINE_WORDS for p in range(size) if p != rank]
        self._asleep = [(size + p) * LINE_WORDS for p in range(size)]
        self._cores = 2 * size * LINE_WORDS  # rank's core at + its arrival word's place
        self._release = 3 * size * LINE_WORDS
        self._release_address = region.address + self._release * 8
        self.spins = size <= futex.cores()
        self._arrived_fence = futex.fence if self.spins else futex.give_way
        self.wait_s = 0.0
        self._passes_without_the_gone = False

    @contextmanager
    def passing_without_the_gone(self) -> Iterator[None]:
        """Inside, ranks that the launcher has said are gone are passed over; afterwards, who waits for one is told.

        So one that dies inside, too late for the others to agree that it is lost, is in no later exchange with what it
        left there of an earlier one.
        """
        peers, self._passes_without_the_gone = self._peers, True
        try:
            yield
        finally:
            self._peers, self._passes_without_the_gone = peers, False

    def __call__(self, what: int, step: int | None, doing: str, meanwhile: Callable[[], bool] | None = None) -> None:
        """Return when all ranks have called it as often as this one, with the same number ``what``.

        ``meanwhile`` is called while waiting; it returns whether it still has something to do.
        """
        words, n = self._words, self._count + 1
        self._count = n
        compare = 1 + (n & 1)
        words[self._mine + compare] = what
        words[self._mine] = n
        words[self._cores + self._mine] = self._arrived_fence()
        for p in self._peers:
            if words[p] < n:
                break
        else:
            self._wake_sleepers()
            for p in self._peers:
                if words[p + compare] != what:
                    raise self._mismatch(p, what, words[p + compare])
            return
        t0 = time.perf_counter()
        self._wait(n, t0, step, doing, meanwhile)
        self.wait_s += time.perf_counter() - t0
        for p in self._peers:
            if words[p + compare] != what:
                raise self._mismatch(p, what, words[p + compare])

    def _mismatch(self, p: int, mine: int, theirs: int) -> CommunicationError:
        return CommunicationError(
            f"rank {self._names[self.rank]} is in {self._describe(mine)}, but rank {self._names[p // LINE_WORDS]} in "
            f"{self._describe(theirs)}: all ranks of a group call the same collectives in the same order, with equal "
            "shapes and dtypes"
        )

    def _keep_apart(self, missing: list[int]) -> None:
        """If a missing peer was last seen on the core this rank occupies, leave it to the peer."""
        here = futex.fence()
        if any(self._words[self._cores + p] == here for p in missing):
            futex.leave_core(here)

    def _wake_sleepers(self) -> None:
        words = self._words
        for a in self._asleep:
            if words[a]:
                words[self._release] = (words[self._release] + 1) & 0xFFFFFFFF
                futex.wake(self._release_address)
                return

    def _wait(self, n: int, t0: float, step: int | None, doing: str, meanwhile: Callable[[], bool] | None) -> None:
        words, missing = self._words, list(self._peers)
        clock = time.perf_counter
        if self.spins:
            end, suspicious = t0 + SPIN_S, t0 + SUSPICIOUS_S
            while True:
                for _ in range(20):
                    while words[missing[-1]] >= n:
                        missing.pop()
                        if not missing:
                            return
                now = clock()
                if now > end:
                    break
                if now > suspicious:
                    suspicious = end
                    self._keep_apart(missing)
                if meanwhile is not None and not meanwhile():
                    meanwhile = None
        mine = self._asleep[self.rank]
        nap = NAP_S
        while True:
            words[mine] = n
            futex.fence()
            seen = words[self._release]
            missing = [p for p in missing if words[p] < n]
            if not missing:
                words[mine] = 0
                return
            if meanwhile is not None:
                if meanwhile():
                    nap = 0.001
                else:
                    meanwhile, nap = None, NAP_S
            futex.wait(self._release_address, seen, nap)
            failed, me = self._segment.failed, self._names[self.rank]
            gone = [p for p in missing if self._segment.gone(self._names[p // LINE_WORDS])]
            if gone and self._passes_without_the_gone:
                self._peers = [p for p in self._peers if p not in gone]
                missing = [p for p in missing if p not in gone]
            elif gone:
                words[mine] = 0
                raise PeerLost(me, self._names[gone[0] // LINE_WORDS], step, doing)
            if failed is not None and failed != me and any(words[p] < n for p in missing):
                words[mine] = 0
                raise PeerLost(me, failed, step, doing)
            if clock() - t0 > self.timeout_s:
                late = [self._names[p // LINE_WORDS] for p in missing if words[p] < n]
                if late:
                    words[mine] = 0
                    who = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, sorted(late)))}"
                    raise DeadlineExceeded(me, who, step, clock() - t0, doing)
