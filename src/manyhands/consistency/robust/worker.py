"""Synchronous SGD whose gradients are joined by a robust rule: everybody gathers all vectors and decides for himself.

    θ ← u(θ, A(g_p : p has samples))      A: an `Aggregation`

All-gather, not a share of the coordinates for each worker to decide (which coordinate-wise rules would allow at the
price of a reduction): whoever decides for others can lie to them. Replicas are bit-identical because every worker does
the same arithmetic on the same bytes. Clip and L2 come after the rule.

Who counts in a step:

    no samples              has no vector, and is left out
    loss or gradient not    is one of those that the rule bears: left out, the rule goes on with f − 1 among the others.
      finite                No veto: it would give one worker the power that the rule takes from it. When there are more
                            than the rule bears, all stop in that step and nothing is applied.
    fewer than it needs     have samples (the last batch of an epoch): nothing is applied in that step. Without f among
                            enough others one worker could undo in it all that the other steps have protected.

Where the loss is a sum, a worker without samples counts in its mean with a zero; the rule's result is scaled to that.

Payload per rank and step: (P−1) · n elements. Buffers (BatchNorm) are agreed on by the plan's policy, which is not
robust; nor is what workers tell each other about unused parameters.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.consistency.agreement import agree_on_unused, weight_of
from manyhands.consistency.clipping import clip_
from manyhands.consistency.robust.aggregation import Aggregation, is_row_finite
from manyhands.contract import Batch, Replica, Worker
from manyhands.errors import BadInput, NonFiniteLoss

log = logging.getLogger(__name__)


class RobustWorker(Worker):
    """Holds a matrix of P rows per piece; row p is worker p's gradient."""

    def __init__(self, replica: Replica, comm: Communicator, rule: Aggregation) -> None:
        super().__init__(replica, comm)
        if any(comm.over(piece.replicated_over).size != comm.size for piece in replica.pieces):
            raise BadInput(
                f"aggregate={rule} on {comm.mesh}: a rule compares workers' whole vectors, so every worker holds the "
                f"whole model. Use mesh data={comm.size}."
            )
        self.rule = rule
        # One writer a row, so one copy of the matrix serves all workers where memory is shared.
        self._rows = [
            comm.allocate(comm.size * piece.flat.numel(), piece.flat.dtype, common=True).view(comm.size, -1)
            for piece in replica.pieces
        ]
        self._warned: set[int | str] = set()

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica, rank = self.replica, self.comm.rank
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, self.comm)
        # Nobody returns before everybody has called it, so all have finished reading the rows of the last step.
        samples, weights = self._gather_counts(batch.count, weight_of(loss, count))
        self._gather_rows()
        expected = [p for p, (n, weight) in enumerate(zip(samples, weights, strict=True)) if n and weight]
        failed = [p for p in expected if not (math.isfinite(weights[p]) and is_row_finite(self._rows, p))]
        if len(expected) < self.rule.fewest:
            self._warn_once("few", f"only {len(expected)} workers have samples; {self.rule} needs {self.rule.fewest}")
        elif len(failed) > self.rule.bears(len(expected)):
            raise NonFiniteLoss(self.comm.step, what="loss or the gradient")
        else:
            for p in failed:
                self._warn_once(p, f"worker {p} has no finite loss and gradient and is left out of {self.rule}")
            idle = sum(1 for n, weight in zip(samples, weights, strict=True) if weight and not n)
            self._aggregate([p for p in expected if p not in failed], self.rule.without(len(failed)))
            self._update(len(expected) / (len(expected) + idle))
        if rank in failed:  # its loss says nothing, as that of a worker without samples
            replica.count = 0.0
            return torch.zeros(())
        return loss

    def _gather_counts(self, samples: int, weight: float) -> tuple[list[int], list[float]]:
        """Of every worker, how many samples it has and how it would count in a mean (infinite: its loss is none)."""
        comm = self.comm
        told = torch.tensor([[samples, weight]] * comm.size, dtype=torch.float64)
        with comm.counting("control"):
            comm.all_gather(told, [(2 * p, 2 * p + 2) for p in range(comm.size)]).wait()
        return told[:, 0].int().tolist(), told[:, 1].tolist()

    def _gather_rows(self) -> None:
        comm = self.comm
        for piece, rows in zip(self.replica.pieces, self._rows, strict=True):
            n = piece.grad.numel()
            rows[comm.rank].copy_(piece.grad)
            comm.all_gather(rows, [(p * n, (p + 1) * n) for p in range(comm.size)]).wait()

    def _warn_once(self, key: int | str, what: str) -> None:
        if key not in self._warned and self.comm.rank == 0:
            log.warning("step %s: %s (said once)", self.comm.step, what)
        self._warned.add(key)

    def _aggregate(self, voters: list[int], rule: Aggregation) -> None:
        parts = self._rows if len(voters) == self.comm.size else [rows[voters] for rows in self._rows]
        for piece, vector in zip(self.replica.pieces, rule.combine(parts), strict=True):
            piece.grad.copy_(vector)

    def _update(self, scale: float) -> None:
        replica = self.replica
        if scale != 1.0:
            for piece in replica.pieces:
                piece.grad.mul_(scale)
        clip_(replica, self.comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
        for piece in replica.pieces:
            replica.apply(piece, 0, piece.flat.numel())
