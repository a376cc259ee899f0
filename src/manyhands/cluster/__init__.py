"""What one trains on: devices, nodes and links, each figure with its unit and its source.

`clusters` goes from a name to a ready cluster; a new one is a TOML file in ``ready/``, a function there and a line
here. Your own is a file: ``load("mine.toml")``. Nothing here imports torch.
"""

from typing import TYPE_CHECKING, Any

from manyhands.catalogue import Catalogue

if TYPE_CHECKING:
    from manyhands.cluster.description import Cluster as Cluster
    from manyhands.cluster.description import Device as Device
    from manyhands.cluster.description import Link as Link
    from manyhands.cluster.description import Node as Node
    from manyhands.cluster.figure import Figure as Figure
    from manyhands.cluster.file import load as load
    from manyhands.cluster.file import read as read
    from manyhands.cluster.file import write as write

clusters = Catalogue(
    "cluster",
    {
        "dgx_a100": "manyhands.cluster.ready:dgx_a100",
        "dgx_h100": "manyhands.cluster.ready:dgx_h100",
        "hgx_h200": "manyhands.cluster.ready:hgx_h200",
        "dgx1_v100": "manyhands.cluster.ready:dgx1_v100",
        "dgx1_p100": "manyhands.cluster.ready:dgx1_p100",
        "gce_k80": "manyhands.cluster.ready:gce_k80",
        "ec2_p2_8xlarge": "manyhands.cluster.ready:ec2_p2_8xlarge",
        "ec2_p2_16xlarge": "manyhands.cluster.ready:ec2_p2_16xlarge",
        "ethernet_100g": "manyhands.cluster.ready:ethernet_100g",
        "ethernet_10g": "manyhands.cluster.ready:ethernet_10g",
        "ethernet_1g": "manyhands.cluster.ready:ethernet_1g",
        "wan": "manyhands.cluster.ready:wan",
        "laptop": "manyhands.cluster.ready:laptop",
    },
)

_FROM = {
    **dict.fromkeys(("Cluster", "Device", "Link", "Node"), "description"),
    "Figure": "figure",
    **dict.fromkeys(("load", "read", "write"), "file"),
}

__all__ = ["Cluster", "Device", "Figure", "Link", "Node", "clusters", "load", "read", "write"]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        import importlib

        return getattr(importlib.import_module(f"manyhands.cluster.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
