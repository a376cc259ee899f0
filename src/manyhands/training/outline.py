"""What a plan comes to before anything runs: what each worker holds, and what it sends in a step.

Every rank's part is made in this process as its worker would make it, and a share of a batch passes through it in a
rehearsal, so that bytes are counted by the code that counts them in training. Times are not predicted here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.topology import Mesh, shares
from manyhands.contract import Block, Strategy, rows_of
from manyhands.data import Splits
from manyhands.models import losses, optimizers
from manyhands.partition.ampnet.chain import graph_of
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.place import sent_B as nodes_send_B
from manyhands.partition.ampnet.replica import keep_nodes
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.hybrid import HybridCut
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline import schedule as schedules
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.pipeline.schedule import Schedule
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.tensor import axis_of
from manyhands.partition.tensor.rehearsal import Rehearsal
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.division import cut_layers, cut_stages, shares_out, sharing_out

#: Of samples that each have a graph of their own so many tell what the others send.
FEW = 64


@dataclass(frozen=True)
class Part:
    """What one worker has and sends. Memory counts as its own also where one copy serves several."""

    rank: int
    where: dict[str, int]  # its coordinates
    stages: tuple[int, ...]
    parameters: int  # elements
    parameters_B: int
    gradients_B: int
    optimizer_B: int
    sent_B: float  # payload of the strategy a step, on average
    cut_B: int = 0  # payload of the cut a step
    nodes: tuple[str, ...] = ()  # of an AMPNet graph those that are here
    #: Of the user's parameters those that are here: whole (None), or which part.
    holds: dict[str, Block | None] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "holds"}
        return {**shown, "stages": list(self.stages), "nodes": list(self.nodes)}


@dataclass(frozen=True)
class Outline:
    """A plan that is decided, and what each of its workers has."""

    plan: Plan
    notes: tuple[str, ...]
    whole: dict[str, tuple[int, ...]]  # the user's parameters
    parts: list[Part]
    schedule: Schedule | None  # of a pipeline

    @property
    def bubble(self) -> float | None:
        """Of the schedule, with stages of equal cost."""
        return None if self.schedule is None else schedules.bubble(self.schedule)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "plan": self.plan.as_table(),
            "notes": list(self.notes),
            "workers": [part.as_dict() for part in self.parts],
            "bubble": self.bubble,
        }


def outline(
    task: Task,
    plan: Plan,
    notes: Sequence[str],
    model: nn.Module,
    splits: Splits,
    *,
    ranks: Sequence[int] | None = None,
) -> Outline:
    """Of a plan that is decided, for ``model`` as its factory made it, which is left as it is; of all ``ranks`` if
    none are named.
    """
    mesh = plan.mesh
    assert isinstance(mesh, Mesh)
    rows = min(len(splits.train), shares(task.batch_size, mesh["data"])[0][1])
    if isinstance(plan.strategy, AMPNet):
        return _of_nodes(task, plan, notes, model, splits, rows)
    whole = axis_of(plan.tensor) == "data" or mesh["tensor"] == mesh["pipeline"] == 1  # nothing passes a cut in a step
    sent = {} if whole else _cut_B(plan, mesh, model, splits, max(rows, 1))
    slots, parts, schedule = _slots(task), [], None
    for rank in range(mesh.size) if ranks is None else ranks:
        comm = Rehearsal(rank, mesh.size)
        comm.mesh = mesh
        mine = copy.deepcopy(model)
        layers = cut_layers(mine, plan, splits, comm)
        pipelining = cut_stages(mine, plan, comm)
        stages: tuple[int, ...] = (0,)
        if pipelining is not None:
            stages, schedule = tuple(pipelining[0]), pipelining[1]
        where = {axis: at for axis, at in mesh.coordinates(rank).items() if mesh[axis] > 1}
        if isinstance(layers, HybridCut):  # a rehearsal has the images of one worker only
            images = min(len(splits.train), task.batch_size)
            cut_B = layers.sent_B([hi - lo for lo, hi in shares(images, mesh.size)], rank)
        else:
            cut_B = sum(sent[comm.over(frozenset({"tensor"})).rank, stage] for stage in stages) if sent else 0
        if isinstance(plan.strategy, PipeDream):
            assert plan.micro_batches is not None
            learnt_B = sum(p.nbytes for p in mine.parameters() if p.requires_grad)
            cut_B += plan.strategy.averaged_B(learnt_B, mesh["data"], min(plan.micro_batches, max(rows, 1)))
        blocks: Mapping[str, Block] = layers.blocks
        if shares_out(plan, comm):
            optimizer, loss = optimizers.build(task.optimizer, mine.parameters()), losses.build(task.loss)
            replica = sharing_out(plan, splits)(mine, optimizer, loss, comm, common=True)
            blocks, cut_B = replica.blocks, replica.sent_B()
        holds = {name: blocks.get(name) for name, _ in mine.named_parameters()}
        part = Part(rank, where, stages, *_memory_and_payload(plan, mesh, mine, holds, slots), cut_B, holds=holds)
        if plan.shard == 2:  # its parts are of gradients and optimizer state
            held, held_B = sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())
            part = dataclasses.replace(part, parameters=held, parameters_B=held_B, holds=dict.fromkeys(holds))
        parts.append(part)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Outline(plan, tuple(notes), shapes, parts, schedule)


def _of_nodes(task: Task, plan: Plan, notes: Sequence[str], model: nn.Module, splits: Splits, rows: int) -> Outline:
    """Of a graph whose nodes lie on ranks. What the graph of each sample sends is a mean over the first ones."""
    mesh, strategy = plan.mesh, plan.strategy
    assert isinstance(mesh, Mesh)
    assert isinstance(strategy, AMPNet)
    first = splits.train.rows(torch.arange(rows))[0]
    graph, place = fitted(model, strategy, mesh.size, rows_of(first, 0, 1))
    few = rows if graph.batched else min(rows, FEW)
    bounds = [(0, few)] if graph.batched else [(i, i + 1) for i in range(few)]
    sent = [nodes_send_B(graph, place, mesh.size, rows_of(first, lo, hi)) for lo, hi in bounds]
    slots, parts = _slots(task), []
    for rank in range(mesh.size):
        mine = copy.deepcopy(model)
        keep_nodes(mine, graph_of(mine), place, rank)
        holds: dict[str, Block | None] = {name: None for name, _ in mine.named_parameters()}
        where = {axis: at for axis, at in mesh.coordinates(rank).items() if mesh[axis] > 1}
        cut_B = sum(each[rank] for each in sent) * rows // max(few, 1)
        nodes = tuple(name for name, at in place.items() if at == rank)
        held = _memory_and_payload(plan, mesh, mine, holds, slots)
        parts.append(Part(rank, where, (0,), *held, cut_B, nodes, holds))
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Outline(plan, tuple(notes), whole, parts, None)


def _memory_and_payload(
    plan: Plan, mesh: Mesh, model: nn.Module, holds: dict[str, Block | None], slots: int
) -> tuple[int, int, int, int, float]:
    """Elements; bytes of parameters, gradients and optimizer state; payload a step."""
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    # The shapes, by axes along which others have the same, and bytes an element.
    pieces: dict[tuple[frozenset[str], int], list[tuple[int, ...]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            block = holds[name]
            cut = ({block.axis} if block is not None else set()) | {"pipeline"}
            key = frozenset(axis for axis in mesh if axis not in cut), p.element_size()
            pieces.setdefault(key, []).append(tuple(p.shape))
    shared = strategy.parameters == "common" and strategy.lockstep  # each element is updated by one of its holders
    state, sent = 0.0, 0.0
    for (axes, itemsize), shapes in pieces.items():
        holders = math.prod(mesh[axis] for axis in axes)
        state += slots * sum(map(math.prod, shapes)) * itemsize / (holders if shared else 1)
        sent += strategy.traffic_of(shapes, holders if strategy.lockstep else mesh["data"], itemsize).sent_B_per_step
    held_B = sum(p.nbytes for p in model.parameters())
    learnt_B = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(p.numel() for p in model.parameters()), held_B, learnt_B, math.ceil(state), sent


def _slots(task: Task) -> int:
    """How many tensors of a parameter's size the optimizer keeps for it."""
    parameter = nn.Parameter(torch.zeros(3))
    trial = optimizers.build(task.optimizer, [parameter])
    parameter.grad = torch.zeros(3)
    trial.step()
    return sum(isinstance(x, Tensor) and x.shape == (3,) for x in trial.state.get(parameter, {}).values())


