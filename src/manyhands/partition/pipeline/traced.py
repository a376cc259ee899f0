"""A traced forward as parts: its operations in a row, and what each stage hands over to the next.

A part begins where a module's first operation does. A stage hands over whatever later ones still need, so residual and
longer skip connections may cross stages: what is needed further on passes through. Parameters, buffers and what is made
of shapes alone a stage gets anew.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import fx, nn

from manyhands.errors import BadInput
from manyhands.partition.pipeline.parts import Parts, in_mode
from manyhands.partition.pipeline.tracing import trace


class Traced(Parts):
    """The operations of a traced forward; a part begins where a module's first operation does."""

    def __init__(self, model: nn.Module, into: Sequence[str] | None = None) -> None:
        """Of modules of the user's only those are opened that some of ``into`` lie in; None: all."""
        self.model = model
        graph, self.closed = trace(model, into)
        self._nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self._input = next(n for n in graph.nodes if n.op == "placeholder")
        self._output = next(n for n in graph.nodes if n.op == "output")
        self.names, self.starts = [], {}
        self._first: list[int] = []  # the node with which each part begins
        for at, node in enumerate(self._nodes):
            self._begin(at, node)
        if not self.names:
            raise BadInput(f"{type(model).__name__} cannot be cut: its forward uses no module or parameter.")
        self._first[0] = 0  # what comes before the first module belongs to it
        self._place = {n: at for at, n in enumerate(self._nodes)} | {self._input: -1, self._output: len(self._nodes)}

    def _begin(self, at: int, node: fx.Node) -> None:
        """If ``node`` is the first operation of modules, a part begins here."""
        if node.op not in ("call_module", "get_attr"):
            return
        path = str(node.target).split(".")
        if node.op == "get_attr":
            path = path[:-1]
        new = [p for p in itertools.accumulate(path, lambda a, b: f"{a}.{b}") if p not in self.starts]
        if new:
            self.starts |= dict.fromkeys(new, len(self.names))
            lists = (nn.ModuleList, nn.ModuleDict)
            self.names.append(next(n for n in new if not isinstance(self.model.get_submodule(n), lists)))
            self._first.append(at)

    def module(self, lo: int, hi: int) -> nn.Module:
        """A graph of its own on the model's modules."""
        start = self._first[lo]
        stop = self._first[hi] if hi < len(self) else len(self._nodes)
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        given = self._live(start)
        value = graph.placeholder("value")
        for k, node in enumerate(given):
            new[node] = value if len(given) == 1 else graph.call_function(operator.getitem, (value, k))

        def take(node: fx.Node) -> fx.Node:
            if node not in new:  # fetched or derived again rather than handed over
                assert _is_derived(node) or self._place[node] >= start
                for needed in node.all_input_nodes:
                    take(needed)
                new[node] = graph.node_copy(node, take)
            return new[node]

        for node in self._nodes[start:stop]:
            if not _is_derived(node):  # those come when they are asked for
                take(node)
        if stop == len(self._nodes):
            graph.output(fx.map_arg(self._output.args[0], take))
        else:
            handed = [take(node) for node in self._live(stop)]
            graph.output(handed[0] if len(handed) == 1 else tuple(handed))
        return in_mode(fx.GraphModule(self.model, graph, type(self.model).__name__), self.model)

    def _live(self, at: int) -> list[fx.Node]:
        """What is computed before node ``at`` and needed from there on, in order."""
        if at == 0:
            return [self._input]
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = [n for user in (*self._nodes[at:], self._output) for n in user.all_input_nodes]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                if _is_derived(node):
                    stack += node.all_input_nodes
                elif self._place[node] < at:
                    found.add(node)
        return sorted(found, key=self._place.__getitem__)


def _is_derived(node: fx.Node) -> bool:
    """Whether a stage gets it anew: a parameter or buffer, or a number made of shapes."""
    if node.op == "get_attr" or (node.op == "call_method" and node.target in ("size", "dim")):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype")
    if node.target is len:
        return True
    arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return (
        arithmetic
        and bool(node.all_input_nodes)
        and all(_is_derived(n) and n.op != "get_attr" for n in node.all_input_nodes)
    )
