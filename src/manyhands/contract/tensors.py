"""What is asked everywhere of the tensors of a batch and of a gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rows_of(tree: Any, lo: int, hi: int) -> Any:
    """Samples ``[lo, hi)`` of a pytree of tensors, as views; what is no tensor stays as it is."""
    if isinstance(tree, Tensor):  # mostly it is one, and to look for others takes longer than the slice
        return tree[lo:hi]
    return torch.utils._pytree.tree_map(lambda x: x[lo:hi] if isinstance(x, Tensor) else x, tree)


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; of a tensor that has a size only, yes."""
    if x.is_meta:
        return True
    # A finite sum has finite summands, and is quicker told; one that is not may have overflowed.
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())
