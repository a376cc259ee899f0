"""A recursive network over binary trees, as an AMPNet graph: each sample's graph is the sample's own tree.

    h_leaf = e(token),   h_inner = tanh(W [o(operator), h_left, h_right] + b),   outputs = V h_root + c

R. Socher, C. Lin, A. Ng, C. Manning (2011), Parsing natural scenes and natural language with recursive neural networks,
ICML. A state says where in the tree it is by the number of the place in a heap: the root is 1, the children of i are
2i and 2i + 1. So a node finds its parent by its state alone, and siblings meet in a `Group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.partition.ampnet.graph import Graph
from manyhands.partition.ampnet.message import Payload, State
from manyhands.partition.ampnet.nodes import Concat, Cond, Drop, Group, Isu, Loss, Phi, Source, Transform, Ungroup


class Look(nn.Module):
    """An embedding of tokens from ``first``; the place, which comes along, is not looked at."""

    def __init__(self, tokens: int, hidden: int, first: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, hidden)
        self._first = first

    def forward(self, token: Tensor, place: Tensor) -> Tensor:
        """``(1,) → (1, hidden)``."""
        embedded: Tensor = self.table(token - self._first)
        return embedded


class Merge(nn.Module):
    """``(1, h)`` of the operator and ``(2, h)`` of both children → ``(1, h)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * hidden, hidden)

    def forward(self, operator: Tensor, children: Tensor) -> Tensor:
        """The parent."""
        return torch.tanh(self.linear(torch.cat([operator, children.reshape(1, -1)], -1)))


def tree_rnn(classes: int, *, hidden: int = 32, leaves: int = 2, operators: int = 4) -> Graph:
    """``{"token": (1, most), "place": (1, most)} → (1, classes)``; for ``strategy=ampnet``, and data ``boolean_trees``.

    ``place`` 0 is none. Tokens are the ``leaves`` kinds of leaf, then the ``operators``.
    """
    hidden, kinds = whole("model tree_rnn: hidden", hidden), whole("model tree_rnn: leaves", leaves)
    nodes = {
        "tree": Source(_nodes),
        "unroll": Ungroup(_places),
        "kind": Cond(_is_inner),
        "leaf": Transform(Look(kinds, hidden, 0)),
        "operator": Transform(Look(whole("model tree_rnn: operators", operators), hidden, kinds)),
        "up": Phi(2),
        "root": Cond(_is_root),
        "siblings": Group(_parent, _side, _two),
        "meet": Concat(2),
        "cell": Transform(Merge(hidden)),
        "over": Isu(Drop("at", "inner")),
        "head": Transform(nn.Linear(hidden, classes)),
        "loss": Loss(),
    }
    edges = [
        *("tree -> unroll", "unroll -> kind", "kind.0 -> leaf", "kind.1 -> operator"),
        *("leaf -> up.0", "up -> root", "root.0 -> siblings", "operator -> meet.0", "siblings -> meet.1"),
        *("meet -> cell", "cell -> up.1", "root.1 -> over", "over -> head", "head -> loss"),
    ]
    return Graph(nodes, edges)


vars(tree_rnn)["data"] = "boolean_trees(samples=200, test=20)"  # what samples it takes
vars(tree_rnn)["paper"] = Reference(
    "R. Socher, C. C.-Y. Lin, A. Y. Ng, C. D. Manning",
    "Parsing natural scenes and natural language with recursive neural networks",
    2011,
    "ICML",
)


def _nodes(inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    there = inputs["place"][0] > 0
    return (inputs["token"][0][there], inputs["place"][0][there]), {}


def _places(state: State, payload: Payload) -> Sequence[State]:
    places = payload[1]
    assert places is not None
    found = places.tolist()
    all_of_them = set(found)
    return [state.put(at=at, inner=int(2 * at in all_of_them)) for at in found]


def _is_inner(state: State) -> int:
    return state["inner"]


def _is_root(state: State) -> int:
    return state["at"] == 1


def _parent(state: State) -> State:
    return state.put(at=state["at"] // 2, inner=1)


def _side(state: State) -> int:
    return state["at"] % 2


def _two(_: State) -> int:
    return 2
