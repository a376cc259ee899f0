"""The 2018 original: scatter the data, all-gather everybody's vector, average locally (Ma 2018, family member U1).

    gradients    v_p = g_p;             ḡ = Σ n_p v_p / Σ n_p,  then θ ← u(θ, ḡ) on every worker
    parameters   v_p = u(θ, g_p);       θ ← Σ n_p v_p / Σ n_p

The course project used MPI's Scatter and Allgather only, so every worker receives all P vectors and does all the
averaging itself: (P−1)·n elements per rank and step against 2(P−1)/P·n for `synchronous`. It is here because it is the
baseline the project measured; weak scaling is ``--batch-per-worker``, strong scaling ``--batch-size``.

Guarantee: replicas bit-identical. Averaging gradients equals one worker on the joined batch up to summation order, as
does averaging parameters after one step of plain SGD; with momentum or Adam the latter averages neither (each
worker's state follows its own gradients) and is an approximation, as it is with clipping (each to its own norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.reduction import coefficients, reduce_into
from manyhands.consistency.agreement import agree_on_unused, gather_weights
from manyhands.consistency.clipping import clip_, clip_own_
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker


@dataclass(frozen=True)
class ReplicaAverage(Strategy):
    """All-gather P whole vectors and average them on every worker; ``what``: gradients or parameters."""

    name: ClassVar[str] = "replica_average"
    paper: ClassVar[Reference] = Reference(
        "Ma", "Parallel parameter update for deep neural network", 2018, "CSE 633 course project", survey="V-A"
    )
    bears_cuts: ClassVar[bool] = True
    identical: ClassVar[bool] = True
    uncompressed: ClassVar[str] = "it is the baseline whose workers get everybody's whole vector."

    what: Literal["gradients", "parameters"] = "gradients"

    def __post_init__(self) -> None:
        if self.what not in ("gradients", "parameters"):
            raise ValueError(f"what={self.what!r}: it is gradients or parameters")

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """(P−1) · n elements: an all-gather of P vectors."""
        return Traffic(reference_B("all_gather", size * numel * itemsize, size), size - 1)

    def exact(self, setting: Setting) -> bool:
        """Gradients always; parameters only after a stateless update that clips nobody's own gradient."""
        return self.what == "gradients" or (setting.stateless and not setting.clip) or setting.workers == 1

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return ReplicaAverageWorker(replica, comm, self.what)


class ReplicaAverageWorker(Worker):
    """Holds a matrix of P rows per piece; row p is worker p's vector."""

    def __init__(self, replica: Replica, comm: Communicator, what: str) -> None:
        super().__init__(replica, comm)
        self._averages_parameters = what == "parameters"
        self._groups = [comm.over(piece.replicated_over) for piece in replica.pieces]
        self._members = [_members(comm, piece.replicated_over) for piece in replica.pieces]
        # One writer a row, so one copy of the matrix serves all workers where memory is shared.
        self._rows = [
            group.allocate(group.size * piece.flat.numel(), piece.flat.dtype, common=True).view(group.size, -1)
            for piece, group in zip(replica.pieces, self._groups, strict=True)
        ]

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, self.comm)
        if self._averages_parameters:
            finite = not count or clip_own_(replica)
            what = "loss" if replica.clip is None else "loss or the gradient"
            weights = gather_weights(self.comm, loss, count if finite else math.inf, what=what)
            if count:
                self._apply()
            self._average([piece.flat for piece in replica.pieces], weights)
        else:
            weights = gather_weights(self.comm, loss, count)
            self._average([piece.grad for piece in replica.pieces], weights)
            clip_(replica, self.comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
            self._apply()
        return loss

    def _apply(self) -> None:
        for piece in self.replica.pieces:
            self.replica.apply(piece, 0, piece.flat.numel())

    def _average(self, vectors: list[Tensor], weights: list[float]) -> None:
        if self.comm.size == 1:
            return
        for vector, rows, group, members in zip(vectors, self._rows, self._groups, self._members, strict=True):
            n = vector.numel()
            rows[group.rank].copy_(vector)
            group.all_gather(rows, [(p * n, (p + 1) * n) for p in range(group.size)]).wait()
            reduce_into(vector, list(rows), coefficients([weights[rank] for rank in members]))


def _members(comm: Communicator, axes: frozenset[str]) -> list[int]:
    """The ranks of ``comm.over(axes)``, in that group's order."""
    return [r for r in range(comm.size) if comm.mesh.color(r, axes) == comm.mesh.color(comm.rank, axes)]
