"""AMPNet's runtime: nodes on ranks, messages between them, a controller that admits instances (Gaunt et al. 2017).

Each rank owns some nodes and works through the messages that have come for them, gradients first: what frees memory and
updates parameters goes before what needs more. Messages between nodes of one rank are a queue, others travel. Rank 0 is
the controller: it owns the sources, admits an instance while fewer than ``max_active_keys`` are on their way, and an
instance is over when all its messages are back. Nobody waits for anybody else's update.

*Guarantee*: with one active key the instances go through one after the other, as in one process: bit for bit the same
parameters wherever nodes lie. *Approximation* with more: see `learning` for what gradients are stale by. Which messages
meet which parameters is then decided by a race (but on `simulated`, where virtual time decides).

Payload per instance: activations forward and gradients backward along the edges between ranks, and how large they are
the data decide; counted as ``cut``. Memory: activations of at most ``max_active_keys`` instances, and until a batch is
over those messages that the transport did not take at once (gloo and mpi; on shared memory what found no room).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import DONE, Communicator, Work
from manyhands.contract import rows_of
from manyhands.errors import BadInput, CommunicationError, Deadlock
from manyhands.partition.ampnet import wire
from manyhands.partition.ampnet.graph import Graph, Port, check_samples, output_of
from manyhands.partition.ampnet.learning import Learning, Update
from manyhands.partition.ampnet.message import Message, State
from manyhands.partition.ampnet.nodes import Store, Transform
from manyhands.partition.ampnet.wire import Kind, Parcel
from manyhands.partition.backward import backward

#: Updates that are remembered for whoever asks; what is counted is counted over all.
LOGGED = 10_000


@dataclass
class Outcome:
    """Of a batch: the mean of the instances' losses, weighted by their samples, and whether all were finite."""

    loss: float
    finite: bool


@dataclass
class _Batch:
    """The instances under way."""

    inputs: Any
    target: Any
    bounds: list[tuple[int, int]]
    learning: bool
    admitted: int = 0
    active: dict[int, int] = field(default_factory=dict)  # key → messages of it that are not back yet; on rank 0
    room: bool = True  # for instances, as far as is known: some have ended since others were admitted
    arrived: set[int] = field(default_factory=set)  # keys whose outputs have come; where the loss is
    answers: dict[int, Tensor] = field(default_factory=dict)  # there, too
    loss: float = 0.0
    finite: bool = True


