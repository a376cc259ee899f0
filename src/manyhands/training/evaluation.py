"""Accuracy and loss over a test set, each sample counted once whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.data import Dataset
from manyhands.models.losses import accuracy
from manyhands.training.sampler import evaluation_shares

#: Samples per forward pass: large enough for full speed, small enough for the cache and for memory.
CHUNK = 500
#: Fewer would be slow for small models, and a few more than in a step cost little without a backward.
FEWEST = 64


def chunk_of(samples: int) -> int:
    """Samples per forward pass, of workers that learn from so many in a step: as many, so that an evaluation wants no
    more memory than a step has taken. A small GPT's process grew from 390 to 570 to 650 MB in passes of 500.
    """
    return min(max(samples, FEWEST), CHUNK)


def evaluate(
    model: torch.nn.Module,
    loss: Callable[..., Any] | None,
    data: Dataset,
    comm: Communicator,
    *,
    device: str = "cpu",
    chunk: int = CHUNK,
) -> tuple[float | None, float | None]:
    """``(accuracy, mean loss)`` on all of ``data``; None where the model or the target has no such thing. Collective.

    Each worker evaluates a contiguous share, and sums and counts are added; counted as ``consensus``. All call the
    model equally often, as they may hold parts of it and answer together: one that has no sample left takes another's
    and does not count it. ``chunk``: samples per forward pass, the same on all.
    """
    bounds = evaluation_shares(len(data), comm.size)
    (first, last), (lo, hi) = bounds[0], bounds[comm.rank]
    right = samples = 0.0
    total = count = 0.0
    classifies = True
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for done in range(0, last - first, chunk):  # the first share is the largest
                indices = torch.arange(lo + done, min(lo + done + chunk, hi))
                left = len(indices) > 0
                inputs, target = data.rows(indices if left else torch.tensor([0]))
                inputs, target = to_device(inputs, device), to_device(target, device)
                outputs = model(inputs) if loss is not None else None
                if not left:
                    continue
                if loss is not None:
                    part, n = _sum(loss(outputs, target), len(indices))
                    total, count = total + part, count + n
                if isinstance(outputs, Tensor) and outputs.dim() >= 2 and isinstance(target, Tensor):
                    if target.is_floating_point() and target.shape != outputs.shape:
                        classifies = False
                    else:
                        right += float(accuracy(outputs, target))
                        samples += target.numel() if not target.is_floating_point() else len(indices)
                else:
                    classifies = False
    finally:
        model.train(was_training)
    sums = torch.tensor([right, samples, total, count, 0.0 if classifies else 1.0], dtype=torch.float64)
    with comm.counting("consensus"):
        comm.all_reduce(sums).wait()
    right, samples, total, count, unclassified = sums.tolist()
    return (
        right / samples if samples and not unclassified else None,
        total / count if count else None,
    )


def _sum(result: Any, samples: int) -> tuple[float, float]:
    if isinstance(result, Tensor):
        return float(result) * samples, float(samples)
    total, count = result
    # A sum over samples is reported per sample, so that it compares across set sizes.
    return float(total), float(samples if count is None else count)


def to_device(tree: Any, device: str) -> Any:
    """A pytree of tensors on ``device``; itself where it is there already."""
    if device == "cpu" or tree is None:
        return tree
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)
