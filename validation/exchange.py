"""How the programs of the published tables exchange gradients, as their documents and sources describe it.

Each way is two prices in seconds a byte, of parameters on their way to a device before they are used and of gradients
on their way from it, and what follows the step. The timeline over the layers is wait-free back-propagation
(`manyhands.modelling.published.wait_free`); links are those of the cluster file, all devices of a node sending at once.

TensorFlow's ``tf_cnn_benchmarks`` of May 2017 ("High-Performance Models" guide):

- parameter_server, cpu: variables in the host's memory; every device copies them over its PCI Express port and its
  gradients back; the host adds the gradients of n devices and updates: n + 3 passes over its memory.
- parameter_server, gpu: each variable on one device, the least loaded first; the others copy it and their gradients.
- replicated without NCCL: each gradient is added up on one device, as above; the sum is copied to all.
- replicated with NCCL: a ring all-reduce over the links between the devices.
- distributed_replicated: within a node as replicated; between nodes each pushes its sum to S servers, which stand on
  the nodes, and copies the parameters back. Node and server share a port.

MXNet's ``dist_device_sync``: within a node each array is added up on the least loaded device; between nodes it is cut
over as many servers as nodes; pushes and pulls go on under backward and the next forward (its engine's dependencies).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhands.cluster import Cluster
from manyhands.modelling.published.thakur import Hop, ring_all_reduce_s


@dataclass(frozen=True)
class Exchange:
    """Seconds a byte and a message of each phase, and what is left after the step for a network's parameters.

    What has been pushed is then added up by a host, one gradient after another.
    """

    pull_s_per_B: float = 0.0
    push_s_per_B: float = 0.0
    add_s_per_B: float = 0.0
    message_s: float = 0.0
    after_s: float = 0.0


def largest_load(sizes_B: Sequence[float], devices: int) -> float:
    """Bytes on the fullest device when each array, largest first, is put on the emptiest."""
    loads = [0.0] * devices
    for size in sorted(sizes_B, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


def of(way: str, cluster: Cluster, devices: int, parameter_B: Mapping[str, float], servers: int | None) -> Exchange:
    """The exchange of ``devices`` in all, packed into the nodes of ``cluster``."""
    here = min(devices, cluster.devices_per_node)
    nodes = -(-devices // here)
    sizes = list(parameter_B.values())
    total = sum(sizes)
    host = cluster.link("host")
    if way == "parameter_server/cpu":
        copy = 1 / host.bandwidth_Bps(here)
        memory = cluster.node.memory_bandwidth
        added = (here + 3) / memory.si if memory is not None else 0.0
        return Exchange(copy, copy, added, host.latency.si)
    within = cluster.link("within")
    # Of a byte of parameters, what passes the port of the fullest device: to or from all others.
    fullest = (here - 1) * largest_load(sizes, here) / total / within.bandwidth_Bps(here) if here > 1 else 0.0
    if way == "parameter_server/gpu":
        return Exchange(fullest, fullest, message_s=within.latency.si)
    if way == "replicated_nccl":
        hop = Hop(within.latency.si, 1 / within.bandwidth_Bps(here))
        ring_s = ring_all_reduce_s(1.0, here, Hop(0, hop.s_per_B))
        return Exchange(push_s_per_B=ring_s, message_s=2 * (here - 1) * hop.latency_s)
    if way == "replicated_no_nccl":
        return Exchange(push_s_per_B=fullest, message_s=within.latency.si, after_s=fullest * total)
    network_s = 0.0
    if nodes > 1:
        # In the busier direction of a port with a server on it: gradients of the others and the parameters of the rest.
        count = servers or nodes
        each = (nodes - 1) / count + (1 - 1 / count)
        network_s = each / cluster.link("between").bandwidth_Bps(1)
    latency_s = within.latency.si if nodes == 1 else cluster.link("between").latency.si
    if way == "distributed_replicated_ps_sync":
        return Exchange(push_s_per_B=fullest + network_s, message_s=latency_s, after_s=fullest * total)
    if way == "dist_device_sync":
        each_s = fullest + network_s / 2
        return Exchange(each_s, each_s, message_s=latency_s)
    raise ValueError(f"no exchange {way!r}")
