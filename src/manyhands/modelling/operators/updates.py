"""An optimizer's update as one operator of a table: its name says what it does, its operands what it is done to.

Plain SGD runs over all parameters as one vector, so that it depends on their elements; Adam and the like go from one
parameter to the next, a dozen calls each, so that it depends on how many there are as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from manyhands.modelling import operations
from manyhands.modelling.operations import Operation

#: Tensors of state as large as a parameter; of others two are taken.
_STATE = {"sgd": 0, "sgd+momentum": 1, "adagrad": 1, "rmsprop": 1}


def kind(optimizer: torch.optim.Optimizer) -> str:
    """By which updates are told apart: sgd, sgd+momentum, adam …"""
    group = optimizer.param_groups[0]
    said = type(optimizer).__name__.lower()
    if said == "sgd":
        said += "+momentum" if group.get("momentum") else ""
        said += "+decay" if group.get("weight_decay") else ""
    return said


def of(optimizer: torch.optim.Optimizer, numels: Sequence[int], dtype: str = "float32") -> Operation:
    """The update of parameters with so many elements each."""
    said = kind(optimizer)
    size_B = sum(numels) * getattr(torch, dtype).itemsize
    whole = operations.update({"": size_B}, state=_STATE.get(said.removesuffix("+decay"), 2), dtype=dtype)
    return replace(whole, name=f"update:{said}", operands=tuple((n,) for n in numels), results=())
