"""Model partitions × model replicas × servers × threads on machines: time of an epoch, and the best choice.

    machines      M = P·R + S         P partitions of the network, R replicas of it, S servers
    example       T_e = h·Σ_layers C_l/(P·rate(h)) + activations between partitions,   h threads a machine
    rate(h)       h·r/(1 + φ(h − 1))     φ: what another thread takes from the memory system
    exchange      every b examples a replica sends its gradients to the servers and gets weights, overlapped or not
    epoch         N/(R·h) examples in a row, each T_e

F. Yan, O. Ruwase, Y. He, T. Chilimbi 2015, "Performance Modeling and Scalability Optimization of Distributed Deep
Learning Systems", KDD, 1355-1364. The paper models what this file names: partitions, replicas, servers, threads with
their interference, weights that asynchronous replicas exchange with servers, and an optimizer over all of it. Its
body was not at hand; the formulas are derived here from those definitions, the simplest that have its limits (no
error figure known).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manyhands.catalogue import Reference
from manyhands.errors import BadInput


@dataclass(frozen=True)
class Layer:
    """Per example: operations forward and backward, and bytes of activations it hands on; bytes of its weights."""

    flops: float
    activation_B: float
    weight_B: float


@dataclass(frozen=True)
class Machine:
    """One of the cluster's, all alike."""

    flops_per_s: float  # of one thread that is alone
    interference: float  # φ: 0, threads do not disturb each other
    threads: int  # at most
    network_Bps: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Configuration:
    """How the machines are used."""

    partitions: int
    replicas: int
    servers: int
    threads: int

    @property
    def machines(self) -> int:
        """All of them."""
        return self.partitions * self.replicas + self.servers


def rate(machine: Machine, threads: int) -> float:
    """Operations a second of ``threads`` together on one machine."""
    return threads * machine.flops_per_s / (1 + machine.interference * (threads - 1))


def example_s(layers: Sequence[Layer], machine: Machine, config: Configuration) -> float:
    """One example through one replica, forward and backward, as a thread sees it; h of them at once."""
    compute_s = (
        math.fsum(x.flops for x in layers) / config.partitions / (rate(machine, config.threads) / config.threads)
    )
    if config.partitions == 1:
        return compute_s
    # A unit has inputs on all partitions: each machine lacks (P−1)/P of every layer's activations, there and back.
    lacking = (config.partitions - 1) / config.partitions
    moved_B = 2 * lacking * math.fsum(x.activation_B for x in layers[:-1])
    messages = 2 * (len(layers) - 1)
    return compute_s + moved_B * config.threads / machine.network_Bps + messages * machine.latency_s


def exchange_s(layers: Sequence[Layer], machine: Machine, config: Configuration) -> float:
    """Gradients to the servers and weights back: the busier of a partition's port and a server's."""
    if config.servers == 0:
        return 0.0
    weight_B = math.fsum(x.weight_B for x in layers)
    each = max(weight_B / config.partitions, config.replicas * weight_B / config.servers)
    return 2 * (each / machine.network_Bps + machine.latency_s)


def epoch_s(
    layers: Sequence[Layer],
    machine: Machine,
    config: Configuration,
    *,
    examples: int,
    batch: int,
    overlapped: bool = True,
) -> float:
    """Seconds in which all replicas together go through ``examples``, each exchanging after every ``batch`` of its own.

    ``overlapped``: training goes on while weights travel (asynchronous replicas), so the slower of the two counts.
    """
    compute_s = batch / config.threads * example_s(layers, machine, config)
    exchanged_s = exchange_s(layers, machine, config)
    round_s = max(compute_s, exchanged_s) if overlapped else compute_s + exchanged_s
    return examples / (config.replicas * batch) * round_s


def configurations(machines: int, threads: int) -> Iterator[Configuration]:
    """Every way to use at most ``machines``; one replica needs no server."""
    for partitions in range(1, machines + 1):
        for replicas in range(1, machines // partitions + 1):
            left = machines - partitions * replicas
            servers = range(1, left + 1) if replicas > 1 else (0,)
            yield from (
                Configuration(partitions, replicas, s, h) for s, h in itertools.product(servers, _upto(threads))
            )


def best(
    layers: Sequence[Layer],
    machine: Machine,
    machines: int,
    *,
    examples: int,
    batch: int,
    memory_B: float = math.inf,
    overlapped: bool = True,
) -> Configuration:
    """The quickest configuration of at most ``machines`` whose partition of the weights fits ``memory_B``.

    More servers never hurt but cost replicas. So with P and R given all machines left are servers: that and the number
    of threads are all there is to try.
    """
    weight_B = math.fsum(x.weight_B for x in layers)
    tried = [
        Configuration(p, r, machines - p * r if r > 1 else 0, h)
        for p in range(1, machines + 1)
        if weight_B / p <= memory_B
        for r in range(1, machines // p + 1)
        if r == 1 or machines > p * r
        for h in _upto(machine.threads)
    ]
    if not tried:
        raise BadInput(
            f"{machines} machines of {memory_B:.3g} B hold no {weight_B:.3g} B of weights; "
            f"{math.ceil(weight_B / memory_B)} would."
        )
    return min(tried, key=lambda c: epoch_s(layers, machine, c, examples=examples, batch=batch, overlapped=overlapped))


def _upto(threads: int) -> range:
    return range(1, threads + 1)


vars(epoch_s)["paper"] = Reference(
    "F. Yan, O. Ruwase, Y. He, T. Chilimbi",
    "Performance modeling and scalability optimization of distributed deep learning systems",
    2015,
    "KDD, 1355-1364",
)
