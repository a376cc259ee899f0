"""What one trains on: devices, nodes and links, each figure with its unit and its source.

`clusters` goes from a name to a ready cluster: a TOML file in ``ready/``. Your own is a file, too:
``load("mine.toml")``. Nothing here imports torch.
"""

from pathlib import Path
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
        file.stem: f"manyhands.cluster.ready:{file.stem}"
        for file in sorted((Path(__file__).parent / "ready").glob("*.toml"))
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
