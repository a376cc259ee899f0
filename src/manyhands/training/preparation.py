"""From a task and a plan to a run: data, model, optimizer, replica, worker."""

from __future__ import annotations

import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any

import torch

from manyhands import data as data_sets
from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy, carried, put_down
from manyhands.data import Splits
from manyhands.errors import BadInput
from manyhands.models import losses, optimizers, schedules
from manyhands.models.factory import settle
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.replica import GraphReplica, keep_nodes
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.data import DataReplica
from manyhands.partition.hybrid import HybridCut, HybridReplica
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.pipeline.replica import PipelineReplica, keep_stages
from manyhands.partition.pipeline.schedule import Schedule
from manyhands.partition.tensor import axis_of
from manyhands.partition.tensor.cut import Cut
from manyhands.partition.tensor.rehearsal import rehearsed
from manyhands.plan import Plan
from manyhands.task import Task, described
from manyhands.training import memory
from manyhands.training.gather import from_first
from manyhands.training.keeping import resume
from manyhands.training.member import Member
from manyhands.training.model_difference import Signature
from manyhands.training.run import Options, Run, Since, device_of, replicas
from manyhands.training.sampler import Sampler, steps_per_epoch, worker_seed

_BUILDING = threading.Lock()  # workers that are threads share torch's global generator


def prepare(member: Member, task: Task, plan: Plan, options: Options) -> Run:
    """Data, model, optimizer, replica and worker; then, if asked, everything as the newest checkpoint has it."""
    memory.forget_peak()
    comm = member.comm
    comm.mesh = plan.mesh if isinstance(plan.mesh, Mesh) else Mesh(data=comm.size)
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    splits = data_sets.load(task.data, folder=Path(options.data_dir) if options.data_dir else None)
    check_same_data(splits, options.data, comm)
    model = build_model(task, splits, comm, alike=strategy.whole_batch, cut=is_cut(plan, comm))
    whole: dict[str, Signature] = {
        name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()
    }
    parameters = sum(p.numel() for p in model.parameters())
    start_alike(model, plan, comm)
    layers = cut_layers(model, plan, splits, comm)
    on_nodes: dict[str, Any] = {}
    pipelining = None
    if isinstance(strategy, AMPNet):
        on_nodes = cut_nodes(model, strategy, splits, comm)
    else:  # where to cut may have been measured, under a launcher by each rank for itself
        pipelining = cut_stages(model, dataclasses.replace(plan, pipeline=from_first(comm, plan.pipeline)), comm)
    model.to(device_of(plan, comm))
    loss = losses.build(task.loss)
    optimizer = optimizers.build(task.optimizer, model.parameters())
    sampler = sampler_of(task, splits, strategy, comm)
    schedule = schedules.build(task.schedule, optimizer, steps=total_steps(task, sampler))
    common: dict[str, Any] = {
        "common": strategy.parameters == "common",
        "clip": task.clip,
        "precision": plan.precision,
        "shares": sampler.workers,
        "blocks": layers.blocks,
    }
    assert plan.micro_batches is not None
    replica: DataReplica
    if on_nodes:
        replica = GraphReplica(model, optimizer, loss, comm, **on_nodes, **common)
    elif isinstance(layers, HybridCut):
        replica = HybridReplica(model, optimizer, loss, comm, cut=layers, **common)
    elif pipelining is None:
        replica = DataReplica(
            model, optimizer, loss, comm, micro_batches=plan.micro_batches, sparse=strategy.sparse, **common
        )
    else:
        stages, in_turn = pipelining
        replica = PipelineReplica(
            model, optimizer, loss, comm, stages=stages, schedule=in_turn, recompute=plan.recompute, **common
        )
    with comm.counting("control"):
        worker = strategy.start(replica, replicas(comm) if strategy.bears_stages else comm)
    since = Since(sums=losses.reduction(loss) == "sum")
    ranks = list(range(comm.size))
    run = Run(
        task,
        plan,
        options,
        comm,
        splits,
        model,
        loss,
        replica,
        worker,
        schedule,
        sampler,
        since,
        ranks,
        worker.comm,
        whole,
        parameters,
    )
    if options.resume:
        resume(run)
    return run


def sampler_of(task: Task, splits: Splits, strategy: Strategy, comm: Communicator) -> Sampler:
    """What divides the batches among the workers of ``comm``."""
    whole, group = strategy.whole_batch, replicas(comm)
    return Sampler(
        len(splits.train),
        batch_size=task.batch_size,
        workers=1 if whole else group.size,
        rank=0 if whole else group.rank,
        seed=task.seed,
    )


