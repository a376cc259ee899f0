"""Every worker computes the whole gradient and updates only its slice (Ma 2018, family member U2).

    g = ∇ over the whole batch, on every worker;   θ_p ← u(θ_p, g_p) on slice p;   all-gather θ

The literal reading of the course project's title: the *update* is parallel, the gradient is not. It saves update time
and optimizer memory (1/P each) and computes P times the same gradient; useful where the update dominates.

Payload per rank and step: (P−1)/P · n elements.
Guarantee: identical to one worker bit for bit, for element-by-element optimizers; replicas bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.agreement import agree_on_unused, gather_weights
from manyhands.consistency.clipping import clip_
from manyhands.consistency.slicing import Slicing, SlicingWorker
from manyhands.contract import Batch, Replica, Setting, Worker


@dataclass(frozen=True)
class SliceUpdate(Slicing):
    """The whole batch on every worker, a slice of the update each."""

    name: ClassVar[str] = "slice_update"
    bears_cuts: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True

    def exact(self, setting: Setting) -> bool:
        """Always."""
        return True

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return SliceUpdateWorker(replica, comm)


class SliceUpdateWorker(SlicingWorker):
    """Computes everything, updates its slice, gathers the others'."""

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, self.comm)
        gather_weights(self.comm, loss, count)
        clip_(replica, self.comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
        for piece, group, (lo, hi) in zip(replica.pieces, self._groups, self._bounds, strict=True):
            replica.apply(piece, lo, hi)
            group.all_gather(piece.flat).wait()
        return loss
