"""Runs without numbers, put together by hand."""

import torch

from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.plan import strategy_from
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import Sizes
from manyhands.simulation.sizes import Sized
from manyhands.simulation.stragglers import Delays, stragglers_from

COMPUTE_S, UPDATE_S = 0.01, 0.001


def sized(
    strategy, workers=4, *, late=(), steps=12, numel=64 * 16, update_s=UPDATE_S, seed=0, batch=None, samples=10**6
):
    """``batch`` of all workers; 8 a worker by default."""
    batch = batch or 8 * workers
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return Sized(
        strategy_from(strategy),
        workers,
        [Sizes("group0.float32", 0, numel, torch.float32, ((0, numel),))],
        optimizer,
        samples,
        batch,
        {"epochs": None, "steps": steps},
        StepCost(COMPUTE_S, update_s, batch / workers, numel),
        Delays(tuple(stragglers_from(text) for text in late), workers, seed),
        True,
    )


class Flat(Prices):
    """Every operation of a step takes as long; a server serves one after the other."""

    def __init__(self, cost_s=0.0):
        super().__init__(None, 1)
        self._cost_s = cost_s

    def __call__(self, operation):
        return self._cost_s if self._begun and operation.purpose not in ("consensus", "control") else 0.0


def threads(what, price):
    """Where the clocks of `SimulatedWorld`'s threads stand, and rank 0's after each step."""
    from manyhands.communication.topology import shares
    from manyhands.contract import Batch
    from manyhands.simulation import sized as without
    from manyhands.simulation.pace import Pace

    world = SimulatedWorld(what.workers, price, queue=price.queue)
    world.zeros = without.zeros
    ends = []

    def rank(comm):
        comm.shares_memory = what.shares_memory
        replica = what.replica(comm, Pace(what.cost, what.delays.of(comm.rank)), comm)
        with comm.counting("control"):
            worker = what.strategy.start(replica, comm)
            comm.barrier()
        price.begin()
        for turn in what.turns():
            lo, hi = shares(turn.total, what.workers)[comm.rank]
            worker.step(Batch(None, None, hi - lo, turn.total))
            if comm.rank == 0:
                ends.append(comm.now)
        return comm.now

    return world.run(rank), ends