def is_cut(plan: Plan, comm: Communicator) -> bool:
    """Whether some worker does not keep the whole model."""
    return replicas(comm).size < comm.size or axis_of(plan.tensor) == "data"


def build_model(
    task: Task, splits: Splits, comm: Communicator, *, alike: bool = False, cut: bool = False
) -> torch.nn.Module:
    """The model, from the task's seed; rank 0 goes on drawing where a single process would, others elsewhere.

    ``alike``: all go on as rank 0 does, because they compute on the same samples. So do the ranks of one replica.
    ``cut``: it is going to be cut, so a live model of the user's is copied for rank 0, too.
    """
    replica = replicas(comm).rank
    with _BUILDING:
        torch.manual_seed(task.seed)
        model = models.build(task.model, inputs=splits.inputs, classes=splits.classes)
        settle(model, lambda: splits.train.rows(torch.tensor([0])), name=described(task.model))
        # Threads have one module between them; one that is cut would not be the user's any more.
        shared = comm.transport == "threads" and isinstance(task.model, torch.nn.Module)
        if shared and (comm.rank > 0 or cut):
            model = copy.deepcopy(model)
        if replica > 0 and comm.transport != "threads" and not alike:
            torch.manual_seed(worker_seed(task.seed, replica, 0))
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"model {described(task.model)} has no trainable parameters; there is nothing to learn.")
    return model.train()


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
    if group.size == 1:
        return None
    assert plan.micro_batches is not None
    said = pipeline.parse(plan.pipeline)
    schedule = said.made(group.size, plan.micro_batches)
    assert said.cut is not None, "decided when the model was at hand"
    # To trace a model, torch.fx changes how modules are called in the whole process, where workers may be threads.
    with comm.counting("control"):
        comm.barrier()
    with _BUILDING:
        every = cut_into_stages(model, said.cut).stages
    with comm.counting("control"):
        comm.barrier()
    mine = {s: every[s] for s in schedule.stages_of(group.rank)}
    keep_stages(model, mine)
    return mine, schedule


def cut_nodes(model: torch.nn.Module, strategy: AMPNet, splits: Splits, comm: Communicator) -> dict[str, Any]:
    """The model's graph and who owns which node; ``model`` keeps the parameters of this rank's. Collective."""
    group = comm.over(frozenset({"pipeline"}))
    graph, place = fitted(model, strategy, group.size, splits.train.rows(torch.tensor([0]))[0])
    place = from_first(comm, place)
    keep_nodes(model, graph, place, group.rank)
    return {"graph": graph, "place": place, "strategy": strategy}


def cut_layers(model: torch.nn.Module, plan: Plan, splits: Splits, comm: Communicator) -> Cut:
    """Cut the layers as the plan's ``tensor`` says, in place. Collective."""
    group = comm.over(frozenset({axis_of(plan.tensor)}))
    if group.size == 1:
        return Cut()
    how = rehearsed(model, plan.tensor, group.size, splits.train.rows(torch.tensor([0]))[0])
    return how.cut(model, group)


def signature(splits: Splits) -> list[Any]:
    """By what two loads of one description are told apart: name, sizes, shape, classes."""
    tested = None if splits.test is None else len(splits.test)
    shape = None if splits.inputs is None else list(splits.inputs)
    return [splits.name, len(splits.train), tested, shape, splits.classes]


def check_same_data(splits: Splits, expected: list[Any] | None, comm: Communicator) -> None:
    """Refuse a worker that has found other data than the launcher or rank 0. Collective."""
    mine = signature(splits)
    first = from_first(comm, mine if expected is None else expected)
    if mine != first:
        raise BadInput(
            f"worker {comm.rank} sees other data ({_signed(mine)}, from {splits.source}) than the first that looked "
            f"({_signed(first)}). All have to see the same: name the folder with data_dir= (--data-dir), and let a "
            "factory of your own give the same samples at every call."
        )


def _signed(signature: list[Any]) -> str:
    name, train, test, shape, classes = signature
    return f"{name}: {train} + {test or 0} samples of shape {shape}, {classes} classes"


def total_steps(task: Task, sampler: Sampler) -> int:
    """How many steps the whole run has."""
    length = task.length
    if length["steps"] is not None:
        return length["steps"]
    return (length["epochs"] or 1) * steps_per_epoch(sampler.n, sampler.batch_size)
