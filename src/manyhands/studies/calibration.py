"""Machine noise watched: a short loop on every core at once, run between a study's runs.

    disturbance of a run = the slower of the loops before and after it / the quickest loop of the study so far

A core that has nothing else to do repeats the loop to within a few percent; one that is shared with another busy
process takes twice as long. A run beyond `BOUND` is repeated once, and marked as noisy when that was no better: see
`manyhands.studies.running`.

The quickest loop is kept in the study's folder, so that a study that goes on compares with the same.

The loop sees what keeps cores busy around a run. It does not see a disturbance that begins and ends within the run, nor
one that lasts for the whole study, as it has nothing quieter to compare that with; the load average of a row tells it.

Cost: some 20 ms a run on an idle machine, as the loop after a quiet run is the one before the next.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

from manyhands.communication import futex
from manyhands.communication.quota import own_quota

#: Beyond this a run is repeated. A free core spreads by some 5 %, one that is shared with another process takes 2
#: (measured on a virtual machine of 2 cores); 1.5 lies between, and a step time would be wrong by a third there.
BOUND = 1.5
#: One product of this size takes some 0.35 ms at 10^11 operations a second; torch lets go of Python's lock meanwhile.
SIZE, PRODUCTS = 256, 10
#: Of so many stretches the median counts, so that one interruption by the system does not.
STRETCHES = 5
#: Loops at a study's start, as the first run has no quicker one before it to be compared with.
FIRST = 5


def watched_cores() -> int:
    """All that this process may keep busy all the time: the quota rounded down, as a part of a core would be stopped
    now and then, and look like noise.
    """
    return max(1, min(futex.cores(), int(own_quota() or futex.cores())))


def loop_s() -> float:
    """Seconds of a fixed piece of work on the slowest core, all cores working; torch's threads are left as found."""
    cores = watched_cores()
    taken = [0.0] * cores
    ready = threading.Barrier(cores)
    factor = torch.full((SIZE, SIZE), 1.0 / SIZE)

    def work(core: int) -> None:
        product, stretches = torch.empty_like(factor), []
        torch.mm(factor, factor, out=product)
        ready.wait()
        for _ in range(STRETCHES):
            began = time.perf_counter()
            for _ in range(PRODUCTS):
                torch.mm(factor, factor, out=product)
            stretches.append(time.perf_counter() - began)
        taken[core] = statistics.median(stretches)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of each of ours: new threads take it over
    workers = [threading.Thread(target=work, args=(core,), daemon=True) for core in range(cores)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    return max(taken)


class Calibration:
    """Remembers the quickest loop of a study and the one just done; ``quickest_s`` is what it was when it was left."""

    def __init__(self, loop: Callable[[], float] | None = None, *, quickest_s: float | None = None) -> None:
        self._loop = loop or loop_s
        self.last_s = min(self._loop() for _ in range(FIRST))
        self.quickest_s = self.last_s if quickest_s is None else min(self.last_s, quickest_s)

    def begins(self) -> None:
        """A run begins. The loop after the one before it will do, unless that was disturbed: it may be over."""
        if self.last_s > BOUND * self.quickest_s:
            self.last_s = self._loop()

    def ends(self) -> float:
        """It has ended; how disturbed it was, by the worse of the loops before and after it."""
        before, self.last_s = self.last_s, self._loop()
        self.quickest_s = min(self.quickest_s, self.last_s)
        return max(before, self.last_s) / self.quickest_s
