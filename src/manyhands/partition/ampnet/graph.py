"""An AMPNet graph: named nodes and edges between their ports, checked when it is made, printed as it was written.

    Graph(
        {"x": Source(pick), "hidden": Transform(nn.Linear(4, 8)), "head": Transform(nn.Linear(8, 2)), "loss": Loss()},
        ["x -> hidden", "hidden -> head", "head -> loss"],
    )

``cond.1 -> phi.0`` names ports; a name alone is port 0. It is a module: parameters are called ``node.parameter``, and
calling it runs it in one process with autograd through everything, which is what any distributed run must equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyhands.contract import rows_of
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.ampnet.message import Message
from manyhands.partition.ampnet.nodes import Loss, Node, Source, Store, Transform


class Port(NamedTuple):
    """A port of a node; prints as it is written."""

    node: str
    number: int

    def __str__(self) -> str:
        return self.node if self.number == 0 else f"{self.node}.{self.number}"


class Edge(NamedTuple):
    """From an out port to an in port."""

    start: Port
    end: Port

    def __str__(self) -> str:
        return f"{self.start} -> {self.end}"


class Graph(nn.Module):
    """Nodes by name, and edges as text. Raises `BadInput` with everything that is wrong.

    Every port has one edge (a `Broadcast` fans out, a `Phi` or `Concat` joins), there is one `Loss` and a `Source` or
    more, and a cycle leads through a node that changes the state. ``batched``: an instance may hold several samples
    along the first dim of its tensors; else it is one sample, whose graph is its own.
    """

    def __init__(self, nodes: Mapping[str, Node], edges: Sequence[str], *, batched: bool = False) -> None:
        super().__init__()
        self.nodes = dict(nodes)
        self.batched = batched
        for name, node in self.nodes.items():
            own = isinstance(node, Transform) and (hasattr(self, name) or name in ("edges", "leaving", "coming"))
            if not name.isidentifier() or own:
                raise BadInput(f"a node called {name!r}: names are Python identifiers, and none of a module's own.")
            if isinstance(node, Transform):
                self.add_module(name, node.module)
        self.edges = [_edge(text, self.nodes) for text in edges]
        #: The edge that leaves an out port, and that which comes in by an in port, by number.
        self.leaving = {e.start: i for i, e in enumerate(self.edges)}
        self.coming = {e.end: i for i, e in enumerate(self.edges)}
        found = [*_ports(self), *_kinds(self)]
        if not found:
            found = [*_cycles(self), *_shared(self), *_widths(self)]
        if found:
            raise BadInput("this graph does not hold together: " + "; ".join(found) + f".\n{self}")

    @property
    def sources(self) -> dict[str, Source]:
        """Where instances come in."""
        return {name: node for name, node in self.nodes.items() if isinstance(node, Source)}

    @property
    def loss(self) -> str:
        """The name of the node where outputs come to."""
        return next(name for name, node in self.nodes.items() if isinstance(node, Loss))

    @property
    def learners(self) -> list[str]:
        """The names of nodes with trainable parameters."""
        return [name for name, node in self.nodes.items() if isinstance(node, Transform) and node.learns]

    def __str__(self) -> str:
        lines = [f"  {name}: {node}" for name, node in self.nodes.items()] + [f"  {e}" for e in self.edges]
        return "\n".join(["Graph(", *lines, ")"])

    def __repr__(self) -> str:
        return str(self)

    def forward(self, inputs: Any) -> Tensor:
        """The outputs of all samples, one after the other, along the first dim; autograd looks on."""
        count = rows_in(inputs)
        if self.batched:
            return self._instance(inputs)
        return torch.cat([self._instance(rows_of(inputs, i, i + 1)) for i in range(count)])

    def _instance(self, inputs: Any) -> Tensor:
        (output,) = [output_of(message) for edge, message in self.passing(inputs) if edge.end.node == self.loss]
        return output

    def passing(self, inputs: Any) -> Iterator[tuple[Edge, Message]]:
        """An instance's messages forward, each as it comes to the end of its edge and before what is there takes it.

        Raises `BadInput` at the end unless the instance has come to the loss, once, and left nothing behind.
        """
        stores = {name: Store(learning=False) for name in self.nodes}
        coming = deque((self._leaving(name, 0), source.begin(0, inputs)) for name, source in self.sources.items())
        outputs = 0
        while coming:
            edge, message = coming.popleft()
            yield edge, message
            (name, port), node = edge.end, self.nodes[edge.end.node]
            if isinstance(node, Loss):
                output_of(message)
                outputs += 1
                continue
            coming.extend((self._leaving(name, way), sent) for way, sent in node.forward(port, message, stores[name]))
        stuck = [f"{name} {store.left()}" for name, store in stores.items() if not store.empty]
        if stuck or not outputs:
            raise BadInput(f"an instance does not come to the loss: {'; '.join(stuck) or 'nothing arrives there'}.")
        if outputs > 1:
            raise BadInput(
                f"an instance comes to the loss {outputs} times: it has one output, perhaps of several rows."
            )

    def _leaving(self, name: str, way: int) -> Edge:
        return self.edges[self.leaving[Port(name, way)]]


def output_of(message: Message) -> Tensor:
    """What comes to the loss. Raises `BadInput` unless it is one tensor."""
    if len(message.payload) != 1 or message.payload[0] is None:
        raise BadInput(
            f"{message.state} brings {len(message.payload)} tensors to the loss, which takes one. Let the last module "
            "return one."
        )
    return message.payload[0]


def check_norms(graph: Graph, samples: int, batches: Iterable[int]) -> None:
    """Refuse instances in which BatchNorm has no variance; ``batches``: how many samples batches hold."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.modules()):
        return
    sizes = set(batches)

    def fewest(samples: int) -> int:
        return min(min(n, n % samples or samples) for n in sizes)

    if fewest(samples) >= 2:
        return
    works = next((s for s in range(max(2, samples), max(sizes) + 1) if fewest(s) >= 2), None)
    raise BadInput(
        f"ampnet(samples={samples}) with BatchNorm, on batches of {' and '.join(map(str, sorted(sizes)))}: it "
        f"normalises within an instance, and the smallest is of {fewest(samples)} sample, which has no variance. "
        + (
            "Use another norm, or another batch size."
            if works is None or not graph.batched
            else f"Use samples={works}."
        )
    )


