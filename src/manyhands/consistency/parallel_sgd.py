"""Train alone, average once: every worker runs SGD on its own samples and says nothing until the end (survey §V-A).

    θ_p ← u(θ_p, g_p)                       in every step
    θ ← 1/P Σ_p θ_p                         once, when training is over

θ_p parameters of worker p, u the optimizer, g_p the gradient of its share (Zinkevich, Weimer, Smola & Li 2010,
Parallelized stochastic gradient descent, NeurIPS, algorithms 2 and 3). For a strongly convex loss averaging divides the
variance of the result by P and leaves its bias as it is; networks that have gone far apart need not have a useful mean.

The paper gives each machine a part of the data for one pass. Here a worker's share is drawn anew in every epoch, so an
epoch is the paper's pass. The same in the form of map and reduce, for tasks that fail and are run again: `map_reduce`.

Payload: none in any step; the average counts as ``consensus``, as does every look at it on the way.
Guarantee: none but for one worker; an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.independent import IndependentWorker
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker


@dataclass(frozen=True)
class ParallelSGD(Strategy):
    """Every worker trains alone; parameters are averaged once, at the end."""

    name: ClassVar[str] = "parallel_sgd"
    bears_cuts: ClassVar[bool] = True
    uncompressed: ClassVar[str] = "it sends nothing in any step, and the average at its end is exact."
    paper: ClassVar[Reference] = Reference(
        "Zinkevich, Weimer, Smola & Li", "Parallelized stochastic gradient descent", 2010, "NeurIPS 23", survey="V-A"
    )

    @property
    def lockstep(self) -> bool:
        """Nobody waits for anybody."""
        return False

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Nothing before the end."""
        return Traffic()

    def exact(self, setting: Setting) -> bool:
        """Alone."""
        return setting.workers == 1

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return ParallelSGDWorker(replica, comm)


class ParallelSGDWorker(IndependentWorker):
    """Own steps; the consensus is everybody's mean, each counting alike."""

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        return self.own_step(batch)
