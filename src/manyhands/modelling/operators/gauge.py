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
from typing import Any

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

#: Of gauges: network, batch and optimizer, and seconds of a step's gradients.
Then = tuple[tuple[str, str, float], ...]


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


def then(table: Sequence[OperatorTime], threads: int, co_runners: int) -> Then:
    """What the gauges took when ``table`` was filled, with so many threads beside so many others."""
    at = (GAUGE, threads, co_runners)
    return tuple((x.name, x.options, x.seconds) for x in table if (x.phase, x.threads, x.co_runners) == at)


class Gauge:
    """In a worker: the gauges of which it is known what they took."""

    def __init__(self, said: Then) -> None:
        took = {(name, options): seconds for name, options, seconds in said}
        self._each = [(Training(cell), took[name]) for cell in GAUGES if (name := _name(cell)) in took]
        for training, _ in self._each:
            for _ in range(WARM_UP):
                training.compute()

    def slower(self, seconds: float) -> float:
        """Now / then, of some ``seconds``; 1 without gauges."""
        if not self._each:
            return 1.0
        each_s = seconds / len(self._each)
        return math.exp(statistics.fmean(math.log(burst(x, each_s) / then_s) for x, then_s in self._each))


def _name(cell: Cell) -> tuple[str, str]:
    found = row(cell, 0.0, 0.0, threads=1, co_runners=1)
    return found.name, found.options


def slower(table: Sequence[OperatorTime], threads: int, co_runners: int) -> float:
    """Of this machine, once in a process: the median of all co-runners; 1 where it cannot be told."""
    said = then(table, threads, co_runners)
    return _slower(said, threads, co_runners) if said else 1.0


@functools.lru_cache(maxsize=8)
def _slower(said: Then, threads: int, co_runners: int) -> float:
    transport = "shared" if environment.shared_memory_works() else "gloo"
    try:
        with team(transport, co_runners, threads=threads) as workers:
            found: list[float] = workers.run(f"{__name__}:work", [list(x) for x in said], deadline_s=DEADLINE_S)
    except (WorkerFailed, CommunicationError):
        return 1.0
    return statistics.median(found)


def work(member: Member, said: Sequence[Sequence[Any]]) -> float:
    """What one worker does."""
    gauge = Gauge(tuple((name, options, seconds) for name, options, seconds in said))
    member.comm.barrier()
    return gauge.slower(SECONDS)
