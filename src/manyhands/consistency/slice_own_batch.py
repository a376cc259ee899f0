"""Every worker updates its slice from its own share of the batch alone (Ma 2018, family member U2b).

    g_p = ∇ over share p;   θ_p ← u(θ_p, (g_p) restricted to slice p);   all-gather θ

Block-coordinate SGD in parallel: each slice sees other data, gradients are never exchanged. The noise of the slices is
uncorrelated, but per coordinate it is that of batch B/P, not B.

Payload per rank and step: (P−1)/P · n elements, half of `synchronous`.
Approximation: not equal to one worker for P > 1. Replicas bit-identical. A worker without samples leaves its slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.consistency.agreement import gather_weights
from manyhands.consistency.clipping import clip_
from manyhands.consistency.slice_update import SliceUpdateWorker, slicing_problems
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


@dataclass(frozen=True)
class SliceOwnBatch(Strategy):
    """A share of the batch and a slice of the update each; gradients stay at home."""

    name: ClassVar[str] = "slice_own_batch"
    paper: ClassVar[Reference] = Reference(
        "Ma", "Parallel parameter update for deep neural network", 2018, "CSE 633 course project", survey="V-A"
    )
    identical: ClassVar[bool] = True

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One writer an element."""
        return "common"

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """(P−1)/P · n elements: an all-gather of slices."""
        return Traffic(reference_B("all_gather", numel * itemsize, size), size - 1)

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1

    def problems(self, setting: Setting) -> list[Problem]:
        """As for `slice_update`."""
        return slicing_problems(self, setting)

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return SliceOwnBatchWorker(replica, comm)


class SliceOwnBatchWorker(SliceUpdateWorker):
    """As in `slice_update`, from a share."""

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        gather_weights(self.comm, loss, count)
        clip_(replica, self.comm, self._bounds, sliced=True)
        for piece, group, (lo, hi) in zip(replica.pieces, self._groups, self._bounds, strict=True):
            if count:
                replica.apply(piece, lo, hi)
            group.all_gather(piece.flat).wait()
        return loss
