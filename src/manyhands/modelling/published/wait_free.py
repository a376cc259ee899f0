"""Wait-free back-propagation: a layer's gradients travel while the layers before it are still being computed.

    backward    the link takes each layer's gradients as they are ready, one after another; then, if there is one, the
                next station (who adds them up) takes them as they have come
    forward     a layer begins when its parameters are there; they come in the order in which they are needed

H. Zhang et al. 2017, "Poseidon: An Efficient Communication Architecture for Distributed Deep Learning on GPU Clusters",
USENIX ATC, section 3.1. The timeline of one worker and one link, exact for constant times; without it nothing overlaps
and everything is added.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.catalogue import Reference

#: Of each layer, in the order of this phase: seconds of compute, seconds that its parameters or gradients travel.
Timed = Sequence[tuple[float, float]]


def backward_s(layers: Sequence[Sequence[float]]) -> float:
    """Until the last gradient has arrived; ``layers`` from the last to the first.

    Of a layer the seconds of compute, and then of each station on its gradients' way, equally many for all layers.
    """
    computed = 0.0
    free_at = [0.0] * max((len(stations) for _, *stations in layers), default=0)
    for compute_s, *stations in layers:
        computed += compute_s
        ready = computed
        for i, takes_s in enumerate(stations):
            if takes_s:
                ready = free_at[i] = max(free_at[i], ready) + takes_s
    return max([computed, *free_at])


def forward_s(layers: Timed) -> float:
    """Until the last layer is computed; ``layers`` from the first to the last, all parameters asked for at once."""
    computed = arrived = 0.0
    for compute_s, travel_s in layers:
        arrived += travel_s
        computed = (max(computed, arrived) if travel_s else computed) + compute_s
    return computed


vars(backward_s)["paper"] = Reference(
    "H. Zhang et al.",
    "Poseidon: An Efficient Communication Architecture for Distributed Deep Learning on GPU Clusters",
    2017,
    "USENIX ATC, 181-193",
    survey="VI-B",
)
