"""A worker's nodes of an AMPNet graph as a replica: a batch is pumped through it, and nodes update on the way.

Every parameter belongs to one node and every node to one rank of the pipeline axis, so nothing is replicated and
nothing averaged. A node's update is the user's optimizer on the node's own part of the pieces.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch, Ready
from manyhands.errors import NonFiniteLoss
from manyhands.partition.ampnet.graph import Graph, rows_in
from manyhands.partition.ampnet.nodes import Node, Transform
from manyhands.partition.ampnet.runtime import Runtime
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.data import DataReplica
from manyhands.partition.pipeline.replica import keep_stages


class _Part(NamedTuple):
    """Of a node's parameters those that lie side by side in a piece, and where the gradient of each lies in it."""

    piece: int
    lo: int
    hi: int
    places: list[tuple[nn.Parameter, Tensor]]


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
        self._parts = {name: self._parts_of(graph.nodes[name]) for name in self.runtime.learning}

    def _parts_of(self, node: Node) -> list[_Part]:
        """A node's parts: with one optimizer group and dtype it is one."""
        assert isinstance(node, Transform)
        mine = {id(p) for p in node.module.parameters()}
        found: list[_Part] = []
        for i, spans in enumerate(self._spans):
            for s in spans:
                if id(s.parameter) not in mine:
                    continue
                assert s.parameter.grad is not None, "a replica has laid it out"
                place = s.parameter, s.parameter.grad
                if found and found[-1].piece == i and found[-1].hi == s.start:
                    found[-1] = _Part(i, found[-1].lo, s.stop, [*found[-1].places, place])
                else:
                    found.append(_Part(i, s.start, s.stop, [place]))
        return found

    def _update_node(self, name: str, gathered: int) -> None:
        """The user's optimizer on the mean of a node's gradients, which begin anew."""
        t0 = time.perf_counter()
        for part in self._parts[name]:
            gradients = []
            for parameter, place in part.places:
                gradient = parameter.grad
                if gradient is None or gradient.is_sparse:  # no instance has needed it, or only some rows
                    gradient = place if gradient is None else place.add_(gradient)
                if gathered > 1:
                    gradient.div_(gathered)
                if self._l2:
                    gradient.add_(parameter.data, alpha=self._l2)
                gradients.append(gradient)
            self._updates.of(part.piece, part.lo, part.hi)(gradients)
            for (parameter, place), gradient in zip(part.places, gradients, strict=True):
                if gradient is place:
                    place.zero_()
                parameter.grad = None
        self.update_s += time.perf_counter() - t0

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[None]:
        """Within, a first gradient stays where autograd makes it; before and after, all lie in the pieces.

        To set to zero, to add and to read again is three passes over a node's parameters more, for each update.
        """
        for parameter in self._left_out:
            parameter.grad = None
        for name, parts in self._parts.items():
            for parameter, place in (place for part in parts for place in part.places):
                parameter.grad = place if self.runtime.learning[name].gathered else None
        yield
        for parts in self._parts.values():
            for parameter, place in (place for part in parts for place in part.places):
                if parameter.grad is not None and parameter.grad is not place:
                    place.copy_(parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
                parameter.grad = place

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """All instances of the batch forward and backward; the nodes have updated when this returns. Collective.

        Unlike `contract.Replica.gradients` it leaves in the pieces only what is gathered for later updates. Raises
        `NonFiniteLoss` on all ranks if an instance's loss was not finite; that instance has changed nothing.
        """
        t0, waited, updated = time.perf_counter(), self._comm.counters.wait_s, self.update_s
        with self._gathering():
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
