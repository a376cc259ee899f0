"""Sparse parameters: of a large table only the rows that a batch touches have a gradient, and only they are updated.

A table is the weight of an ``nn.Embedding`` or ``nn.EmbeddingBag`` made with ``sparse=True``. It becomes a piece of its
own; after a backward, ``piece.rows`` names the rows and ``piece.grad`` holds their gradients, one after the other. So
neither memory is cleared nor an update computed for what nothing has touched, and a step takes as long for a table of a
gigabyte as for a small one.

Exact: an optimizer is given rows only if it leaves all others as they are, which is plain SGD and Adagrad, both without
weight decay. For any other the table is dense like every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.contract import Piece, StateSlice


def tables(model: nn.Module) -> dict[int, nn.Module]:
    """By the id of a weight with sparse gradients, the module that looks up rows in it."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            found[id(module.weight)] = module
    return found


def updates_rows_alone(optimizer: torch.optim.Optimizer, group: int) -> bool:
    """Whether a row without a gradient stays as it is, and `RowUpdate` knows how the others change."""
    g = optimizer.param_groups[group]
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adagrad) or isinstance(g["lr"], Tensor):
        return False
    plain = not (g["weight_decay"] or g["maximize"] or g["differentiable"] or g.get("momentum"))
    return plain and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def take_gradient(piece: Piece, parameter: nn.Parameter) -> None:
    """Move the sparse gradient that backward has left at ``parameter`` into the piece."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        piece.rows, piece.grad = torch.empty(0, dtype=torch.int64), piece.flat.new_empty(0)
    elif gradient.layout is torch.strided:  # the table has been used whole as well
        piece.rows, piece.grad = torch.arange(len(parameter)), gradient.reshape(-1)
    else:
        gradient = gradient.coalesce()
        piece.rows, piece.grad = gradient.indices()[0], gradient.values().reshape(-1)


def before_lookup(module: nn.Module, tell: Callable[[Tensor], None]) -> None:
    """``tell`` which rows a training forward is about to look up, each once."""

    def told(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            tell(torch.unique(inputs[0]))

    module.register_forward_pre_hook(told)


class RowUpdate:
    """SGD or Adagrad on the touched rows of one table, with torch's own arithmetic for sparse gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, piece: Piece, parameter: str) -> None:
        self._optimizer, self._piece, self._parameter = optimizer, piece, parameter
        self._squares: Tensor | None = None  # Adagrad's
        self._steps = 0

    def __call__(self) -> None:
        """One update from the piece's gradient."""
        piece, group = self._piece, self._optimizer.param_groups[self._piece.group]
        assert piece.rows is not None
        table, values = piece.flat.view(-1, piece.width), piece.grad.view(-1, piece.width)
        self._steps += 1
        if isinstance(self._optimizer, torch.optim.SGD):
            table.index_add_(0, piece.rows, values, alpha=-group["lr"])
            return
        if self._squares is None:
            self._squares = torch.full_like(piece.flat, group["initial_accumulator_value"])
        squares = self._squares.view(-1, piece.width)
        squares.index_add_(0, piece.rows, values.square())
        rate = group["lr"] / (1 + (self._steps - 1) * group["lr_decay"])
        table.index_add_(0, piece.rows, values / squares[piece.rows].sqrt_().add_(group["eps"]), alpha=-rate)

    def state(self) -> list[StateSlice]:
        """As torch's Adagrad keeps it."""
        if self._squares is None:
            return [StateSlice(self._parameter, "used", -1, -1, torch.ones(()))] if self._steps else []
        return [
            StateSlice(self._parameter, "sum", 0, self._squares.numel(), self._squares),
            StateSlice(self._parameter, "step", -1, -1, torch.tensor(float(self._steps))),
        ]

    def load(self, state: Sequence[StateSlice]) -> None:
        """Take up a `state`, cut anyhow."""
        for part in state:
            if part.parameter != self._parameter:
                continue
            if part.key == "sum":
                if self._squares is None:
                    self._squares = torch.zeros_like(self._piece.flat)
                self._squares[part.lo : part.hi] = part.values.reshape(-1)
            elif part.key == "step":
                self._steps = int(part.values)
