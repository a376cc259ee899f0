"""AMPNet as a strategy: what the user says of it, and the worker that pumps a batch's instances through the graph.

A. L. Gaunt, M. A. Johnson, M. Riechert, D. Tarlow, R. Tomioka, D. Vytiniotis, S. Webster (2017), AMPNet: asynchronous
model-parallel training for dynamic neural networks, arXiv 1705.09786.

It lies in ``partition`` because the update is part of the cut: a node updates as soon as it has gathered enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem

if TYPE_CHECKING:
    from manyhands.partition.ampnet.replica import GraphReplica


@dataclass(frozen=True)
class AMPNet(Strategy):
    """Instances pass through a graph of nodes on the ranks of the mesh's pipeline axis; nodes update by themselves.

    At most ``max_active_keys`` instances of ``samples`` samples are on their way at once, and a node updates when it
    has gathered ``min_update_frequency`` of their gradients, by their mean. A step pumps one batch through.

    *Guarantee*: with ``max_active_keys=1, min_update_frequency=1`` it is SGD over the instances one after the other,
    bit for bit; else no gradient is staler than ``max_active_keys`` updates of its node. *Approximation*: gradients of
    the same batch are taken at different parameters, and which at which is decided by a race.

    Sends activations and gradients along the edges between ranks, as many as the data have them; counted as ``cut``.
    """

    max_active_keys: int = 4
    min_update_frequency: int = 1
    samples: int = 1

    name: ClassVar[str] = "ampnet"
    paper: ClassVar[Reference] = Reference(
        "A. L. Gaunt, M. A. Johnson, M. Riechert, D. Tarlow, R. Tomioka, D. Vytiniotis, S. Webster",
        "AMPNet: asynchronous model-parallel training for dynamic neural networks",
        2017,
        "arXiv 1705.09786",
        survey="V-C",
    )
    bears_cuts: ClassVar[bool] = True
    updates_within: ClassVar[bool] = True
    scheduled: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False
    plain_alone: ClassVar[bool] = False
    steadier: ClassVar[str] = "with ampnet, a smaller max_active_keys="

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Nothing about parameters: each belongs to one rank."""
        return Traffic()

    def problems(self, setting: Setting) -> list[Problem]:
        """Options out of range, replicas, and a clip by the norm of a gradient that never exists as one."""
        found = [
            Problem(f"ampnet({name}={value!r})", f"{name} is a whole number from 1.", f"E.g. {name}=4.")
            for name, value in (
                ("max_active_keys", self.max_active_keys),
                ("min_update_frequency", self.min_update_frequency),
                ("samples", self.samples),
            )
            if not is_whole(value, 1)
        ]
        if setting.workers > 1:
            found.append(
                Problem(
                    f"ampnet on {setting.workers} replicas",
                    "its ranks own nodes of one model, and nothing is averaged.",
                    f"Say mesh=pipeline={setting.workers} (--mesh pipeline={setting.workers}), or workers=1.",
                )
            )
        if setting.transport == "nccl":
            found.append(
                Problem(
                    "ampnet over nccl",
                    "messages come from whoever has one, and NCCL receives from named ranks only.",
                    "Use transport=shared, threads, gloo or mpi with device=cpu.",
                )
            )
        if setting.clip:
            found.append(
                Problem(
                    "clip with ampnet",
                    "nodes update by themselves, so nobody knows the norm of the whole gradient.",
                    "Leave clip out, or use another strategy.",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker, of a `GraphReplica`."""
        return AMPNetWorker(replica, comm)


class AMPNetWorker(Worker):
    """Its `step` is the replica's: nodes update within."""

    replica: GraphReplica

    def step(self, batch: Batch) -> Tensor:
        """Pump the instances of a batch through; their mean loss."""
        loss, _ = self.replica.gradients(batch)
        return loss

    @property
    def staleness(self) -> Mapping[int, int]:
        """Of this rank's updates, how many had a gradient of which staleness (their stalest visit)."""
        return self.replica.runtime.staleness

    def state_dict(self) -> dict[str, Any]:
        """What nodes have gathered since their last updates; between steps nothing else is on its way."""
        return {
            "gathered": {name: [x.updates, x.gathered, x.stalest] for name, x in self.replica.runtime.learning.items()},
            "gradients": [piece.grad.clone() for piece in self.replica.pieces],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        for name, counts in state["gathered"].items():
            node = self.replica.runtime.learning[name]
            node.updates, node.gathered, node.stalest = counts
        for piece, gradient in zip(self.replica.pieces, state["gradients"], strict=True):
            piece.grad.copy_(gradient)
