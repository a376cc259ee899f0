"""A forward pass through all stages, one after the other, whose output every rank gets: for evaluation.

Each rank computes its stages and sends on what the next needs, shapes ahead; the last one's output goes to all. Nobody
computes beside another, so it takes as long as on one worker. Payload is counted as what it is called for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.errors import BadInput
from manyhands.partition.pipeline.handover import DTYPES
from manyhands.partition.pipeline.schedule import Schedule

#: Dims of a tensor, at most; its dtype and their number come first.
_DIMS = 14
_TAG = 7101


class Passing(nn.Module):
    """Called by all ranks of the pipeline with the same inputs; ``model`` holds the modules of this rank's stages."""

    def __init__(self, model: nn.Module, stages: dict[int, nn.Module], schedule: Schedule, group: Communicator) -> None:
        super().__init__()
        self.model = model
        self._stages, self._schedule, self._group = stages, schedule, group

    def train(self, mode: bool = True) -> Passing:
        """The stages follow."""
        super().train(mode)
        for stage in self._stages.values():
            stage.train(mode)
        return self

    def forward(self, inputs: Any) -> Any:
        """The output of the last stage, on every rank. Collective."""
        group, value = self._group, inputs
        last = self._schedule.stages - 1
        for s in range(last + 1):
            owner = self._schedule.stage_rank(s)
            if owner != group.rank:
                continue
            before = self._schedule.stage_rank(s - 1) if s else owner
            if before != owner:
                value = self._received(before)
            value = self._stages[s](value)
            after = self._schedule.stage_rank(s + 1) if s < last else owner
            if after != owner:
                self._send(value, after)
        return self._told(value if group.rank == self._schedule.stage_rank(last) else None)

    def _send(self, value: Any, to: int) -> None:
        tensors, how_many = tensors_of(value)
        group = self._group
        group.send(torch.tensor([how_many]), to, _TAG).wait()
        for x in tensors:
            group.send(_described(x), to, _TAG).wait()
            group.send(x.contiguous().view(-1).view(torch.uint8), to, _TAG).wait()

    def _received(self, frm: int) -> Any:
        group = self._group
        how_many = int(group.recv(torch.zeros(1, dtype=torch.int64), frm, _TAG).tensor)
        tensors = []
        for _ in range(abs(how_many)):
            like = _like(group.recv(torch.zeros(_DIMS + 2, dtype=torch.int64), frm, _TAG).tensor)
            group.recv(like.view(-1).view(torch.uint8), frm, _TAG)
            tensors.append(like)
        return tensors[0] if how_many < 0 else tuple(tensors)

    def _told(self, value: Any) -> Any:
        """The last stage's output, told to all."""
        group, root = self._group, self._schedule.stage_rank(self._schedule.stages - 1)
        tensors, how_many = ([], 0) if group.rank != root else tensors_of(value)
        count = torch.tensor([how_many])
        group.broadcast(count, root).wait()
        result = []
        for i in range(abs(int(count))):
            description = _described(tensors[i]) if tensors else torch.zeros(_DIMS + 2, dtype=torch.int64)
            group.broadcast(description, root).wait()
            like = tensors[i].detach().contiguous() if tensors else _like(description)
            group.broadcast(like.view(-1).view(torch.uint8), root).wait()
            result.append(like)
        return result[0] if int(count) < 0 else tuple(result)


def tensors_of(value: Any) -> tuple[list[Tensor], int]:
    """The tensors handed over, and how many; −1: one that is no tuple."""
    if isinstance(value, Tensor):
        return [value], -1
    if isinstance(value, tuple | list) and all(isinstance(x, Tensor) for x in value):
        return list(value), len(value)
    raise BadInput(f"A stage returned a {type(value).__name__}: stages hand over a tensor or a tuple of tensors.")


def _described(x: Tensor) -> Tensor:
    if x.dtype not in DTYPES or x.dim() > _DIMS:
        raise BadInput(f"A stage returned {x.dtype} of {x.dim()} dims, which no hand-over carries.")
    described = torch.zeros(_DIMS + 2, dtype=torch.int64)
    described[: x.dim() + 2] = torch.tensor([DTYPES.index(x.dtype), x.dim(), *x.shape])
    return described


def _like(described: Tensor) -> Tensor:
    kind, dims, *shape = described.tolist()
    return torch.empty(shape[:dims], dtype=DTYPES[kind])
