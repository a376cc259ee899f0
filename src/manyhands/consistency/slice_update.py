"""Every worker computes the whole gradient and updates only its slice (Ma 2018, family member U2).

    g = ∇ over the whole batch, on every worker;   θ_p ← u(θ_p, g_p) on slice p;   all-gather θ

The literal reading of the course project's title: the *update* is parallel, the gradient is not. It saves update time
and optimizer memory (1/P each) and computes P times the same gradient; useful where the update dominates.

Payload per rank and step: (P−1)/P · n elements.
Guarantee: identical to one worker bit for bit, for element-by-element optimizers; replicas bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.reduction import slices
from manyhands.consistency.agreement import gather_weights
from manyhands.consistency.clipping import clip_
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


@dataclass(frozen=True)
class SliceUpdate(Strategy):
    """The whole batch on every worker, a slice of the update each."""

    name: ClassVar[str] = "slice_update"
    paper: ClassVar[Reference] = Reference(
        "Ma", "Parallel parameter update for deep neural network", 2018, "CSE 633 course project", survey="V-A"
    )
    identical: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One writer an element."""
        return "common"

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """(P−1)/P · n elements: an all-gather of slices."""
        return Traffic(reference_B("all_gather", numel * itemsize, size), size - 1)

    def exact(self, setting: Setting) -> bool:
        """Always."""
        return True

    def problems(self, setting: Setting) -> list[Problem]:
        """A whole-tensor optimizer cannot be asked for a slice; a sum loss would be multiplied by the workers."""
        return slicing_problems(self, setting)

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return SliceUpdateWorker(replica, comm)


def slicing_problems(strategy: Strategy, setting: Setting) -> list[Problem]:
    """What stops a strategy that applies an unsummed gradient to slices."""
    problems = []
    if setting.workers > 1 and not setting.elementwise:
        problems.append(
            Problem(
                f"{strategy.name} with an optimizer that looks at whole tensors",
                "a slice can be updated alone only if the optimizer works element by element.",
                "Use synchronous(update='replicated'), or an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
            )
        )
    if setting.workers > 1 and setting.sum_loss:
        problems.append(
            Problem(
                f"{strategy.name} with a loss that is a sum over samples",
                "its gradients are added over workers, and this strategy does not add gradients.",
                "Use synchronous or replica_average, or a mean loss such as cross_entropy.",
            )
        )
    return problems


class SliceUpdateWorker(Worker):
    """Computes everything, updates its slice, gathers the others'."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm)
        self._groups = [comm.over(piece.replicated_over) for piece in replica.pieces]
        self._bounds = [
            slices(piece.flat.numel(), group.size)[group.rank]
            for piece, group in zip(replica.pieces, self._groups, strict=True)
        ]

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        gather_weights(self.comm, loss, count)
        clip_(replica, self.comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
        for piece, group, (lo, hi) in zip(replica.pieces, self._groups, self._bounds, strict=True):
            replica.apply(piece, lo, hi)
            group.all_gather(piece.flat).wait()
        return loss
