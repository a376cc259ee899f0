"""Ready clusters: common hardware as its makers describe it, each figure with its source.

Each is a TOML file beside this one, which can be copied and changed; here it is a function of that name without
arguments. What is no figure of a datasheet says that it is derived, or assumed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from manyhands.cluster.description import Cluster
from manyhands.cluster.file import read


@functools.cache
def __getattr__(name: str) -> Callable[[], Cluster]:
    file = Path(__file__).parent / f"{name}.toml"
    if not file.is_file():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = read(file)

    def ready() -> Cluster:
        return made

    ready.__name__, ready.__doc__ = name, made.about
    return ready
