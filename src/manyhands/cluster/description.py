"""A cluster: nodes of equal devices, and the links at each level of the way from one device to another.

    host      a device and the memory of its node        (PCI Express; none where the device is a processor core)
    within    two devices of a node                      (NVLink, PCI Express, shared memory)
    between   two nodes                                  (InfiniBand, Ethernet, the internet)

Bandwidths are of one direction. A port that several devices share says so (``shared_by``): what each of them has when
all use it at once is that part of it. A figure for efficiency says how much of a peak or a bandwidth the best known
program reaches; without one, the figures are taken as they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_origin, get_type_hints

from manyhands.cluster.figure import Figure, Plausible
from manyhands.cluster.measured import Measured
from manyhands.errors import BadInput

#: The levels, from a device outwards.
LEVELS = ("host", "within", "between")

_Efficiency = Annotated[Figure | None, Plausible("an efficiency", "share", 1e-4, 1.0, "0.8 ratio")]
_Jitter = Annotated[Figure | None, Plausible("a jitter", "share", 0.0, 10.0, "0.02 ratio")]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one worker computes on: a GPU, or a core of a processor."""

    name: str
    kind: str  # cuda or cpu
    memory: Annotated[Figure, Plausible("a device's memory", "size", 1e6, 1e13, "80 GB")]
    memory_bandwidth: Annotated[Figure, Plausible("a device's memory bandwidth", "rate", 1e8, 1e14, "2039 GB/s")]
    #: By dtype, as torch names them. A dtype that is not there cannot be priced.
    peak: Annotated[Mapping[str, Figure], Plausible("a device's peak", "operations", 1e7, 1e17, "19.5 TFLOP/s")]
    #: From the call of an operator to its start, where nothing hides it.
    dispatch: Annotated[Figure | None, Plausible("the dispatch of an operator", "time", 1e-8, 1e-2, "5 us")] = None
    #: Of the peak, that a large matrix product reaches.
    efficiency: _Efficiency = None
    #: Of the memory bandwidth, that a stream reaches.
    memory_efficiency: _Efficiency = None
    #: Standard deviation over mean of the same piece of work.
    jitter: _Jitter = None

    def peak_of(self, dtype: str) -> float:
        """Operations a second (SI) for ``dtype``, e.g. ``"float32"``."""
        if dtype not in self.peak:
            raise BadInput(
                f"device {self.name}: no peak for {dtype}; its file has {', '.join(self.peak)}. Add {dtype} under "
                "[device.peak], with unit and source."
            )
        return self.peak[dtype].si


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine: how many devices, and what they share."""

    devices: Annotated[Figure, Plausible("the devices of a node", "number", 1, 4096, "8 count")]
    cores: Annotated[Figure | None, Plausible("the cores of a node", "number", 1, 4096, "64 count")] = None
    memory: Annotated[Figure | None, Plausible("a node's memory", "size", 1e6, 1e14, "1 TB")] = None
    memory_bandwidth: Annotated[
        Figure | None, Plausible("a node's memory bandwidth", "rate", 1e8, 1e13, "204.8 GB/s")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the way between devices."""

    kind: str
    latency: Annotated[Figure, Plausible("a link's latency", "time", 1e-8, 5.0, "2 us")]
    bandwidth: Annotated[Figure, Plausible("a link's bandwidth in one direction", "rate", 1e3, 1e13, "300 GB/s")]
    shared_by: Annotated[Figure | None, Plausible("the devices that share a port", "number", 1, 4096, "8 count")] = None
    efficiency: _Efficiency = None
    jitter: _Jitter = None

    def bandwidth_Bps(self, users: int = 1) -> float:
        """What each of ``users`` devices of a node has when they all send at once."""
        sharing = 1.0 if self.shared_by is None else self.shared_by.si
        efficiency = 1.0 if self.efficiency is None else self.efficiency.si
        return self.bandwidth.si * efficiency / max(1.0, min(sharing, users))

    def seconds(self, size_B: float, users: int = 1) -> float:
        """α + βn: one message of ``size_B`` bytes, ``users`` devices of a node sending at once."""
        return self.latency.si + size_B / self.bandwidth_Bps(users)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``clusters.load("dgx_a100")()`` or ``cluster.load("mine.toml")``."""

    name: str
    about: str
    device: Device
    node: Node
    #: By level: ``host``, ``within``, ``between``; a level may be missing where there is nothing to link.
    links: Mapping[str, Link]
    #: How many there are; None: as many as one asks for.
    nodes: Annotated[Figure | None, Plausible("the nodes of a cluster", "number", 1, 1e6, "16 count")] = None
    #: Of programs that measured the figures, if they were measured.
    versions: Mapping[str, str] = field(default_factory=dict)
    #: Tables beside the figures, where `manyhands calibrate` made the file.
    measured: Measured | None = None

    @property
    def devices_per_node(self) -> int:
        """As a whole number."""
        return int(self.node.devices.si)

    @property
    def devices(self) -> int | None:
        """All there are; None: as many as one asks for."""
        return None if self.nodes is None else int(self.nodes.si) * self.devices_per_node

    def nodes_for(self, workers: int) -> int:
        """How many nodes ``workers`` fill, a device each; refuses more than there are."""
        needed = -(-workers // self.devices_per_node)
        if self.nodes is not None and needed > self.nodes.si:
            raise BadInput(
                f"{workers} workers on cluster {self.name}: it has {int(self.nodes.si)} nodes of "
                f"{self.devices_per_node} devices, {self.devices} workers at most."
            )
        return needed

    def level(self, workers: int) -> str:
        """The outermost level that ``workers`` on neighbouring devices cross: ``within`` or ``between``."""
        return "between" if self.nodes_for(workers) > 1 else "within"

    def link(self, level: str) -> Link:
        """The link of a level; refuses one that the file does not describe."""
        if level not in self.links:
            raise BadInput(
                f"cluster {self.name}: no link {level!r}; it has {', '.join(self.links) or 'none'}. Add [link.{level}] "
                "with latency and bandwidth, unit and source."
            )
        return self.links[level]


def plausible(kind: type[Any]) -> dict[str, Plausible]:
    """The figures of a class of this file by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def required(kind: type[Any]) -> list[str]:
    """Fields of a class of this file that a cluster file cannot leave out."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
