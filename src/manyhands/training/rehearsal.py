"""A plan held against the model, before anything is started: does the cut fit, and what comes of it."""

from __future__ import annotations

import dataclasses

import torch

from manyhands.communication.topology import Mesh
from manyhands.data import Dataset
from manyhands.errors import BadInput
from manyhands.partition.ampnet.graph import check_norms
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.data import arguments
from manyhands.partition.pipeline import cut as stages
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.description import MICRO_BATCHES
from manyhands.partition.pipeline.rehearsal import rehearse
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.sharded.units import units_of
from manyhands.partition.tensor import axis_of
from manyhands.partition.tensor.rehearsal import rehearsed as cut_layers
from manyhands.plan import Plan, Resolved
from manyhands.task import Task
from manyhands.training.sampler import batch_sizes


def rehearsed(decided: Resolved, model: torch.nn.Module, task: Task, train: Dataset) -> Resolved:
    """Refuse a cut that does not fit the model, before anything is started; with a note of what is cut and how."""
    plan = decided.plan
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    mesh, micro_batches = plan.mesh, plan.micro_batches
    tensor, ranks, notes = mesh["tensor"], mesh["pipeline"], list(decided.notes)
    if isinstance(plan.strategy, AMPNet):
        if task.loss is None:
            raise BadInput("ampnet with loss=None: outputs come to a loss node. Give the loss to the task.")
        graph, place = fitted(model, plan.strategy, ranks, train.rows(torch.tensor([0]))[0])
        check_norms(graph, plan.strategy.samples, batch_sizes(len(train), task.batch_size, task.steps))
        each = [", ".join(name for name, at in place.items() if at == rank) for rank in range(ranks)]
        notes.append("; ".join(f"nodes of worker {rank}: {names}" for rank, names in enumerate(each)))
        return dataclasses.replace(decided, notes=tuple(notes))
    if task.loss is None and (ranks > 1 or isinstance(plan.strategy, PipeDream)):
        raise BadInput(
            f"{plan.strategy} on {mesh} with loss=None: the last stage hands outputs to a loss. Give the loss to the "
            "task and let the model return outputs."
        )
    if axis_of(plan.tensor) == "data":
        if task.loss is None:
            raise BadInput(
                f"tensor={plan.tensor}: the outputs go to a loss of the task's, and loss=None leaves it to the model."
            )
        tensor = mesh["data"]
    if (plan.shard or 0) > 1 and mesh["data"] > 1:
        notes.append(f"shard={plan.shard}: {units_of(model, arguments(*train.rows(torch.tensor([0])), task.loss))}")
    if tensor > 1:
        sample, _ = train.rows(torch.tensor([0]))
        how = cut_layers(model, plan.tensor, tensor, sample, checked=True)
        notes.append(f"cut among {tensor} workers: {how}")
        if how.left:
            plan = dataclasses.replace(plan, tensor=how.said)
    if isinstance(plan.strategy, PipeDream) and ranks == 1:
        notes.append(
            "pipedream without a pipeline axis: one stage has nothing to stash, so this is plain synchronous training "
            "with an update for every micro-batch. Say e.g. mesh=pipeline=2 (--mesh pipeline=2) for a pipeline"
        )
    if ranks > 1:
        notes += _of_micro_batches(task, plan, model, len(train))
        said = pipeline.parse(plan.pipeline, plan.strategy)
        schedule = said.made(ranks, micro_batches)
        if micro_batches < ranks:
            notes.append(
                f"micro_batches={micro_batches} on {ranks} workers never keeps all of them busy; "
                f"a plan takes {MICRO_BATCHES * ranks} by itself (--micro-batches)"
            )
        if said.cut is None:
            rows = min(len(train), -(-task.batch_size // (mesh["data"] * micro_batches)))
            said = said.at(stages.cut_points(model, schedule.stages, train.rows(torch.arange(rows))[0]))
        into = stages.cut(model, said.cut or ())
        if len(into.stages) != schedule.stages:
            raise BadInput(
                f"pipeline={said}: {schedule.stages} stages on {ranks} ranks want {schedule.stages - 1} modules to cut "
                f"before, and {len(into.stages) - 1} are named."
            )
        few = train.rows(torch.arange(min(len(train), task.batch_size, 4)))[0]
        rehearse(model, into, schedule, few)
        notes.append(f"cut into {len(into.stages)} stages: {'; '.join(str(into).splitlines())}")
        plan = dataclasses.replace(plan, pipeline=str(said))
    return dataclasses.replace(decided, plan=plan, notes=tuple(notes))


def _of_micro_batches(task: Task, plan: Plan, model: torch.nn.Module, samples: int) -> list[str]:
    """What is to be known of micro-batches so small; raises where BatchNorm could not do with them."""
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    share = min(task.batch_size, samples) // plan.mesh["data"]
    fewest = share // plan.micro_batches
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        if fewest < 2:
            raise BadInput(
                f"a batch of {task.batch_size} as {plan.micro_batches} micro-batches on each of {plan.mesh['data']} "
                f"replicas: BatchNorm normalises within a micro-batch, and {fewest} samples have no variance. Use a "
                f"larger batch, or at most micro_batches={max(share // 2, 1)} (--micro-batches)."
            )
        return [f"BatchNorm normalises within a micro-batch, of {fewest} samples here"]
    if fewest < 1:
        return [f"{share} samples a replica in {plan.micro_batches} micro-batches: some of them are empty"]
    return []