class Runtime:
    """This rank's nodes at work. All ranks of ``comm`` make one, of the same graph and placement, and call it alike.

    ``place``: the rank of each node; sources lie on rank 0. ``loss`` as a task has it, needed where the loss node is.
    ``update(node, gathered)``: apply the mean of so many gathered gradients and set them to zero. ``samples``: of an
    instance, the last one of a batch may have fewer; its loss is a mean over them and counts as one gradient.
    ``autocast`` is entered around every forward of a module.
    """

    def __init__(
        self,
        graph: Graph,
        place: Mapping[str, int],
        comm: Communicator,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        update: Callable[[str, int], None],
        max_active_keys: int = 4,
        min_update_frequency: int = 1,
        samples: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        _check(graph, place, comm, samples)
        self.graph, self.place, self.loss = graph, dict(place), loss
        self.max_active_keys, self.samples = max_active_keys, samples
        self.learning = {
            name: Learning(name, max_active_keys, min_update_frequency)
            for name in graph.learners
            if place[name] == comm.rank
        }
        #: The newest updates of this rank's nodes, and of all how many had which staleness.
        self.updates: deque[Update] = deque(maxlen=LOGGED)
        self.staleness: Counter[int] = Counter()
        #: Most instances that were on their way at once; on rank 0.
        self.peak_active = 0
        self._comm, self._update, self._autocast = comm, update, autocast
        self._loss_node, self._loss_at = graph.loss, place[graph.loss]
        self._sources = graph.sources
        self._modules = {name for name, node in graph.nodes.items() if isinstance(node, Transform)}
        # By edge: the rank, node and port at its end, and those at its start.
        self._ends = [(place[e.end.node], *e.end) for e in graph.edges]
        self._starts = [(place[e.start.node], *e.start) for e in graph.edges]
        # By node and port: the edge.
        self._out = {name: [graph.leaving[Port(name, i)] for i in range(n.ways_out)] for name, n in graph.nodes.items()}
        self._in = {name: [graph.coming[Port(name, i)] for i in range(n.ways_in)] for name, n in graph.nodes.items()}
        self._stores: dict[str, Store] = {}
        self._forward: deque[tuple[int, Message]] = deque()
        self._backward: deque[tuple[int, Message]] = deque()
        self._sent: list[Work] = []
        self._ended = False
        self._batch = _Batch(None, None, [], learning=False)

    def train(self, inputs: Any, target: Any, count: int) -> Outcome:
        """Forward, backward and updates over ``count`` samples, as instances. Collective; the same on all ranks.

        Every rank gives the batch: rank 0 looks at the inputs, that of the loss at the target. When this returns nobody
        holds anything of any instance. A loss that is not finite sends no gradient back.
        """
        self._run(_Batch(inputs, target, self._bounds(count, self.samples), learning=True))
        told = torch.tensor([self._batch.loss / (count or 1), float(self._batch.finite)], dtype=torch.float64)
        with self._comm.counting("control"):
            self._comm.broadcast(told, self._loss_at).wait()
        return Outcome(float(told[0]), bool(told[1]))

    def answer(self, inputs: Any, count: int) -> Tensor:
        """The outputs of ``count`` samples along the first dim, on every rank, by forward passes alone. Collective."""
        self._run(_Batch(inputs, None, self._bounds(count, count if self.graph.batched else 1), learning=False))
        comm, answers = self._comm, self._batch.answers
        if comm.rank != self._loss_at:
            with self._named():
                (output,) = wire.receive(comm, self._loss_at).message.payload
            assert output is not None
            return output
        output = torch.cat([answers[key] for key in range(len(answers))])
        parcel = Parcel(Kind.OUTPUT, -1, Message((output,), State(0)))
        works = [work for p in range(comm.size) if p != comm.rank for work in wire.send(comm, p, parcel)]
        for work in works:
            work.wait()
        return output

    @staticmethod
    def _bounds(count: int, samples: int) -> list[tuple[int, int]]:
        return [(lo, min(lo + samples, count)) for lo in range(0, count, samples or 1)]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _run(self, batch: _Batch) -> None:
        self._batch, self._ended = batch, False
        self._stores = {
            name: Store(learning=batch.learning) for name, at in self.place.items() if at == self._comm.rank
        }
        with self._named(), torch.no_grad():  # what autograd is to see says so
            while True:
                if batch.room and self._comm.rank == 0:
                    self._admit()
                if self._ended:
                    break
                self._turn()
            for work in self._sent:
                work.wait()
            self._comm.barrier()  # else the next batch's first message might overtake the word that this one is over
        self._sent.clear()
        left = [f"{name} {store.left()}" for name, store in self._stores.items() if not store.empty]
        left += [f"{self._ends[edge][1]} is still to take {message.state}" for edge, message in self._forward]
        if left:
            self._forward.clear()
            raise BadInput(
                f"all instances are through, but {'; '.join(left)}. Of an instance one message comes to the loss, in "
                "which all others have met."
            )

    def _turn(self) -> None:
        """Take what has come, and work through one message; wait for one if there is none."""
        came = False
        while self._comm.size > 1 and wire.arrived(self._comm):
            self._take()
            came = True
        if self._backward:
            edge, message = self._backward.popleft()
            with_it = self._go_back
            name = self._starts[edge][1]
        elif self._forward:
            edge, message = self._forward.popleft()
            with_it = self._go_on
            name = self._ends[edge][1]
        elif self._comm.size == 1:
            raise Deadlock("no message is on its way")
        else:
            if not came:  # else it may have been the word that an instance, or all, are through
                self._take()
            return
        try:
            with_it(edge, message)
        except Exception as e:
            _blame(e, name, message.state)
            raise

    def _admit(self) -> None:
        """Let instances in, up to the limit; when all are through, tell the others. On rank 0."""
        batch = self._batch
        batch.room = False
        while batch.admitted < len(batch.bounds) and len(batch.active) < self.max_active_keys:
            key = batch.admitted
            batch.admitted += 1
            batch.active[key] = len(self._sources) if batch.learning else 1
            self.peak_active = max(self.peak_active, len(batch.active))
            inputs = rows_of(batch.inputs, *batch.bounds[key])
            for name, source in self._sources.items():
                try:
                    message = source.begin(key, inputs)
                except Exception as e:
                    _blame(e, name, State(key))
                    raise
                self._forth(self._out[name][0], message)
        if not batch.active:
            self._ended = True
            for p in range(1, self._comm.size):
                self._post(p, Parcel(Kind.END, -1, Message((), State(0))))

    def _came_home(self, key: int) -> None:
        """One of an instance's messages is back at its source; in evaluation, its output has been found."""
        active = self._batch.active
        active[key] -= 1
        if active[key] == 0:
            del active[key]
            self._batch.room = True

    # -- messages ------------------------------------------------------------------------------------------------------

    def _go_on(self, edge: int, message: Message) -> None:
        """A message comes in to one of this rank's nodes."""
        _, name, port = self._ends[edge]
        if name == self._loss_node:
            self._at_loss(edge, message)
            return
        node, store = self.graph.nodes[name], self._stores[name]
        if name in self._modules:
            with self._autocast():
                sent = node.forward(port, message, store)
            if store.learning and name in self.learning:
                self.learning[name].went(message.state)
        else:
            sent = node.forward(port, message, store)
        ways = self._out[name]
        for way, left in sent:
            self._forth(ways[way], left)

    def _go_back(self, edge: int, message: Message) -> None:
        """A gradient comes back to one of this rank's nodes."""
        _, name, port = self._starts[edge]
        if name in self._sources:
            self._came_home(message.state.key)
            return
        back = self.graph.nodes[name].backward(port, message, self._stores[name])
        if name in self.learning:
            self._learn(name, message)
        ways = self._in[name]
        for way, gradient in back:
            self._back(ways[way], gradient)

    def _learn(self, name: str, message: Message) -> None:
        wanted = any(g is not None for g in message.payload)
        update = self.learning[name].came_back(message.state, gradient=wanted)
        if update is not None:
            self._update(name, update.gathered)
            self.updates.append(update)
            self.staleness[update.staleness] += 1

    def _at_loss(self, edge: int, message: Message) -> None:
        """Where an output is compared with its target, or kept as an answer."""
        batch, key = self._batch, message.state.key
        output = output_of(message)
        if key in batch.arrived:
            raise BadInput(f"instance {key} comes here again: it has one output, perhaps of several rows.")
        batch.arrived.add(key)
        if not batch.learning:
            batch.answers[key] = output
            if self._comm.rank == 0:
                self._came_home(key)
            else:
                self._post(0, Parcel(Kind.ANSWERED, -1, Message((), State(key))))
            return
        lo, hi = batch.bounds[key]
        leaf = output.detach().requires_grad_(output.requires_grad)
        assert self.loss is not None, "checked when the runtime was made"
        with torch.enable_grad(), self._autocast():
            objective = _mean(self.loss(leaf, rows_of(batch.target, lo, hi)))
        value = objective.item()
        batch.loss += value * (hi - lo)
        if not math.isfinite(value):
            batch.finite = False
        elif objective.requires_grad:
            backward(objective)
        self._back(edge, Message((leaf.grad,), message.state))

    def _forth(self, edge: int, message: Message) -> None:
        """Along an edge to its end."""
        rank = self._ends[edge][0]
        if rank == self._comm.rank:
            self._forward.append((edge, message))
        else:
            self._post(rank, Parcel(Kind.FORWARD, edge, message))

    def _back(self, edge: int, gradient: Message) -> None:
        """Along an edge to its start."""
        rank = self._starts[edge][0]
        if rank == self._comm.rank:
            self._backward.append((edge, gradient))
        else:
            self._post(rank, Parcel(Kind.BACKWARD, edge, gradient))

    def _post(self, rank: int, parcel: Parcel) -> None:
        self._sent += [work for work in wire.send(self._comm, rank, parcel) if work is not DONE]

    def _take(self) -> None:
        """Receive a message, waiting for it if none is here."""
        kind, edge, message = wire.receive(self._comm)
        if kind is Kind.FORWARD:
            self._forward.append((edge, message))
        elif kind is Kind.BACKWARD:
            self._backward.append((edge, message))
        elif kind is Kind.ANSWERED:
            self._came_home(message.state.key)
        else:
            assert kind is Kind.END, "outputs are received by name"
            self._ended = True

    # -- where it went wrong -------------------------------------------------------------------------------------------

    def _held(self) -> str:
        for name, store in self._stores.items():
            if not store.empty:
                return f"node {name} {store.left()}"
        if self._batch.active:
            return f"instance {next(iter(self._batch.active))} is not back"
        return "it holds nothing of any instance"

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors between ranks say what this one was waiting for."""
        try:
            yield
        except CommunicationError as e:
            e.args = (f"{e} (ampnet: on rank {self._comm.rank} {self._held()})",)
            raise


def _blame(error: Exception, name: str, state: State) -> None:
    """What a node cannot do is told with its name and the instance."""
    if isinstance(error, BadInput):
        error.args = (f"node {name}: {error}",)
    elif not isinstance(error, CommunicationError):
        error.add_note(f"in node {name} of an ampnet graph, {state}")


def _mean(result: Any) -> Tensor:
    """An instance's objective: a mean, or the sum that a loss says it is."""
    if isinstance(result, Tensor):
        return result
    total, count = result
    objective: Tensor = total if count is None else total / (float(count) or 1.0)
    return objective


def _check(graph: Graph, place: Mapping[str, int], comm: Communicator, samples: int) -> None:
    if set(place) != set(graph.nodes) or not set(place.values()) <= set(range(comm.size)):
        raise BadInput(
            f"a placement of {sorted(place)} on ranks {sorted(set(place.values()))}: {comm.size} ranks hold "
            f"the nodes {', '.join(graph.nodes)}, each on one."
        )
    away = [name for name in graph.sources if place[name] != 0]
    if away:
        raise BadInput(f"sources {', '.join(away)} off rank 0: the controller there admits instances.")
    check_samples(graph, samples)