def check_samples(graph: Graph, samples: int) -> None:
    """Refuse instances of several samples where each sample has a graph of its own."""
    if samples > 1 and not graph.batched:
        raise BadInput(
            f"ampnet(samples={samples}) for a graph that takes one sample an instance: each sample has a graph of its "
            "own. Use samples=1, or Graph(…, batched=True) if all have the same."
        )


def rows_in(inputs: Any) -> int:
    """How many samples a pytree of tensors holds."""
    return next(len(x) for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor))


def _edge(text: str, nodes: Mapping[str, Node]) -> Edge:
    start, arrow, end = text.partition("->")
    if not arrow:
        raise BadInput(f"edge {text!r}: the form is 'a -> b', with ports as in 'a.1 -> b.0'.")
    return Edge(_port(start, nodes), _port(end, nodes))


def _port(text: str, nodes: Mapping[str, Node]) -> Port:
    name, dot, number = text.strip().partition(".")
    if name not in nodes:
        raise UnknownName("node", name, nodes)
    if dot and not number.isdecimal():
        raise BadInput(f"port {text.strip()!r}: a port is a number from 0, as in {name}.1.")
    return Port(name, int(number) if dot else 0)


def _ports(graph: Graph) -> list[str]:
    """Ports that do not exist, have no edge, or several."""
    found = []
    starts, ends = [e.start for e in graph.edges], [e.end for e in graph.edges]
    for name, node in graph.nodes.items():
        for ports, ways, what in ((starts, node.ways_out, "out"), (ends, node.ways_in, "in")):
            mine = [p.number for p in ports if p.node == name]
            found += [f"{name} has no {what} port {n}" for n in sorted(set(mine)) if n >= ways]
            found += [f"nothing is at {what} port {n} of {name}" for n in range(ways) if n not in mine]
            found += [f"{mine.count(n)} edges are at {what} port {n} of {name}" for n in set(mine) if mine.count(n) > 1]
    return found


def _kinds(graph: Graph) -> list[str]:
    found = [] if graph.sources else ["it has no source"]
    losses = sum(isinstance(node, Loss) for node in graph.nodes.values())
    return found if losses == 1 else [*found, f"it has {losses} losses instead of one"]


def _cycles(graph: Graph) -> list[str]:
    """A cycle on which the state stays as it is: two rounds could not be told apart. And what no source leads to."""
    after: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for e in graph.edges:
        after[e.start.node].append(e.end.node)
    waiting = {name: 0 for name in graph.nodes}
    for name, others in after.items():
        if not graph.nodes[name].changes_state:
            for other in others:
                waiting[other] += 1
    free = [name for name, n in waiting.items() if n == 0]
    for name in free:
        if not graph.nodes[name].changes_state:
            for other in after[name]:
                waiting[other] -= 1
                if waiting[other] == 0:
                    free.append(other)
    round_and_round = [name for name in graph.nodes if name not in free]
    if round_and_round:
        return [f"a cycle among {', '.join(round_and_round)} leads through no node that changes the state"]
    reached, ahead = set(graph.sources), list(graph.sources)
    while ahead:
        for other in after[ahead.pop()]:
            if other not in reached:
                reached.add(other)
                ahead.append(other)
    return [f"no source leads to {name}" for name in graph.nodes if name not in reached]


def _shared(graph: Graph) -> list[str]:
    owner: dict[int, str] = {}
    found = []
    for name, node in graph.nodes.items():
        if isinstance(node, Transform):
            for p in node.module.parameters():
                if owner.setdefault(id(p), name) != name:
                    found.append(f"{owner[id(p)]} and {name} share a parameter (let a loop visit one node twice)")
    return list(dict.fromkeys(found))


def _widths(graph: Graph) -> list[str]:
    """Features that do not fit where both ends are known."""
    known: dict[Port, int | None] = {}
    found: dict[str, None] = {}
    for _ in graph.nodes:  # what is known grows in each round, and a round brings it one node further
        for name, node in graph.nodes.items():
            before = [known.get(graph.edges[graph.coming[Port(name, i)]].start) for i in range(node.ways_in)]
            try:
                for i, width in enumerate(node.widths(before)):
                    known[Port(name, i)] = width
            except ValueError as e:
                found[f"{name} {e}"] = None
    return list(found)
