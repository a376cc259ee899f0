"""Whether plans fit into memory: a bound that costs nothing first, `memory.fitting` where that does not decide.

    bound = what one worker holds with the whole batch + (4 + P) copies of its parameters

A worker's share of the batch is at most the whole, and a strategy keeps at most a vector for each worker and a few of
its own, so what this bound lets in does fit. A footprint takes 5 to 100 ms, which is too long for a thousand plans.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from manyhands.cluster import Cluster, Figure
from manyhands.communication.topology import Mesh
from manyhands.consistency.synchronous import Synchronous
from manyhands.errors import Problem
from manyhands.modelling.given import Given
from manyhands.modelling.memory.fitting import fits
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.parts import Memory
from manyhands.plan import Plan
from manyhands.training import environment

#: Vectors as long as the parameters that a strategy may keep beside those of other workers.
COPIES = 4


class Room:
    """Of a task on a cluster; of this machine memory is looked up."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._data_dir = None if given.data_dir is None else Path(given.data_dir)
        self._cluster = _this_machine(given.cluster) if given.here else given.cluster
        self._known: dict[Plan, Memory] = {}
        self._parameters_B = sum(p.numel() * p.element_size() for p in given.model.parameters())

    def short(self, plan: Plan, margin: float) -> Problem | None:
        """What is missing if a part ``margin`` of the memory stays free; None: the plan fits."""
        alone = plain(plan, 1, "single" if self._given.here else plan.transport)
        vectors_B = (COPIES + (plan.workers or 1)) * self._parameters_B
        if self._most_B(plan, self._footprint(alone), vectors_B) <= self._there_B * (1 - margin):
            return None
        return fits(self._footprint(plan), self._cluster, plan.workers or 1, margin)

    def needed_B(self, plan: Plan) -> int:
        """Of the worker with most: its process, or what its device holds."""
        memory = self._footprint(plan)
        return memory.resident_B if self._shared else memory.tensors_B

    @property
    def _shared(self) -> bool:
        """Whether the workers of a node have its memory together."""
        return self._cluster.device.kind == "cpu"

    @property
    def _there_B(self) -> float:
        device, node = self._cluster.device, self._cluster.node
        if not self._shared:
            return device.memory.si
        return device.memory.si * self._cluster.devices_per_node if node.memory is None else node.memory.si

    def _most_B(self, plan: Plan, alone: Memory, vectors_B: int) -> int:
        if not self._shared:
            return alone.tensors_B + vectors_B
        return min(plan.workers or 1, self._cluster.devices_per_node) * (alone.resident_B + vectors_B)

    def _footprint(self, plan: Plan) -> Memory:
        key = dataclasses.replace(plan, threads=1)
        if key not in self._known:
            given = self._given
            self._known[key] = footprint(given.task, key, given.model, given.splits, data_dir=self._data_dir)
        return self._known[key]


def plain(plan: Plan, workers: int, transport: str) -> Plan:
    """So many whole replicas that average gradients and do no more, in one pass each."""
    return dataclasses.replace(
        plan,
        strategy=Synchronous(update="replicated"),
        mesh=Mesh(data=workers),
        workers=workers,
        transport=transport,
        micro_batches=1,
        compress=None,
        tensor=None,
        pipeline=None,
        shard=None,
        recompute=False,
    )


def _this_machine(cluster: Cluster) -> Cluster:
    """With the memory that there is, which any number of workers have together."""
    found = environment.memory_B()
    many = dataclasses.replace(cluster.node, devices=Figure(4096, "count", "as many as one asks for"))
    if found is not None:
        many = dataclasses.replace(many, memory=Figure(found, "B", "the operating system"))
    return dataclasses.replace(cluster, node=many)
