"""A module as a node; with parameters it is AMPNet's parameterised payload transform (PPT)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store
from manyhands.partition.backward import backward_from


@dataclass(frozen=True, eq=False)
class Transform(Node):
    """A module: called with the tensors of the payload, gives a tensor or a tuple of them.

    With trainable parameters it is AMPNet's *parameterised payload transform*, which gathers gradients and updates on
    its own; without, its plain one. Inputs and autograd's graph are stored until the gradient comes back.
    """

    module: nn.Module

    @property
    def learns(self) -> bool:
        """Whether it has trainable parameters."""
        return any(p.requires_grad for p in self.module.parameters())

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        if not store.learning:
            return [(0, Message(_tuple(self.module(*self._given(message.payload))), message.state))]
        leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in message.payload]
        with torch.enable_grad():
            made = _tuple(self.module(*self._given(leaves)))
        store.keep(message.state, (leaves, made))
        return [(0, Message(tuple(x.detach().requires_grad_(x.requires_grad) for x in made), message.state))]

    @functools.cached_property
    def _overwrites(self) -> bool:
        return any(getattr(m, "inplace", False) for m in self.module.modules())

    def _given(self, payload: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """A module that overwrites its input gets a copy: what it was sent may be stored elsewhere."""
        return [x if x is None else x.clone() for x in payload] if self._overwrites else payload

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        leaves, made = store.take(message.state)
        pairs = [(x, g) for x, g in zip(made, message.payload, strict=True) if g is not None and x.requires_grad]
        if pairs:
            backward_from(tuple(x for x, _ in pairs), tuple(g for _, g in pairs))
        return [(0, Message(tuple(None if x is None else x.grad for x in leaves), message.state))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        takes, gives = width_of(self.module)
        if takes is not None and before[0] is not None and takes != before[0]:
            raise ValueError(f"takes {takes} features and is sent {before[0]}")
        return [gives]

    def __str__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        return f"Transform({type(self.module).__name__}, {n:,} parameters)"


def width_of(module: nn.Module) -> tuple[int | None, int | None]:
    """How many features, the last dim, a module takes and gives; None: not known without trying."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return None, module.embedding_dim
    if type(module) is nn.Sequential and len(module):
        takes, gives = width_of(module[0])
        for part in list(module)[1:]:
            elementwise = isinstance(part, nn.ReLU | nn.Tanh | nn.Sigmoid | nn.GELU | nn.Dropout | nn.LayerNorm)
            gives = gives if elementwise else width_of(part)[1]
        return takes, gives
    return None, None


def _tuple(made: Any) -> tuple[Tensor, ...]:
    made = (made,) if isinstance(made, Tensor) else made
    if not isinstance(made, tuple | list) or not all(isinstance(x, Tensor) for x in made):
        raise BadInput(f"its module returned a {type(made).__name__}; nodes send on a tensor or a tuple of tensors.")
    return tuple(made)
