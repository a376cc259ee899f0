"""A model tried out: forwards and backwards of which nothing stays."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Whatever forwards and backwards may change is as it was when this is left.

    That is buffers, gradients, modes and other attributes of modules, and the random numbers of torch and Python.
    """
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    drawn = random.getstate()
    try:
        with torch.random.fork_rng(devices=cuda_devices([*model.parameters()])):
            yield
    finally:
        random.setstate(drawn)
        for module, its, own in attributes:
            # torch.fx puts there what it took for constants, and builds stages of it.
            its |= {name: x for name, x in vars(module).items() if name.startswith("_tensor_constant")}
            vars(module).clear()
            vars(module).update(its)
            module._buffers.update(own)
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def cuda_devices(tree: Any) -> list[int]:
    """On which tensors of ``tree`` lie."""
    tensors = (x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor))
    return sorted({x.get_device() for x in tensors if x.device.type == "cuda"})
