"""A worker's nodes of an AMPNet graph as a replica: a batch is pumped through it, and nodes update on the way.

Every parameter belongs to one node and every node to one rank of the pipeline axis, so nothing is replicated and
nothing averaged. A node's update is the user's optimizer on the node's own part of the pieces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch, Piece, Ready
from manyhands.errors import NonFiniteLoss
from manyhands.partition.ampnet.graph import Graph, rows_in
from manyhands.partition.ampnet.nodes import Transform
from manyhands.partition.ampnet.runtime import Runtime
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.data import DataReplica
from manyhands.partition.pipeline.replica import keep_stages


class GraphReplica(DataReplica):
    """`DataReplica` of the parameters of this rank's nodes. Collective over the mesh's pipeline axis.

    ``graph`` holds ``model``'s modules (it may be the model); ``place`` says the rank of each node. The modules of
    others lose their parameters, see `keep_nodes`, which goes before the optimizer is made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Any,
        comm: Communicator,
        *,
        graph: Graph,
        place: Mapping[str, int],
        strategy: AMPNet,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, loss, comm, divided=frozenset({"pipeline"}), **options)
        group = comm.over(frozenset({"pipeline"}))
        self.watching = False  # a node that no instance has come to is not updated
        self.runtime = Runtime(
            graph,
            place,
            group,
            loss=loss,
            update=self._update_node,
            max_active_keys=strategy.max_active_keys,
            min_update_frequency=strategy.min_update_frequency,
            samples=strategy.samples,
            autocast=self._autocast,
        )
        self.answering = Answering(model, self.runtime)
        self._ranges = {name: self._range_of(graph.nodes[name]) for name in self.runtime.learning}

    def _range_of(self, node: Any) -> list[tuple[Piece, int, int]]:
        """A node's runs of elements: with one optimizer group and dtype it is one."""
        assert isinstance(node, Transform)
        mine = {id(p) for p in node.module.parameters()}
        found: list[tuple[Piece, int, int]] = []
        for piece, spans in zip(self.pieces, self._spans, strict=True):
            for s in spans:
                if id(s.parameter) not in mine:
                    continue
                if found and found[-1][0] is piece and found[-1][2] == s.start:
                    found[-1] = piece, found[-1][1], s.stop
                else:
                    found.append((piece, s.start, s.stop))
        return found

    def _update_node(self, name: str, gathered: int) -> None:
        """The user's optimizer on the mean of a node's gradients, which begin anew."""
        for piece, lo, hi in self._ranges[name]:
            if gathered > 1:
                piece.grad[lo:hi].div_(gathered)
            self.apply(piece, lo, hi)
            piece.grad[lo:hi].zero_()

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """All instances of the batch forward and backward; the nodes have updated when this returns. Collective.

        Unlike `contract.Replica.gradients` it leaves in the pieces only what is gathered for later updates. Raises
        `NonFiniteLoss` on all ranks if an instance's loss was not finite; that instance has changed nothing.
        """
        t0, waited, updated = time.perf_counter(), self._comm.counters.wait_s, self.update_s
        outcome = self.runtime.train(batch.inputs, batch.target, batch.count)
        waited, updated = self._comm.counters.wait_s - waited, self.update_s - updated
        self.compute_s += time.perf_counter() - t0 - waited - updated
        if not outcome.finite:
            raise NonFiniteLoss(self._comm.step)
        self.count = float(batch.count)
        return torch.tensor(outcome.loss, dtype=torch.float64), self.count


class Answering(nn.Module):
    """The model as evaluation calls it: on all ranks with the same inputs, forward alone."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.model = model
        self._runtime = runtime

    def train(self, mode: bool = True) -> Answering:
        """The nodes follow."""
        super().train(mode)
        self._runtime.graph.train(mode)
        return self

    def forward(self, inputs: Any) -> Tensor:
        """The outputs of all samples, on every rank. Collective."""
        return self._runtime.answer(inputs, rows_in(inputs))


def keep_nodes(model: nn.Module, graph: Graph, place: Mapping[str, int], rank: int) -> None:
    """Take from ``model`` the parameters and buffers of nodes that are not this rank's."""
    mine = [node.module for name, node in graph.nodes.items() if isinstance(node, Transform) and place[name] == rank]
    keep_stages(model, {rank: nn.ModuleList(mine)})
