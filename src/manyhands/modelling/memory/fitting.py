"""Whether a plan fits a cluster's devices, by how much it does not, and what would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from manyhands.cluster import Cluster
from manyhands.consistency.synchronous import Synchronous
from manyhands.data import Splits
from manyhands.errors import BadInput, Problem
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.parts import Footprint, Memory
from manyhands.modelling.memory.process import Loaded, Process
from manyhands.plan import Plan
from manyhands.task import Task


def fits(memory: Memory, cluster: Cluster, workers: int, margin: float = 0.1) -> Problem | None:
    """None if every device holds its worker's tensors and every node its workers' processes, else what is missing.

    A GPU holds tensors; a processor's cores share their node's memory, in which a process is resident as a whole, and
    what workers map of each other exists once. ``margin``: the part of a device's or node's memory that stays free.
    """
    device, node = cluster.device, cluster.node
    largest = max(memory.workers, key=lambda w: w.tensors_B)
    if device.kind != "cpu":
        return _missing(largest.tensors_B, device.memory.si, margin, f"a worker on {device.name}", _most(largest))
    here = min(workers, cluster.devices_per_node)
    room_B = device.memory.si * cluster.devices_per_node if node.memory is None else node.memory.si
    needed_B = sum(_own_B(memory, rank) for rank in range(here))
    return _missing(needed_B, room_B, margin, f"{here} workers on a node of {cluster.name}", _most(memory.largest))


def would_fit(
    task: Task,
    plan: Plan,
    model: nn.Module,
    splits: Splits,
    cluster: Cluster,
    margin: float = 0.1,
    *,
    measured: Process | None = None,
    data: Loaded | None = None,
) -> Problem | None:
    """`fits` of a plan that is decided; the cure names the first changes that are predicted to fit, three at most."""
    workers = plan.workers or 1

    def problem(task: Task, plan: Plan) -> Problem | None:
        return fits(footprint(task, plan, model, splits, measured=measured, data=data), cluster, workers, margin)

    found = problem(task, plan)
    if found is None:
        return None
    cures = []
    for said, changed, other in _smaller(task, plan):
        try:
            if problem(changed, other) is None:
                cures.append(said)
        except BadInput:
            continue
        if len(cures) == 3:
            break
    cure = (
        f"What would fit: {'; or '.join(cures)}."
        if cures
        else "Nothing tried fits: take a smaller model, or more workers."
    )
    return dataclasses.replace(found, cure=cure)


def _smaller(task: Task, plan: Plan) -> Iterator[tuple[str, Task, Plan]]:
    """What takes less, the mildest first."""
    if plan.mesh is not None and not isinstance(plan.mesh, str) and plan.mesh["pipeline"] > 1 and not plan.recompute:
        yield "recompute=True (--recompute)", task, dataclasses.replace(plan, recompute=True)
    for parts in (2, 4, 8, 16):
        size = task.batch_size // parts
        if size >= max(plan.workers or 1, 1):
            yield f"batch_size={size} (--batch-size {size})", dataclasses.replace(task, batch_size=size), plan
    if isinstance(plan.strategy, Synchronous) and (plan.workers or 1) > 1:
        for stage in range((plan.shard or 0) + 1, 4):
            strategy = dataclasses.replace(plan.strategy, update="sharded")
            said = f"shard={stage} (--shard {stage})"
            yield said, task, dataclasses.replace(plan, shard=stage, strategy=strategy)
    if not isinstance(task.optimizer, str) or not task.optimizer.startswith("sgd"):
        yield (
            "optimizer=sgd (--optimizer sgd), which keeps no state",
            dataclasses.replace(task, optimizer="sgd(lr=0.1)"),
            plan,
        )


def _missing(needed_B: float, room_B: float, margin: float, who: str, most: str) -> Problem | None:
    usable_B = room_B * (1 - margin)
    if needed_B <= usable_B:
        return None
    return Problem(
        f"{_said(needed_B)} for {who}",
        f"there is {_said(room_B)}, of which {margin:.0%} stays free: {_said(needed_B - usable_B)} too much.",
        f"{most} Take a smaller batch, recompute in a pipeline, share out more (shard=), or sgd instead of adam.",
    )


def _own_B(memory: Memory, rank: int) -> int:
    """Of a worker: what is told for the one that it is like, without what is counted for another already."""
    like = max((w for w in memory.workers if w.rank <= rank), key=lambda w: w.rank, default=memory.workers[0])
    return like.resident_B - (like.mapped_B if rank else 0)


def _most(worker: Footprint) -> str:
    parts = {
        name: getattr(worker, f"{name}_B")
        for name in ("parameters", "gradients", "optimizer", "activations", "buffers", "data", "process")
    }
    name = max(parts, key=lambda part: parts[part])
    return f"Most of it: {name}, {_said(parts[name])}."


def _said(size_B: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_B >= scale:
            return f"{size_B / scale:.1f} {unit}"
    return f"{size_B / 1e3:.0f} kB"
