"""The passes of a plan's model: a micro-batch that it learns from, and a chunk that it answers, stage by stage."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.topology import Mesh, shares
from manyhands.contract import Strategy
from manyhands.data import Splits
from manyhands.data.dataset import Dataset
from manyhands.modelling.memory.liveness import Pass, passes
from manyhands.models import losses
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.tensor import axis_of
from manyhands.partition.tensor.rehearsal import Rehearsal
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.division import cut_layers
from manyhands.training.evaluation import chunk_of


@dataclass(frozen=True)
class Traced:
    """Each stage of the model (the whole is one), learning from a micro-batch and answering a chunk."""

    learning: tuple[Pass, ...]
    answering: tuple[Pass, ...]
    batch_B: int
    chunk_B: int


_TRACES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Traced]] = weakref.WeakKeyDictionary()


def traced(task: Task, plan: Plan, model: nn.Module, splits: Splits, *, rows: int, evaluated: bool) -> Traced:
    """Of a share of ``rows`` samples; kept for as long as the model lives."""
    assert isinstance(plan.mesh, Mesh)
    test = splits.test if evaluated else None
    chunk = 0 if test is None else min(chunk_of(rows), shares(len(test), plan.mesh["data"])[0][1])
    micro_batches = max(min(plan.micro_batches or 1, rows), 1)
    key = (
        *(rows, micro_batches, chunk, str(task.loss), plan.precision, plan.tensor, plan.pipeline),
        *(plan.mesh["tensor"], plan.mesh["pipeline"], splits.name, splits.inputs),
    )
    known = _TRACES.setdefault(model, {})
    if key not in known:
        stages = _stages(plan, plan.mesh, model, splits)
        known[key] = _trace(task, plan, stages, splits, rows, -(-rows // micro_batches), chunk)
    return known[key]


def _trace(
    task: Task, plan: Plan, stages: Sequence[nn.Module], splits: Splits, rows: int, at_once: int, chunk: int
) -> Traced:
    loss = losses.build(task.loss)
    inputs, target = _first(splits.train, at_once)
    learning = passes(stages, inputs, target, loss, precision=plan.precision)
    batch_B = _size_B((inputs, target)) * rows // at_once
    if not chunk or splits.test is None or loss is None:
        return Traced(tuple(learning), (), batch_B, 0)
    asked = _first(splits.test, chunk)
    answering = passes(stages, *asked, loss, learning=False)
    return Traced(tuple(learning), tuple(answering), batch_B, _size_B(asked))


def _stages(plan: Plan, mesh: Mesh, model: nn.Module, splits: Splits) -> Sequence[nn.Module]:
    """The model of the first rank along the tensor axis, in its stages."""
    assert isinstance(plan.strategy, Strategy)
    mine = model
    if axis_of(plan.tensor) != "data" and mesh["tensor"] > 1:
        comm = Rehearsal(0, mesh.size)
        comm.mesh = mesh
        mine = copy.deepcopy(model)
        cut_layers(mine, plan, splits, comm)
    if mesh["pipeline"] == 1:
        return [mine]
    if mine is model:
        mine = copy.deepcopy(model)
    return cut_into_stages(mine, pipeline.parse(plan.pipeline, plan.strategy).cut or ()).stages


def _first(dataset: Dataset, rows: int) -> tuple[Any, Any]:
    return dataset.rows(torch.arange(rows) % len(dataset))


def _size_B(tree: Any) -> int:
    return sum(x.nbytes for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor))
