"""Payloads put together, and their gradients, of which some may be None."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, Payload


def tensor(x: Tensor | None) -> Tensor:
    """``x``, which flows forward, so it is there."""
    assert x is not None, "what flows forward are tensors"
    return x


def only(message: Message) -> Tensor:
    """The one tensor of a message; raises `BadInput` where there are others."""
    if len(message.payload) != 1:
        raise BadInput(f"{message.state}: it joins and cuts one tensor a message, and was sent {len(message.payload)}.")
    return tensor(message.payload[0])


def marked(x: Tensor, made_of: Sequence[Tensor]) -> Tensor:
    """``x``, which wants a gradient if anything that it was made of does; autograd itself says so where it looks on."""
    if not torch.is_grad_enabled() and any(y.requires_grad for y in made_of):
        return x.detach().requires_grad_()
    return x


def joined(gradients: Sequence[Tensor | None], likes: Sequence[Tensor], dim: int) -> Tensor | None:
    """Gradients side by side, zero where there is none; None if there is none at all."""
    if all(g is None for g in gradients):
        return None
    return torch.cat(
        [torch.zeros_like(like) if g is None else g for g, like in zip(gradients, likes, strict=True)], dim
    )


def added(payloads: Sequence[Payload]) -> Payload:
    """Gradients of one payload from several sides, in their order."""
    result = []
    for column in zip(*payloads, strict=True):
        total: Tensor | None = None
        for g in column:
            total = g if total is None else total if g is None else total + g
        result.append(total)
    return tuple(result)
