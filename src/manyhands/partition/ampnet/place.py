"""Which rank owns which node: contiguous runs of the nodes in the order in which an instance meets them, alike in cost.

A node's cost is what one instance makes it do: visits, operations as torch counts them, an update, and messages to and
from other ranks, each at what it was measured to take. Counted, so that every rank and every run finds the same. A node
without a module goes where what it first sends goes: a loop then lies on one rank, as far as its modules do, and only
what comes in and out of it travels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manyhands.errors import BadInput
from manyhands.partition.ampnet.chain import graph_of
from manyhands.partition.ampnet.graph import Edge, Graph, Port, check_samples
from manyhands.partition.ampnet.nodes import Loss, Source, Transform
from manyhands.partition.ampnet.strategy import AMPNet

#: Seconds, of which only ratios matter: CPU time on a core of a 2.5 GHz Xeon, torch 2.13, forward and back together,
#: of a visit that computes next to nothing in a module (or the loss), of one in another node, and of a message and its
#: gradient at either end; of an operation forward, with the two of backward; of a parameter's gradient and update.
MODULE_S, OTHER_S, MESSAGE_S, OPERATION_S, PARAMETER_S = 100e-6, 10e-6, 60e-6, 5e-11, 1e-9


def fitted(model: nn.Module, strategy: AMPNet, ranks: int, sample: Any) -> tuple[Graph, dict[str, int]]:
    """The graph of a model and the rank of every node; `BadInput` for a model, or options, that do not go together."""
    graph = graph_of(model)
    check_samples(graph, strategy.samples)
    return graph, placed(graph, ranks, sample, strategy.samples)


def placed(graph: Graph, ranks: int, sample: Any, samples: int = 1) -> dict[str, int]:
    """The rank of every node for instances of ``samples`` samples, of which ``sample`` is one's inputs, (1, …).

    Raises `BadInput` where there are more ranks than parameterised nodes.
    """
    learners = graph.learners
    if ranks > len(learners):
        raise BadInput(
            f"ampnet on {ranks} ranks: the graph has {len(learners)} nodes with parameters ({', '.join(learners)}), "
            f"and every rank owns at least one. Use mesh=pipeline={max(1, len(learners))} at most."
        )
    seconds, messages = _met(graph, sample, samples)
    home = _homes(graph, messages)
    order = list(dict.fromkeys(home[name] for name in seconds))
    order += [name for name in graph.nodes if home[name] == name and name not in order]
    at = {name: order.index(home[name]) for name in graph.nodes}
    alone = [sum(s for name, s in seconds.items() if at[name] == i) for i in range(len(order))]
    between = [[0.0] * len(order) for _ in order]
    for edge, count in messages.items():
        a, b = at[edge.start.node], at[edge.end.node]
        between[a][b] += count * MESSAGE_S
        between[b][a] += count * MESSAGE_S
    blocks = _balanced(alone, between, [name in learners for name in order], ranks)
    rank_of = [rank for rank, (lo, hi) in enumerate(blocks) for _ in range(lo, hi)]
    return {name: 0 if name in graph.sources else rank_of[at[name]] for name in graph.nodes}


def _homes(graph: Graph, messages: Iterable[Edge]) -> dict[str, str]:
    """The module at whose rank each node lies: its own, or the first that what it sends comes to.

    What leads to no module but to the loss, and the loss, lie with the module that the loss is told by.
    """
    goes_to: dict[str, str] = {}
    for edge in messages:
        goes_to.setdefault(edge.start.node, edge.end.node)
    last = graph.loss
    while not isinstance(graph.nodes[last], Transform | Source):
        last = graph.edges[graph.coming[Port(last, 0)]].start.node
    home = {}
    for name in graph.nodes:
        at, seen = name, {name}
        while not isinstance(graph.nodes[at], Transform) and goes_to.get(at, at) not in seen:
            at = goes_to[at]
            seen.add(at)
        home[name] = at if isinstance(graph.nodes[at], Transform) else last
    return home


def sent_B(graph: Graph, place: Mapping[str, int], ranks: int, inputs: Any) -> list[int]:
    """What each rank sends of an instance: activations along edges to other ranks, gradients back along others."""
    sent = [0] * ranks
    with _aside(graph):
        for edge, message in graph.passing(inputs):
            start, end = place[edge.start.node], place[edge.end.node]
            if start != end:
                sent[start] += sum(x.nbytes for x in message.payload if x is not None)
                sent[end] += sum(x.nbytes for x in message.payload if x is not None and x.requires_grad)
    return sent


def _met(graph: Graph, sample: Any, samples: int) -> tuple[dict[str, float], Counter[Edge]]:
    """Seconds of each node for an instance, in the order of first visits, and messages along each edge."""
    seconds: dict[str, float] = {}
    messages: Counter[Edge] = Counter()
    taking, before = "", 0  # what has been computed since is of the node that took the last message
    with _aside(graph), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for edge, _ in graph.passing(sample):
            operations = counter.get_total_flops()
            if taking:
                seconds[taking] += (operations - before) * OPERATION_S * samples
            messages[edge] += 1
            taking, before = edge.end.node, operations
            visit = MODULE_S if isinstance(graph.nodes[taking], Transform | Loss) else OTHER_S
            seconds[taking] = seconds.get(taking, 0.0) + visit
    for name in seconds:
        node = graph.nodes[name]
        if isinstance(node, Transform):
            seconds[name] += PARAMETER_S * sum(p.numel() for p in node.module.parameters())
    return seconds, messages


@contextlib.contextmanager
def _aside(graph: Graph) -> Iterator[None]:
    """What happens within leaves no trace: dropout draws nothing, statistics stay."""
    was_training, generator = graph.training, torch.get_rng_state()
    graph.eval()
    try:
        yield
    finally:
        graph.train(was_training)
        torch.set_rng_state(generator)


def _balanced(
    costs: Sequence[float], between: Sequence[Sequence[float]], learns: Sequence[bool], ranks: int
) -> list[tuple[int, int]]:
    """``ranks`` contiguous runs, each with something that learns, of which the dearest costs least.

    A run costs what is in it and what is ``between`` that and what is not. By dynamic programming: ``best[r][i]`` is
    the dearest of ``r`` runs over the first ``i``. Takes ranks · n² steps.
    """
    n = len(costs)
    infinite = math.inf
    # Sums over the first i, and over the first i rows and k columns.
    alone = [0.0, *itertools.accumulate(costs[i] + sum(between[i]) for i in range(n))]
    learners = [0, *itertools.accumulate(learns)]
    within = [[0.0] * (n + 1)]
    for row in between:
        within.append([a + b for a, b in zip(within[-1], itertools.accumulate(row, initial=0.0), strict=True)])

    def cost(lo: int, hi: int) -> float:
        if learners[lo] == learners[hi]:
            return infinite
        inside = within[hi][hi] - within[lo][hi] - within[hi][lo] + within[lo][lo]
        return alone[hi] - alone[lo] - inside

    best = [[infinite] * (n + 1) for _ in range(ranks + 1)]
    cut = [[0] * (n + 1) for _ in range(ranks + 1)]
    best[0][0] = 0.0
    for r in range(1, ranks + 1):
        for i in range(1, n + 1):
            for j in range(i):
                dearest = max(best[r - 1][j], cost(j, i)) if best[r - 1][j] < infinite else infinite
                if dearest < best[r][i]:
                    best[r][i], cut[r][i] = dearest, j
    blocks, end = [], n
    for r in range(ranks, 0, -1):
        blocks.append((cut[r][end], end))
        end = cut[r][end]
    return blocks[::-1]
