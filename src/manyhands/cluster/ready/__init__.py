"""Ready clusters: common hardware as its makers describe it, each figure with its source.

A function a cluster, each a TOML file of the same name beside this one, which can be copied and changed. What is no
figure of a datasheet says that it is derived, or assumed.
"""

from __future__ import annotations

import functools
from pathlib import Path

from manyhands.cluster.description import Cluster
from manyhands.cluster.file import read


@functools.cache
def _of(name: str) -> Cluster:
    return read(Path(__file__).parent / f"{name}.toml")


def dgx_a100() -> Cluster:
    """DGX A100: 8 A100 of 80 GB behind NVSwitch, a 200 Gbit/s InfiniBand port (HDR) for each."""
    return _of("dgx_a100")


def dgx_h100() -> Cluster:
    """DGX H100: 8 H100 of 80 GB behind NVSwitch, a 400 Gbit/s InfiniBand port (NDR) for each."""
    return _of("dgx_h100")


def hgx_h200() -> Cluster:
    """HGX H200: 8 H200 of 141 GB behind NVSwitch, a 400 Gbit/s InfiniBand port (NDR) for each."""
    return _of("hgx_h200")


def dgx1_v100() -> Cluster:
    """DGX-1 with 8 V100 of 16 GB: NVLink in a cube mesh, 4 ports of 100 Gbit/s InfiniBand (EDR)."""
    return _of("dgx1_v100")


def dgx1_p100() -> Cluster:
    """DGX-1 with 8 P100 of 16 GB: NVLink in a cube mesh, 4 ports of 100 Gbit/s InfiniBand (EDR)."""
    return _of("dgx1_p100")


def gce_k80() -> Cluster:
    """Google Compute Engine n1-standard-32 with 8 GPUs (4 K80 boards), as of 2017."""
    return _of("gce_k80")


def ec2_p2_8xlarge() -> Cluster:
    """Amazon EC2 p2.8xlarge: 8 GPUs (4 K80 boards), 10 Gbit/s Ethernet."""
    return _of("ec2_p2_8xlarge")


def ec2_p2_16xlarge() -> Cluster:
    """Amazon EC2 p2.16xlarge: 16 GPUs (8 K80 boards), 20 Gbit/s Ethernet."""
    return _of("ec2_p2_16xlarge")


def ethernet_100g() -> Cluster:
    """Servers of 16 cores on 100 Gbit/s Ethernet."""
    return _of("ethernet_100g")


def ethernet_10g() -> Cluster:
    """Servers of 16 cores on 10 Gbit/s Ethernet."""
    return _of("ethernet_10g")


def ethernet_1g() -> Cluster:
    """Servers of 16 cores on 1 Gbit/s Ethernet."""
    return _of("ethernet_1g")


def wan() -> Cluster:
    """Machines of 8 cores in homes and offices of one continent, on 100 Mbit/s."""
    return _of("wan")


def laptop() -> Cluster:
    """A host of 2 cores, assumed; copy its file and put in what you have measured."""
    return _of("laptop")
