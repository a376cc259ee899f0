"""What each part of a model takes, forward and backward, on a micro-batch: by which it is cut into stages."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import BadInput
from manyhands.partition.pipeline.keeping import cuda_devices, kept
from manyhands.partition.pipeline.parts import Parts

_REPEATS = 3  # of a timing; the least counts


def measured(parts: Parts, sample: Any) -> list[float]:
    """Seconds of forward and backward of each part on what the one before returns for ``sample``."""
    result = []
    given = sample
    with kept(parts.model):
        for k in range(len(parts)):
            module = parts.module(k, k + 1)
            each = [_once(module, given, parts.names[k]) for _ in range(_REPEATS)]
            result.append(min(seconds for seconds, _ in each))
            given = each[-1][1]
    return result


def _once(module: nn.Module, given: Any, name: str) -> tuple[float, Any]:
    leaves = torch.utils._pytree.tree_map(_leaf, given)
    t0 = time.perf_counter()
    try:
        outputs = module(leaves)
    except Exception as e:
        raise BadInput(f"timing {name} on the sample failed: {type(e).__name__}: {e}") from e
    ends = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in torch.utils._pytree.tree_leaves(leaves) if isinstance(x, Tensor) and x.requires_grad]
    wanted += [p for p in module.parameters() if p.requires_grad]
    if ends and wanted:
        torch.autograd.grad(ends, wanted, [torch.ones_like(x) for x in ends], allow_unused=True)
    for device in cuda_devices(outputs):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - t0
    return seconds, torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    # Not the leaf itself: a module may overwrite what it is given.
    return x.detach().clone().requires_grad_().clone()
