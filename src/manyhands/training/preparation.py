"""From a task and a plan to a run: data, model, optimizer, replica, worker."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch

from manyhands import data as data_sets
from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy
from manyhands.data import Splits
from manyhands.errors import BadInput
from manyhands.models import losses, optimizers, schedules
from manyhands.models.factory import settle
from manyhands.plan import Plan
from manyhands.task import Task, described
from manyhands.training import allocator, memory
from manyhands.training.division import divide, is_cut
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
    check_same_strategy(strategy, comm)
    splits = data_sets.load(task.data, folder=Path(options.data_dir) if options.data_dir else None)
    check_same_data(splits, options.data, comm)
    model = build_model(task, splits, comm, alike=strategy.whole_batch, cut=is_cut(plan, comm))
    whole: dict[str, Signature] = {
        name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()
    }
    parameters = sum(p.numel() for p in model.parameters())
    divided = divide(model, plan, splits, comm)
    model.to(device_of(plan, comm))
    loss = losses.build(task.loss)
    optimizer = optimizers.build(task.optimizer, model.parameters())
    sampler = sampler_of(task, splits, strategy, comm)
    schedule = schedules.build(task.schedule, optimizer, steps=total_steps(task, sampler))
    replica = divided(
        model,
        optimizer,
        loss,
        comm,
        common=strategy.parameters == "common",
        clip=task.clip,
        precision=plan.precision,
        shares=sampler.workers,
    )
    allocator.give_back()
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


def check_same_strategy(strategy: Strategy, comm: Communicator) -> None:
    """Refuse a worker that a launcher has started with other settings than the first. Collective."""
    mine, first = str(strategy), from_first(comm, str(strategy))
    if mine != first:
        raise BadInput(
            f"the workers were started with other settings:\n  worker 0: {first}\n  worker {comm.rank}: {mine}\n"
            "What one sends the others have to understand: start all with the same --strategy and --compress."
        )


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
