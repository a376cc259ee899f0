"""The model divided among the ranks as its plan says, and what makes a replica of this rank's part."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from manyhands.communication.communicator import Communicator
from manyhands.contract import Strategy, carried, put_down
from manyhands.data import Splits
from manyhands.partition.ampnet.chain import graph_of
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.replica import GraphReplica, keep_nodes
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.data import DataReplica
from manyhands.partition.hybrid import HybridCut, HybridReplica
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.pipeline.replica import PipelineReplica, keep_stages
from manyhands.partition.pipeline.schedule import Schedule
from manyhands.partition.pipeline.stashing import StashingReplica
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.sharded.replica import ShardedReplica
from manyhands.partition.tensor import axis_of
from manyhands.partition.tensor.cut import Cut
from manyhands.partition.tensor.rehearsal import rehearsed
from manyhands.plan import Plan
from manyhands.training.gather import first_decides, from_first
from manyhands.training.run import replicas

#: ``(model, optimizer, loss, comm, **options)``: the replica of the part of the model that is here.
MakesReplica = Callable[..., DataReplica]

_TRACING = threading.Lock()  # changes how modules are called in the whole process, where workers may be threads


def divide(model: torch.nn.Module, plan: Plan, splits: Splits, comm: Communicator) -> MakesReplica:
    """Leave of ``model`` what the plan gives to this rank. Collective."""
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    start_alike(model, plan, comm)
    layers = cut_layers(model, plan, splits, comm)
    if isinstance(strategy, AMPNet):
        return functools.partial(GraphReplica, **cut_nodes(model, strategy, splits, comm))
    # Where to cut may have been measured, under a launcher by each rank for itself.
    pipelining = cut_stages(model, dataclasses.replace(plan, pipeline=from_first(comm, plan.pipeline)), comm)
    if pipelining is not None:
        stages, schedule = pipelining
        makes: MakesReplica = PipelineReplica
        if isinstance(strategy, PipeDream):
            makes = functools.partial(StashingReplica, strategy=strategy)
        return functools.partial(
            makes, stages=stages, schedule=schedule, recompute=plan.recompute, blocks=layers.blocks
        )
    if isinstance(layers, HybridCut):
        return functools.partial(HybridReplica, cut=layers, blocks=layers.blocks)
    assert plan.micro_batches is not None
    if shares_out(plan, comm):
        return sharing_out(plan, splits)
    return functools.partial(
        DataReplica, micro_batches=plan.micro_batches, sparse=strategy.sparse, blocks=layers.blocks
    )


def is_cut(plan: Plan, comm: Communicator) -> bool:
    """Whether some worker does not keep the whole model."""
    return replicas(comm).size < comm.size or axis_of(plan.tensor) == "data" or shares_out(plan, comm)


def sharing_out(plan: Plan, splits: Splits) -> Callable[..., ShardedReplica]:
    """What makes a replica of a whole model that keeps a slice of each of its parameters."""
    assert plan.shard is not None
    assert plan.micro_batches is not None
    sample = splits.train.rows(torch.tensor([0]))
    return functools.partial(ShardedReplica, stage=plan.shard, sample=sample, micro_batches=plan.micro_batches)


def shares_out(plan: Plan, comm: Communicator) -> bool:
    """Whether gradients, or parameters too, are divided among the workers of the data axis."""
    return (plan.shard or 0) > 1 and replicas(comm).size > 1


def start_alike(model: torch.nn.Module, plan: Plan, comm: Communicator) -> None:
    """What is going to be cut becomes rank 0's, so that the parts are parts of one model. Collective."""
    if not is_cut(plan, comm):
        return  # a replica sees to it
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            shared = carried(tensor, name)
            comm.broadcast(shared).wait()
            tensor.data.copy_(put_down(shared, tensor))


def cut_stages(
    model: torch.nn.Module, plan: Plan, comm: Communicator
) -> tuple[dict[int, torch.nn.Module], Schedule] | None:
    """This rank's stages, the only ones that ``model`` keeps, and the schedule; None where there is no pipeline."""
    group = comm.over(frozenset({"pipeline"}))
    if group.size == 1 and not isinstance(plan.strategy, PipeDream):
        return None
    assert plan.micro_batches is not None
    assert isinstance(plan.strategy, Strategy)
    said = pipeline.parse(plan.pipeline, plan.strategy)
    schedule = said.made(group.size, plan.micro_batches)
    if group.size == 1:
        return {0: model}, schedule
    assert said.cut is not None, "decided when the model was at hand"
    with comm.counting("control"):
        comm.barrier()
    with _TRACING:
        every = cut_into_stages(model, said.cut).stages
    with comm.counting("control"):
        comm.barrier()
    mine = {s: every[s] for s in schedule.stages_of(group.rank)}
    keep_stages(model, mine, every)
    return mine, schedule


def cut_nodes(model: torch.nn.Module, strategy: AMPNet, splits: Splits, comm: Communicator) -> dict[str, Any]:
    """The model's graph and who owns which node; ``model`` keeps the parameters of this rank's. Collective."""
    group = comm.over(frozenset({"pipeline"}))
    graph = graph_of(model)
    sample, _ = splits.train.rows(torch.tensor([0]))
    place = first_decides(comm, lambda: fitted(model, strategy, group.size, sample)[1])
    keep_nodes(model, graph, place, group.rank)
    return {"graph": graph, "place": place, "strategy": strategy}


def cut_layers(model: torch.nn.Module, plan: Plan, splits: Splits, comm: Communicator) -> Cut:
    """Cut the layers as the plan's ``tensor`` says, in place. Collective."""
    group = comm.over(frozenset({axis_of(plan.tensor)}))
    if group.size == 1:
        return Cut()
    how = rehearsed(model, plan.tensor, group.size, splits.train.rows(torch.tensor([0]))[0])
    return how.cut(model, group)
