"""Which rank owns which node: contiguous runs of the nodes in the order in which an instance meets them, alike in cost.

A node's cost is what its module computes for one sample, in floating-point operations as torch counts them, over all
its visits; so every rank finds the same. A node without a module goes where what it first sends goes: a loop then lies
on one rank, as far as its modules do, and only what comes in and out of it travels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manyhands.errors import BadInput
from manyhands.partition.ampnet.chain import graph_of
from manyhands.partition.ampnet.graph import Graph, Port, check_samples
from manyhands.partition.ampnet.message import Message
from manyhands.partition.ampnet.nodes import Loss, Store, Transform
from manyhands.partition.ampnet.strategy import AMPNet

#: What a visit costs that computes next to nothing, in operations: a message handled takes some 20 µs.
VISIT = 100_000.0


def fitted(model: nn.Module, strategy: AMPNet, ranks: int, sample: Any) -> tuple[Graph, dict[str, int]]:
    """The graph of a model and the rank of every node; `BadInput` for a model, or options, that do not go together."""
    graph = graph_of(model)
    check_samples(graph, strategy.samples)
    return graph, placed(graph, ranks, sample)


def placed(graph: Graph, ranks: int, sample: Any) -> dict[str, int]:
    """The rank of every node; ``sample`` is the inputs of one sample, with a leading dim of 1.

    Raises `BadInput` where there are more ranks than parameterised nodes.
    """
    learners = graph.learners
    if ranks > len(learners):
        raise BadInput(
            f"ampnet on {ranks} ranks: the graph has {len(learners)} nodes with parameters ({', '.join(learners)}), "
            f"and every rank owns at least one. Use mesh=pipeline={max(1, len(learners))} at most."
        )
    cost, goes_to = _met(graph, sample)
    order = [name for name in cost if isinstance(graph.nodes[name], Transform)]
    order += [name for name, node in graph.nodes.items() if isinstance(node, Transform) and name not in cost]
    place: dict[str, int] = {}
    blocks = _balanced([cost.get(name, 0.0) for name in order], [name in learners for name in order], ranks)
    for rank, (lo, hi) in enumerate(blocks):
        place |= dict.fromkeys(order[lo:hi], rank)
    place |= dict.fromkeys(graph.sources, 0)
    loss = graph.loss
    for name in graph.nodes:
        seen, at = {name}, name
        while at not in place and at != loss and goes_to.get(at, at) not in seen:
            at = goes_to[at]
            seen.add(at)
        if at in place:
            place[name] = place[at]
    before = graph.edges[graph.coming[Port(loss, 0)]].start.node
    place[loss] = place.get(before, ranks - 1)
    return {name: place.get(name, place[loss]) for name in graph.nodes}


def _met(graph: Graph, sample: Any) -> tuple[dict[str, float], dict[str, str]]:
    """What each node costs for one sample, in the order of first visits, and to whom it sent its first message."""
    cost: dict[str, float] = {}
    goes_to: dict[str, str] = {}
    stores = {name: Store(learning=False) for name in graph.nodes}
    coming: deque[tuple[Port, Message]] = deque()
    was_training = graph.training
    generator = torch.get_rng_state()
    graph.eval()
    try:
        for name, source in graph.sources.items():
            coming.append((_end(graph, name, 0, goes_to), source.begin(0, sample)))
        while coming:
            (name, port), message = coming.popleft()
            node = graph.nodes[name]
            if isinstance(node, Loss):
                continue
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                sent = node.forward(port, message, stores[name])
            cost[name] = cost.get(name, 0.0) + VISIT + float(counter.get_total_flops())
            for way, left in sent:
                coming.append((_end(graph, name, way, goes_to), left))
    finally:
        graph.train(was_training)
        torch.set_rng_state(generator)
    return cost, goes_to


def _end(graph: Graph, name: str, way: int, goes_to: dict[str, str]) -> Port:
    end = graph.edges[graph.leaving[Port(name, way)]].end
    goes_to.setdefault(name, end.node)
    return end


def _balanced(costs: Sequence[float], learns: Sequence[bool], ranks: int) -> list[tuple[int, int]]:
    """``ranks`` contiguous runs, each with something that learns, of which the dearest costs least.

    By dynamic programming: ``best[r][i]`` is the dearest of ``r`` runs over the first ``i`` costs.
    """
    n = len(costs)
    infinite = float("inf")
    best = [[infinite] * (n + 1) for _ in range(ranks + 1)]
    cut = [[0] * (n + 1) for _ in range(ranks + 1)]
    best[0][0] = 0.0
    for r in range(1, ranks + 1):
        for i in range(1, n + 1):
            for j in range(i):
                dearest = max(best[r - 1][j], sum(costs[j:i])) if any(learns[j:i]) else infinite
                if dearest < best[r][i]:
                    best[r][i], cut[r][i] = dearest, j
    blocks, end = [], n
    for r in range(ranks, 0, -1):
        blocks.append((cut[r][end], end))
        end = cut[r][end]
    return blocks[::-1]
