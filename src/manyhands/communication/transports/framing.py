"""How the weights of a mean ride behind the tensor, through an engine that can only add: one collective does.

    frame_p = (w_p·x_p, w_p, n_p, n_p·p)    n_p = 1 if w_p ≠ 0 else 0
    Σ_p frame_p = (Σ w·x, Σ w, n, …)        mean = Σ w·x / Σ w

If one rank alone has weight (a last batch smaller than the number of workers) its x is the mean, bit for bit, while
(7·x)/7 need not be x: n = 1 tells, Σ n_p·p names that rank, and its x must be brought to the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyhands.errors import Vetoed

_TAIL = 3


def frame(x: Tensor, weight: float, rank: int) -> Tensor:
    """This rank's summand; zeros from a rank without weight, whatever it holds. Float32 or wider."""
    framed = torch.empty(x.numel() + _TAIL, dtype=x.dtype, device=x.device)
    if weight:
        torch.mul(x, weight, out=framed[:-_TAIL])
    else:
        framed[:-_TAIL].zero_()
    framed[-_TAIL:] = torch.tensor([weight, bool(weight), rank * bool(weight)], dtype=x.dtype)
    return framed


def unframe(framed: Tensor, x: Tensor) -> int | None:
    """From the sum of all frames: ``x`` ← the mean; or the one rank that has weight, with ``x`` left as it was."""
    total, count, only = framed[-_TAIL:].tolist()
    if not math.isfinite(total):
        raise Vetoed
    if count == 1:
        return int(only)
    if total:
        torch.div(framed[:-_TAIL], total, out=x)
    else:
        x.zero_()
    return None
