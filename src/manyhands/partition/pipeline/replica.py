"""A worker's stages of the model as a replica: what a strategy sees of a pipeline (survey §V-C).

A batch passes through the stages of all ranks along the pipeline axis, in micro-batches; loss and count come from the
last stage and are told to all. Every parameter belongs to one stage, so each rank of the axis has pieces of its own,
which it shares with the same stage of other replicas.

Payload per rank and step: activations forward and gradients backward at each cut, counted as ``cut``.
Guarantee: loss and gradients are those of one worker with the same micro-batches, up to summation order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch
from manyhands.errors import BadInput
from manyhands.partition.data import DataReplica, LastPass
from manyhands.partition.pipeline.passing import Passing
from manyhands.partition.pipeline.runtime import Pipeline
from manyhands.partition.pipeline.schedule import Schedule


def keep_stages(model: nn.Module, stages: dict[int, nn.Module], every: Sequence[nn.Module] = ()) -> None:
    """Take from ``model`` the parameters and buffers that none of ``stages``, which hold its modules, uses.

    What none of ``every`` stage there is uses goes with the first, so that somebody has it for checkpoints. Raises
    `BadInput` if there is nothing to train in them.
    """
    used = _tensors_of(stages.values())
    if 0 in stages and every:
        used |= _tensors_of([model]) - _tensors_of(every)
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None and id(tensor) not in used:
                    place[name] = None
    if not any(p.requires_grad for p in model.parameters()):
        refuse_untrainable(stages)


def refuse_untrainable(stages: Iterable[int]) -> NoReturn:
    """Raise `BadInput`: these are the stages of a worker."""
    raise BadInput(
        f"pipeline: stage {', '.join(map(str, stages))} has no trainable parameters, so its worker would have "
        "nothing to learn. Cut elsewhere, e.g. pipeline=\"one_f_one_b(cut='module')\", or into fewer stages."
    )


def _tensors_of(modules: Iterable[nn.Module]) -> set[int]:
    return {id(x) for module in modules for x in (*module.parameters(), *module.buffers())}


class PipelineReplica(DataReplica):
    """`DataReplica` of the parameters of this rank's ``stages``; its batches pass through all ranks of the axis."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Any,
        comm: Communicator,
        *,
        stages: dict[int, nn.Module],
        schedule: Schedule,
        recompute: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, loss, comm, divided=frozenset({"pipeline"}), **options)
        self._group = comm.over(frozenset({"pipeline"}))
        last = schedule.stages - 1
        self.pipeline = Pipeline(
            stages,
            schedule,
            self._group,
            loss if last in stages else None,
            recompute=recompute,
            shares=self._shares,
            autocast=self._autocast,
        )
        self._source = schedule.stage_rank(last)
        self.answering = Passing(model, stages, schedule, self._group)

    def _passes(self, batch: Batch, last_pass: LastPass) -> tuple[Tensor, float]:
        loss, count, divisor = self._through(batch)
        if divisor != 1:
            for piece in self.pieces:
                piece.grad.div_(divisor)
        return torch.tensor(loss), count

    def _through(self, batch: Batch, others: Collection[int] = ()) -> tuple[float, float, float]:
        """Loss, count and divisor of a batch that has passed all stages, on every rank. Collective."""
        t0 = time.perf_counter()
        with self._group.counting("cut"):
            outcome = self.pipeline.run(batch.inputs, batch.target, batch.count, others)
        told = torch.zeros(3, dtype=torch.float64)
        if outcome is not None:
            told.copy_(torch.tensor([float(outcome.loss), outcome.count, outcome.divisor], dtype=torch.float64))
        with self._group.counting("control"):
            self._group.broadcast(told, self._source).wait()
        # What is not forward or backward of its own stages is no compute of this rank's.
        self.compute_s -= time.perf_counter() - t0 - self.pipeline.times.compute_s
        loss, count, divisor = told.tolist()
        return loss, count, divisor
