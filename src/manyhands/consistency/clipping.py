"""Clip by global norm (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063): g ← g · min(1, c / (‖g‖ + 1e-6)).

The norm is that of the *averaged* gradient, so clipping comes between exchange and update. Where each worker holds a
slice of the average, the squares of the slices' norms are added over the workers: one number each, counted apart as
``control``. On one worker the result equals ``torch.nn.utils.clip_grad_norm_`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manyhands.communication.communicator import Communicator
from manyhands.contract import Replica


def clip_(replica: Replica, comm: Communicator, bounds: Sequence[tuple[int, int]], *, sliced: bool) -> None:
    """Scale ``grad[lo:hi]`` of each piece in place; nothing if the replica has no limit.

    ``sliced``: the workers' bounds tile the pieces, so that the norm is a sum over workers.
    """
    if replica.clip is None:
        return
    norm = replica.norm(bounds)
    if sliced and comm.size > 1:
        square = norm.to(torch.float64).square().reshape(1)
        with comm.counting("control"):
            comm.all_reduce(square).wait()
        norm = square.sqrt().to(norm.dtype)[0]
    factor = torch.clamp(replica.clip / (norm + 1e-6), max=1.0)
    for piece, (lo, hi) in zip(replica.pieces, bounds, strict=True):
        piece.grad[lo:hi].mul_(factor)
