"""Synchronous SGD whose gradients are compressed before they are averaged (survey §VI-B).

    θ ← u(θ, ḡ),   ḡ = (1/P) Σ_p C(s_p g_p + e_p),   s_p = P n_p / Σ n

θ parameters, u the optimizer, g_p the mean gradient of worker p over its n_p samples, C a compressor with residuals e_p
(`communication.compression`). A worker's share s_p is 1 where all have as many samples, so that thresholds are in units
of a worker's own gradient however many there are; a worker without samples sends what it has left.

Shares are settled first, 8 bytes a worker. That is also where a loss or a gradient that is not finite stops all workers
at once, before it gets into anybody's residual. Clip and L2 come after the mean.

Guarantee: replicas bit-identical. A resume is exact: residuals and whatever else a compressor keeps are in the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor, Layout
from manyhands.consistency.agreement import agree_on_unused, gather_weights
from manyhands.consistency.clipping import clip_
from manyhands.contract import Batch, Piece, Replica, Worker, is_finite


def layout_of(piece: Piece) -> Layout:
    """The tensors that a piece consists of."""
    return Layout(piece.shapes or ((piece.flat.numel(),),), piece.flat.dtype)


class CompressedWorker(Worker):
    """Everybody compresses its gradient, averages what the others have compressed, and updates everything."""

    def __init__(self, replica: Replica, comm: Communicator, compressor: Compressor) -> None:
        super().__init__(replica, comm)
        self._compressor = compressor
        self._groups = [comm.over(piece.replicated_over) for piece in replica.pieces]
        self._members = [
            next(ranks for ranks in comm.mesh.groups(piece.replicated_over) if comm.rank in ranks)
            for piece in replica.pieces
        ]
        self._states = [
            compressor.start(layout_of(piece), group.rank, group.size, i)
            for i, (piece, group) in enumerate(zip(replica.pieces, self._groups, strict=True))
        ]

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica, comm = self.replica, self.comm
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, comm)
        finite = all(is_finite(piece.grad) for piece in replica.pieces)
        weights = gather_weights(comm, loss, count if finite else math.inf, what="loss or the gradient")
        for piece, group, members, state in zip(replica.pieces, self._groups, self._members, self._states, strict=True):
            total = sum(weights[rank] for rank in members)
            share = group.size * weights[comm.rank] / total if total else 0.0
            if share != 1.0 and group.size > 1:
                piece.grad.mul_(share)
            self._compressor.aggregate(piece.grad, group, state)
        clip_(replica, comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
        for piece in replica.pieces:
            replica.apply(piece, 0, piece.flat.numel())
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the compressor keeps of every piece."""
        return {"compression": [state.state_dict() for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        for mine, kept in zip(self._states, state["compression"], strict=True):
            mine.load_state_dict(kept)
