"""Clip by global norm (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063): g ← g · min(1, c / (‖g‖ + 1e-6)).

The norm is that of the *averaged* gradient, L2 term included, so clipping comes between exchange and update. Where each
worker holds a slice of the average, or a piece is cut over some axis of the mesh, the squares are added over the
workers: one number each, counted apart as ``control``. On one worker, and wherever every worker holds all gradients,
the result equals ``torch.nn.utils.clip_grad_norm_`` bit for bit.

A norm that is not finite stops every worker before anything is applied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Replica
from manyhands.errors import NonFiniteLoss


def clip_(replica: Replica, comm: Communicator, bounds: Sequence[tuple[int, int]], *, sliced: bool) -> None:
    """Scale ``grad[lo:hi]`` of each piece in place; nothing if the replica has no limit.

    ``sliced``: the workers' bounds tile the pieces, so that the norm is a sum over workers.
    """
    if replica.clip is None:
        return
    replica.add_l2(bounds)
    if not _scale(replica, bounds, global_norm(replica, comm, bounds, sliced=sliced)):
        raise NonFiniteLoss(comm.step, what="gradient")


def clip_own_(replica: Replica) -> bool:
    """Scale this replica's gradients by their own norm; whether that is finite (nothing is scaled where it is not)."""
    if replica.clip is None:
        return True
    bounds = [(0, piece.flat.numel()) for piece in replica.pieces]
    replica.add_l2(bounds)
    return _scale(replica, bounds, replica.own_norm())


def global_norm(replica: Replica, comm: Communicator, bounds: Sequence[tuple[int, int]], *, sliced: bool) -> Tensor:
    """‖g‖ over all workers; collective where some worker does not hold all of g.

    Each worker adds the square of each of its pieces, divided by the number of workers that hold the same elements.
    """
    if comm.size == 1:
        return replica.norm(bounds)
    mesh = comm.mesh
    if not sliced and all(mesh[a] == 1 or a in piece.replicated_over for piece in replica.pieces for a in mesh):
        return replica.norm(bounds)
    alike: dict[int, list[tuple[int, int]]] = {}  # by holders: the bounds of the pieces that have so many
    for i, piece in enumerate(replica.pieces):
        holders = 1 if sliced else math.prod(mesh[a] for a in mesh if a in piece.replicated_over)
        alike.setdefault(holders, [(0, 0)] * len(bounds))[i] = bounds[i]
    norms = {holders: replica.norm(own) for holders, own in alike.items()}
    squares = [norm.to(torch.float64).square().reshape(1) / holders for holders, norm in norms.items()]
    square = squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)
    with comm.counting("control"):
        comm.all_reduce(square).wait()
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms.values()))
    return square.sqrt().to(dtype)[0]


def _scale(replica: Replica, bounds: Sequence[tuple[int, int]], norm: Tensor) -> bool:
    assert replica.clip is not None
    if not math.isfinite(norm.item()):
        return False
    factor = torch.clamp(replica.clip / (norm + 1e-6), max=1.0)
    for piece, (lo, hi) in zip(replica.pieces, bounds, strict=True):
        (piece.grad if piece.width else piece.grad[lo:hi]).mul_(factor)
    return True
