"""How quick this machine is now, beside what it was when its table was filled.

A host changes its speed by half: clocks, other guests, which core lies beside which. All operators of a table are from
one time. So the first networks of the table are trained again for a moment, in as many processes and threads, and the
geometric mean of *now / then* multiplies what the table tells. ``then`` stands in the table, rows of the phase
``gauge``: the same bursts of the same networks, in the same rounds as all operators.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence

from manyhands.cluster.measured import OperatorTime
from manyhands.errors import CommunicationError, WorkerFailed
from manyhands.modelling.operators.networks import NETWORKS, Cell, cells
from manyhands.modelling.operators.table import GAUGE
from manyhands.modelling.operators.trained import Training
from manyhands.training import environment
from manyhands.training.member import Member
from manyhands.training.team import team

#: A perceptron, a convolutional net and a transformer.
GAUGES = cells(NETWORKS[:3])[:3]
#: Of all of them together, when a prediction asks; and of each in each round that fills a table.
SECONDS, BURST_S = 0.3, 0.03
#: Steps of a burst, however long they take, of which the first is not counted: caches hold another's.
LEAST_STEPS = 3
#: Before the first burst, so that the allocator and the convolutions' kernels settle.
WARM_UP = 3
DEADLINE_S = 60.0


def row(cell: Cell, seconds: float, spread: float, *, threads: int, co_runners: int) -> OperatorTime:
    """A gauge's step as a table has it."""
    return OperatorTime(
        name=cell.network.model, phase=GAUGE, operands=(), results=(), options=f"batch {cell.batch}, {cell.optimizer}",
        dtype="", threads=threads, co_runners=co_runners, seconds=seconds, spread=spread,
    )  # fmt: skip


def burst(training: Training, seconds: float) -> float:
    """What a step's gradients take in one go of so many ``seconds``, with nothing between two steps: the median."""
    end, took = time.perf_counter() + seconds, list[float]()
    while len(took) < LEAST_STEPS or time.perf_counter() < end:
        took.append(training.compute())
    return statistics.median(took[1:])


class Gauge:
    """In a worker: the gauges that a table has with so many threads and co-runners."""

    def __init__(self, table: Sequence[OperatorTime], threads: int, co_runners: int) -> None:
        then = {
            (x.name, x.options): x.seconds
            for x in table
            if (x.phase, x.threads, x.co_runners) == (GAUGE, threads, co_runners)
        }
        self._then = [s for cell in GAUGES if (s := then.get(_name(cell)))]
        self._running = [Training(cell) for cell in GAUGES if _name(cell) in then]
        for each in self._running:
            for _ in range(WARM_UP):
                each.compute()

    def slower(self, seconds: float) -> float:
        """Now / then, of some ``seconds``; 1 where the table has no gauge."""
        if not self._running:
            return 1.0
        each_s = seconds / len(self._running)
        pairs = zip(self._then, self._running, strict=True)
        return math.exp(statistics.fmean(math.log(burst(each, each_s) / then_s) for then_s, each in pairs))


def _name(cell: Cell) -> tuple[str, str]:
    found = row(cell, 0.0, 0.0, threads=1, co_runners=1)
    return found.name, found.options


@functools.lru_cache(maxsize=8)
def slower(table: tuple[OperatorTime, ...], threads: int, co_runners: int) -> float:
    """Of this machine, once in a process: the median of all co-runners; 1 where it cannot be told."""
    then = tuple(x for x in table if x.phase == GAUGE)
    if not then:
        return 1.0
    transport = "shared" if environment.shared_memory_works() else "gloo"
    try:
        with team(transport, co_runners, threads=threads) as workers:
            said = [[x.name, x.options, x.seconds] for x in then if (x.threads, x.co_runners) == (threads, co_runners)]
            found: list[float] = workers.run(f"{__name__}:work", said, threads, co_runners, deadline_s=DEADLINE_S)
    except (WorkerFailed, CommunicationError):
        return 1.0
    return statistics.median(found)


def work(member: Member, said: list[list[object]], threads: int, co_runners: int) -> float:
    """What one worker does."""
    table = [
        OperatorTime(name=str(name), phase=GAUGE, operands=(), results=(), options=str(options), dtype="",
                     threads=threads, co_runners=co_runners, seconds=float(seconds), spread=0.0)  # type: ignore[arg-type]
        for name, options, seconds in said
    ]  # fmt: skip
    gauge = Gauge(table, threads, co_runners)
    member.comm.barrier()
    return gauge.slower(SECONDS)
