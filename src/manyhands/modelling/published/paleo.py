"""Paleo: a step is its layers, a layer is what it reads, computes and writes; communication comes on top.

    layer      T = R(reads)/B_memory + FLOPs/(c·peak) + W(writes)/B_memory       c: platform percent of peak
    exchange   one to all 2D(N−1)/B, tree 2D⌈log₂N⌉/B, butterfly D⌈log₂N⌉/B      D bytes of parameters
    scaling    strong: each worker has batch/N;  weak: each has the batch

H. Qi, E. R. Sparks, A. Talwalkar 2017, "Paleo: A Performance Model for Deep Neural Networks", ICLR. No overlap, one c
for all layers, fitted to a platform. The paper's choice of a convolution algorithm is in
`manyhands.modelling.published.winograd`. Derived anew from the formulas; the public code leaves out biases and
activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from manyhands.catalogue import Reference

Scheme = Literal["one_to_all", "tree", "butterfly"]


@dataclass(frozen=True)
class Layer:
    """What a layer does with one batch, forward and backward together."""

    flops: float
    read_B: float
    written_B: float


@dataclass(frozen=True)
class Platform:
    """Peak and bandwidths as the maker gives them, and how much of them is got."""

    peak_flops_per_s: float
    memory_Bps: float
    network_Bps: float = math.inf
    percent_of_peak: float = 1.0  # of both peak and memory bandwidth
    percent_of_network: float = 1.0


def layer_s(layer: Layer, platform: Platform) -> float:
    """Reading, computing and writing, one after the other."""
    moved_s = (layer.read_B + layer.written_B) / platform.memory_Bps
    return (moved_s + layer.flops / platform.peak_flops_per_s) / platform.percent_of_peak


def exchange_s(parameter_B: float, workers: int, platform: Platform, *, scheme: Scheme) -> float:
    """Summing the gradients of ``workers`` and giving all of them the sum."""
    if workers == 1:
        return 0.0
    one_s = parameter_B / (platform.network_Bps * platform.percent_of_network)
    height = math.ceil(math.log2(workers))
    return one_s * {"one_to_all": 2 * (workers - 1), "tree": 2 * height, "butterfly": height}[scheme]


def step_s(
    layers: Iterable[Layer], parameter_B: float, workers: int, platform: Platform, *, scheme: Scheme = "tree"
) -> float:
    """Seconds of a synchronous data-parallel step; ``layers`` are what one worker does with its share."""
    return math.fsum(layer_s(x, platform) for x in layers) + exchange_s(parameter_B, workers, platform, scheme=scheme)


def hybrid_step_s(
    data_parallel: Iterable[Layer],
    model_parallel: Iterable[Layer],
    exchanged_B: float,
    boundary_B: float,
    workers: int,
    platform: Platform,
    *,
    scheme: Scheme = "tree",
) -> float:
    """Paleo's hybrid, Krizhevsky's one weird trick: convolutions by data, dense layers by model.

    ``model_parallel`` are the dense layers on the joined batch; each worker does an Nth of them. ``exchanged_B``: the
    convolutions' parameters; ``boundary_B``: the activations of one worker's share, which all others get, and as many
    bytes of gradients back.
    """
    dense_s = math.fsum(layer_s(x, platform) for x in model_parallel) / workers
    boundary_s = 2 * (workers - 1) * boundary_B / (platform.network_Bps * platform.percent_of_network)
    return step_s(data_parallel, exchanged_B, workers, platform, scheme=scheme) + dense_s + boundary_s


def percent_of_peak(pairs: Iterable[tuple[float, float]]) -> float:
    """The c that fits (predicted at c = 1, measured) seconds: Σ predicted / Σ measured."""
    predicted, measured = (math.fsum(x) for x in zip(*pairs, strict=True))
    return predicted / measured


vars(step_s)["paper"] = Reference(
    "H. Qi, E. R. Sparks, A. Talwalkar",
    "Paleo: A Performance Model for Deep Neural Networks",
    2017,
    "ICLR",
)
