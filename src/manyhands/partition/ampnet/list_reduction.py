"""A recurrent network over a list, as an AMPNet graph whose loop runs as often as the list is long (2017, section 6).

    h_0 = h₀,   h_{t+1} = tanh(W [e(x_t), h_t] + b),   outputs = V h_n + c

The loop is in the graph: a `Phi` where it is entered and comes round, a change of state that counts, and a branch on
whether the list is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.checks import whole
from manyhands.partition.ampnet.graph import Graph
from manyhands.partition.ampnet.message import Payload, State
from manyhands.partition.ampnet.nodes import (
    Add,
    Begin,
    Broadcast,
    Concat,
    Cond,
    Drop,
    Isu,
    Loss,
    Phi,
    Source,
    Transform,
    Ungroup,
)
from manyhands.partition.ampnet.strategy import AMPNet


class Start(nn.Module):
    """The state before the list, which is learned; whatever it is called with, ``(1, hidden)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(1, hidden))

    def forward(self, _: Tensor) -> Tensor:
        """The state."""
        return self.state + 0  # what is sent on is not the parameter itself


def list_rnn(classes: int, *, hidden: int = 64, embedding: int = 16, tokens: int = 14) -> Graph:
    """``{"token": (1, longest), "length": (1,)} → (1, classes)``; for ``strategy=ampnet``, and data ``list_reduction``.

    Parameters: tokens·e + h + (e + h)·h + h + h·classes + classes.
    """
    hidden, embedding = whole("model list_rnn: hidden", hidden), whole("model list_rnn: embedding", embedding)
    nodes = {
        "list": Source(_tokens),
        "both": Broadcast(2),
        "unroll": Ungroup(_positions),
        "embed": Transform(nn.Embedding(whole("model list_rnn: tokens", tokens), embedding)),
        "start": Transform(Start(hidden)),
        "first": Isu(Begin("t")),
        "loop": Phi(2),
        "meet": Concat(2, dim=-1),
        "cell": Transform(nn.Sequential(nn.Linear(embedding + hidden, hidden), nn.Tanh())),
        "next": Isu(Add("t")),
        "more": Cond(_more),
        "over": Isu(Drop("t")),
        "head": Transform(nn.Linear(hidden, classes)),
        "loss": Loss(),
    }
    edges = [
        *("list -> both", "both.0 -> unroll", "unroll -> embed", "embed -> meet.0"),
        *("both.1 -> start", "start -> first", "first -> loop.0", "loop -> meet.1"),
        *("meet -> cell", "cell -> next", "next -> more", "more.1 -> loop.1"),
        *("more.0 -> over", "over -> head", "head -> loss"),
    ]
    return Graph(nodes, edges)


vars(list_rnn)["data"] = "list_reduction(samples=200, test=20)"  # what samples it takes
vars(list_rnn)["paper"] = AMPNet.paper


def _tokens(inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    n = int(inputs["length"][0])
    return (inputs["token"][0, :n],), {"n": n}


def _positions(state: State, _: Payload) -> Sequence[State]:
    return [state.put(t=t) for t in range(state["n"])]


def _more(state: State) -> int:
    return state["t"] < state["n"]
