"""The state a host is in: how long a cache line takes from one core to another.

Two processes pass a number to and fro in shared memory for a millisecond. Under a hypervisor the two cores of a machine
may lie on one physical core or on two, and that changes within tens of seconds: 0.24 or 0.89 µs were seen, nothing
between. Steps differ by up to 50 % between the states; a matrix product does not see it, this does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from manyhands.errors import CommunicationError, WorkerFailed
from manyhands.training import environment
from manyhands.training.member import Member
from manyhands.training.team import Team, team

JOB = f"{__name__}:ping_pong"
SECONDS, TURNS = 0.001, 20
#: Between two sockets a line takes less; what took more was a process that had lost its core.
SLOWEST_S = 3e-6
#: A try that takes longer was interrupted.
PATIENCE_S = 0.02
#: The best of so many: a process that is scheduled away in the middle has nothing to say of cache lines.
TRIES = 3
#: Between the two states seen lies a factor of 3.7; this is its root, rounded.
FLIP = 1.9
DEADLINE_S = 60.0
#: Words of a cache line, and which word is which, a line each.
_LINE = 8
_ASKED, _ANSWERED, _OVER = 0, _LINE, 2 * _LINE


class Probe:
    """A standing pair of processes; a context manager. ``seconds()`` asks them."""

    def __init__(self) -> None:
        self._team: Team | None = None
        #: All answers, in order.
        self.seen_s: list[float] = []

    def __enter__(self) -> Probe:
        if environment.shared_memory_works():
            self._team = team("shared", 2, threads=1, timeout_s=DEADLINE_S, allocator="plain")
        return self

    def __exit__(self, *_: object) -> None:
        if self._team is not None:
            self._team.close()

    def seconds(self) -> float | None:
        """One way of a cache line, now; None where processes share no memory, or seldom run at once."""
        if self._team is None:
            return None
        try:
            found: float = self._team.run(JOB, deadline_s=DEADLINE_S)[0]
        except (CommunicationError, WorkerFailed):  # it is a witness and not the case
            self._team.close()
            self._team = None
            return None
        if found:
            self.seen_s.append(found)
        return found or None


def flipped(before_s: float | None, after_s: float | None) -> bool:
    """Whether the host has changed its state between two probes."""
    return bool(before_s and after_s) and abs(math.log(before_s / after_s)) > math.log(FLIP)  # type: ignore[operator]


def usual(seen_s: Sequence[float]) -> float | None:
    """The state that the host was in most of the time."""
    return statistics.median(seen_s) if seen_s else None


def ping_pong(member: Member) -> float:
    """Both ranks' part; the seconds of one way, of the best try, 0 if none says anything.

    Rank 0 counts and says which tries are over, rank 1 answers. On a machine so busy that the two seldom run at once a
    turn takes milliseconds and says nothing, so a try ends after `PATIENCE_S`.
    """
    comm = member.comm
    words = memoryview(comm.allocate(3 * _LINE, torch.int64, common=True).numpy())  # type: ignore[arg-type]
    best, turn = math.inf, 0
    for attempt in range(1, TRIES + 1):
        comm.barrier()
        if comm.rank == 1:
            turn = _answer(words, turn, attempt)
            continue
        began, before, now = time.perf_counter(), turn, 0.0
        while now - began < SECONDS and _ask(words, turn, began + PATIENCE_S):
            turn += TURNS
            now = time.perf_counter()
        if SECONDS <= now - began < PATIENCE_S:
            best = min(best, (now - began) / (turn - before) / 2)
        turn = words[_ASKED]
        words[_OVER] = attempt
    return best if best < SLOWEST_S else 0.0


def _ask(words: memoryview, turn: int, until: float) -> bool:
    """Some turns; whether all of them were answered in time."""
    for asked in range(turn + 1, turn + 1 + TURNS):
        words[_ASKED] = asked
        looks = 0
        while words[_ANSWERED] != asked:
            looks += 1
            if looks > 10_000:
                looks = 0
                if time.perf_counter() > until:
                    return False
    return True


def _answer(words: memoryview, last: int, attempt: int) -> int:
    while words[_OVER] < attempt:
        if (asked := words[_ASKED]) > last:
            words[_ANSWERED] = last = asked
    return last
