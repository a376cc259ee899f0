"""Patterns or neurons over the nodes? Two cost models of back-propagation in bunches, and where they cross.

    pattern parallel   a node takes b/P patterns, then W weight changes are summed: W words an all-reduce, every bunch
    network parallel   a node has n_l/P units of each layer: activations gathered, back-signals summed, each pattern

P. Färber, K. Asanović 1997, "Parallel Neural Network Training on Multi-Spert", ICA3PP. The two strategies, bunch mode
(b patterns between two updates; b = 1 is online learning) and the measure, connection updates per second, are the
paper's; the terms are derived here for a ring of nodes. The paper measured more than 530 MCUPS on 5 nodes and
predicted more than 800 on 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from manyhands.catalogue import Reference


@dataclass(frozen=True)
class Nodes:
    """How quick a node is, and what a message and a word cost it."""

    connections_per_s: float  # weights that one node trains, one pattern after another
    word_s: float
    message_s: float = 0.0


def weights(units: Sequence[int]) -> int:
    """Connections of a perceptron with these layers, biases not counted."""
    return sum(a * b for a, b in pairwise(units))


def pattern_parallel_s(units: Sequence[int], bunch: int, nodes: int, machine: Nodes) -> float:
    """Seconds of a bunch, patterns divided among ``nodes``; the busiest has ⌈b/P⌉."""
    words = 2 * (nodes - 1) / nodes * weights(units)
    compute_s = math.ceil(bunch / nodes) * weights(units) / machine.connections_per_s
    return compute_s + words * machine.word_s + 2 * (nodes - 1) * machine.message_s


def network_parallel_s(units: Sequence[int], bunch: int, nodes: int, machine: Nodes) -> float:
    """Seconds of a bunch, units divided among ``nodes``: a bunch's activations travel together, layer by layer.

    Forward, each layer but the last is gathered (the input is everywhere); backward, each hidden layer's signals are
    partial sums that are scattered to their owners.
    """
    hidden = units[1:-1]
    words = 2 * bunch * (nodes - 1) / nodes * sum(hidden)
    compute_s = bunch * sum(a * math.ceil(b / nodes) for a, b in pairwise(units)) / machine.connections_per_s
    return compute_s + words * machine.word_s + 2 * len(hidden) * (nodes - 1) * machine.message_s


def connection_updates_per_s(units: Sequence[int], bunch: int, step_s: float) -> float:
    """CUPS: weights times patterns a second."""
    return weights(units) * bunch / step_s


def crossover(units: Sequence[int], nodes: int, machine: Nodes) -> float:
    """The bunch from which on pattern parallelism is the quicker of the two, all else divided evenly.

    Equal compute: only what travels counts. b* = (W − (L−1)·P·α/β)/Σ hidden units, with L hidden layers: below it, and
    for every b where there is no hidden layer, cutting the network is cheaper.
    """
    hidden = units[1:-1]
    if not hidden:
        return math.inf
    more_messages = 2 * (nodes - 1) * (1 - len(hidden)) * machine.message_s
    saved = 2 * (nodes - 1) / nodes * machine.word_s
    return max(0.0, (saved * weights(units) + more_messages) / (saved * sum(hidden)))


vars(crossover)["paper"] = Reference(
    "P. Färber, K. Asanović", "Parallel neural network training on Multi-Spert", 1997, "ICA3PP", survey="V-A"
)