def _cut_B(plan: Plan, mesh: Mesh, model: nn.Module, splits: Splits, rows: int) -> dict[tuple[int, int], int]:
    """By tensor rank and stage: what a step of ``rows`` samples sends within the cut, forward and backward."""
    result = {}
    across = [rank for rank in range(mesh.size) if mesh.coordinates(rank).get("data", 0) == 0]
    for rank in across:
        if mesh.coordinates(rank).get("pipeline", 0):
            continue  # the same layers are cut alike, whichever stage they lie on
        comm = Rehearsal(rank, mesh.size)
        comm.mesh = mesh
        mine = copy.deepcopy(model)
        cut_layers(mine, plan, splits, comm)
        stages: Sequence[nn.Module] = [mine]
        if mesh["pipeline"] > 1:
            stages = cut_into_stages(mine, pipeline.parse(plan.pipeline, plan.strategy).cut or ()).stages
        # What is sent grows by the sample, so a few tell the rest: so many that nothing is rounded among the ranks.
        few = mesh["tensor"]
        some, twice = (
            _sent_by_stage(stages, splits.train.rows(torch.arange(n) % len(splits.train))[0], comm)
            for n in (few, 2 * few)
        )
        for s, (least, more) in enumerate(zip(some, twice, strict=True)):
            result[comm.over(frozenset({"tensor"})).rank, s] = least + (rows - few) * (more - least) // few
    return result


def _sent_by_stage(stages: Sequence[nn.Module], inputs: Any, comm: Rehearsal) -> list[int]:
    """What each stage sends: in its own sums and joins, forward to the next one and backward to the one before."""
    sent, value = [], inputs
    with torch.random.fork_rng(devices=[]):
        for k, stage in enumerate(stages):
            for module in stage.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a share may have one sample, which has no variance
            before = comm.counters.sent_B("cut")
            given = torch.utils._pytree.tree_map(_leaf, value) if k else value
            value = stage(given)
            outputs = [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
            ends = [x for x in outputs if x.requires_grad]
            torch.autograd.backward(ends, [torch.ones_like(x) for x in ends])
            passed = sum(x.nbytes for x in outputs) if k + 1 < len(stages) else 0
            leaves = torch.utils._pytree.tree_leaves(given) if k else []
            returned = sum(x.nbytes for x in leaves if isinstance(x, Tensor) and x.requires_grad)
            sent.append(comm.counters.sent_B("cut") - before + passed + returned)
    return sent


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
