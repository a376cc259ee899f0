"""A run without numbers: the strategy's own code on replicas that have sizes only.

Three ways, the first that fits (all the same strategy object):

    folded    every worker costs the same: one rank, one clock
    vectors   workers differ by chance: one rank, a clock for each; for strategies of collectives alone
    ranks     every rank by itself, in the order of virtual time
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.contract import Batch, Strategy
from manyhands.errors import BadInput
from manyhands.simulation.folded import FoldedCommunicator, FoldedObserver, NotAlike, Vector
from manyhands.simulation.outcome import Clocks, Outcome
from manyhands.simulation.pace import Pace, StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.ranks import SizedWorld
from manyhands.simulation.replica import Clock, PricedReplica, Sizes
from manyhands.simulation.sized import NoNumbers
from manyhands.simulation.stragglers import Delays, Recorded
from manyhands.simulation.trace import Spans


class Turn(NamedTuple):
    """A step of everybody's: its number, and the samples of all."""

    number: int
    total: int


def turns(samples: int, batch_size: int, *, epochs: int | None, steps: int | None) -> Iterator[Turn]:
    """The steps of a run, as `training.sampler` cuts them."""
    number = epoch = position = 0
    size = min(batch_size, samples)
    while (epochs is None or epoch < epochs) and (steps is None or number < steps):
        total = min(size, samples - position)
        yield Turn(number, total)
        number, position = number + 1, position + total
        if position == samples:
            epoch, position = epoch + 1, 0


@dataclass(frozen=True)
class Sized:
    """What is run."""

    strategy: Strategy
    workers: int
    pieces: list[Sizes]
    optimizer: torch.optim.Optimizer
    samples: int
    batch_size: int
    length: dict[str, int | None]
    cost: StepCost
    delays: Delays | Recorded
    shares_memory: bool
    clip: float | None = None

    def turns(self) -> Iterator[Turn]:
        """The steps."""
        return turns(self.samples, self.batch_size, **self.length)

    def replica(self, comm: Communicator, pace: Pace, clock: Clock) -> PricedReplica:
        """A rank's."""
        common = self.strategy.parameters == "common"
        shared = 1 if self.strategy.whole_batch else self.workers
        return PricedReplica(
            self.pieces, self.optimizer, comm, pace=pace, clock=clock, common=common, clip=self.clip, shares=shared
        )


def run(what: Sized, prices: Callable[[], Prices], spans: Spans | None = None) -> Outcome:
    """Simulate it; one rank for all where that is the same."""
    try:
        return _folded(what, prices(), not what.delays.kinds, spans)
    except NoNumbers as e:
        raise BadInput(_looks(what.strategy, e)) from e
    except NotAlike:
        if spans is not None:
            spans.clear()
        return _by_rank(what, prices(), spans)


def _folded(what: Sized, price: Prices, alike: bool, spans: Spans | None) -> Outcome:
    observe: FoldedObserver | None = None if spans is None else spans.folded(what.workers)
    comm = FoldedCommunicator(what.workers, price, alike=alike, shares_memory=what.shares_memory, observe=observe)
    pace = Pace(what.cost, what.delays.rows())
    replica = what.replica(comm, pace, comm)
    if not alike and not what.strategy.whole_batch:
        replica.samples_of_all = functools.lru_cache(maxsize=4)(functools.partial(_samples_of_all, what.workers))
    with comm.counting("control"):
        worker = what.strategy.start(replica, comm)
    comm.clocks[:] = 0.0
    comm.wait_s[:] = 0.0
    comm.context.counters = type(comm.counters)()
    price.begin()
    clocks = Clocks()
    steps = seen = 0
    for turn in what.turns():
        comm.step = turn.number
        if spans is not None:
            spans.step = turn.number
        count = turn.total if what.strategy.whole_batch else -(-turn.total // what.workers)  # the first has most
        worker.step(Batch(None, None, count, turn.total))
        clocks.ends.append(comm.now)
        steps, seen = steps + 1, seen + turn.total
    n = what.workers
    clocks.last = np.broadcast_to(comm.clocks, n).tolist()
    clocks.wait_s = np.broadcast_to(comm.wait_s, n).tolist()
    clocks.compute_s = float(np.ravel(replica.compute_s)[0])
    clocks.update_s = replica.update_s
    clocks.communicate_s = comm.counters.communicate_s
    clocks.sent_B = comm.counters.sent_B()
    clocks.staleness = Counter(worker.staleness)
    worker.meet()
    return Outcome(clocks, steps, seen, seen / what.samples, "folded" if alike else "vectors")


def _samples_of_all(workers: int, total: int) -> Vector:
    return np.array([hi - lo for lo, hi in shares(total, workers)], dtype=np.float64)


def _by_rank(what: Sized, price: Prices, spans: Spans | None) -> Outcome:
    world = SizedWorld(what.workers, price, queue=price.queue, observe=None if spans is None else spans.observe)
    world.woken_s = price.woken_s
    clocks = Clocks()
    last, waits = [0.0] * what.workers, [0.0] * what.workers
    plan = list(what.turns())
    divided = {turn.total: [hi - lo for lo, hi in shares(turn.total, what.workers)] for turn in plan}

    def rank(comm: Any) -> None:
        comm.shares_memory = what.shares_memory
        me = comm.rank
        replica = what.replica(comm, Pace(what.cost, what.delays.of(me)), comm)
        with comm.counting("control"):
            worker = what.strategy.start(replica, comm)
            comm.barrier()
        price.begin()
        comm.context.counters = type(comm.counters)()
        for turn in plan:
            comm.step = turn.number
            count = turn.total if what.strategy.whole_batch else divided[turn.total][me]
            worker.step(Batch(None, None, count, turn.total))
            if me == 0:
                clocks.ends.append(comm.now)
        last[me], waits[me] = comm.now, comm.counters.wait_s
        clocks.staleness.update(worker.staleness)
        if me == 0:
            clocks.compute_s, clocks.update_s = replica.compute_s, replica.update_s
            clocks.communicate_s, clocks.sent_B = comm.counters.communicate_s, comm.counters.sent_B()
        worker.meet()

    try:
        world.run(rank)
    except NoNumbers as e:
        raise BadInput(_looks(what.strategy, e)) from e
    clocks.last, clocks.wait_s = last, waits
    seen = sum(turn.total for turn in plan)
    return Outcome(clocks, len(plan), seen, seen / what.samples, "ranks")


def _looks(strategy: Strategy, e: NoNumbers) -> str:
    return (
        f"sizes only with {strategy}: what it does next depends on numbers of the parameters or gradients ({e}), and "
        "there are none. Simulate it with values."
    )
