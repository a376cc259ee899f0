"""Every worker updates its slice from its own share of the batch alone (Ma 2018, family member U2b).

    g_p = ∇ over share p;   θ_p ← u(θ_p, (g_p) restricted to slice p);   all-gather θ

Block-coordinate SGD in parallel: each slice sees other data, gradients are never exchanged. The noise of the slices is
uncorrelated, but per coordinate it is that of batch B/P, not B.

Payload per rank and step: (P−1)/P · n elements, half of `synchronous`.
Approximation: not equal to one worker for P > 1. Replicas bit-identical. A worker without samples leaves its slice. A
loss that is a sum is scaled by P, so that a share stands for the whole batch.
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
class SliceOwnBatch(Slicing):
    """A share of the batch and a slice of the update each; gradients stay at home."""

    name: ClassVar[str] = "slice_own_batch"

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return SliceOwnBatchWorker(replica, comm)


class SliceOwnBatchWorker(SlicingWorker):
    """As in `slice_update`, from a share."""

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, self.comm)
        gather_weights(self.comm, loss, count)
        clip_(replica, self.comm, self._bounds, sliced=True)
        for piece, group, (lo, hi) in zip(replica.pieces, self._groups, self._bounds, strict=True):
            if count and batch.count:
                replica.apply(piece, lo, hi)
            group.all_gather(piece.flat).wait()
        return loss
