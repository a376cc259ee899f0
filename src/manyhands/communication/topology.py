"""Named axes over the ranks: a mesh, its coordinates and the groups that share all but some of them.

Rank order is row-major: the last axis varies fastest, as in ``torch.reshape`` and MPI Cartesian grids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from manyhands.errors import BadInput


@dataclass(frozen=True, init=False)
class Mesh:
    """``Mesh(data=2, pipeline=3)``: six ranks; rank 4 has coordinates ``{"data": 1, "pipeline": 1}``."""

    axes: tuple[tuple[str, int], ...]

    def __init__(self, axes: Mapping[str, int] | Iterable[tuple[str, int]] = (), /, **named: int) -> None:
        pairs = tuple(axes.items() if isinstance(axes, Mapping) else tuple(axes)) + tuple(named.items())
        for name, extent in pairs:
            if not isinstance(extent, int) or isinstance(extent, bool) or extent < 1:
                raise BadInput(f"mesh axis {name}={extent!r}: the extent of an axis is a whole number from 1.")
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise BadInput(f"mesh {names}: every axis is named once.")
        object.__setattr__(self, "axes", pairs)

    def __str__(self) -> str:
        return f"mesh({', '.join(f'{n}={e}' for n, e in self.axes)})"

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.axes)

    def __getitem__(self, axis: str) -> int:
        return dict(self.axes).get(axis, 1)

    @property
    def size(self) -> int:
        """How many ranks the mesh needs."""
        return math.prod(extent for _, extent in self.axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` sits on each axis."""
        result = {}
        for name, extent in reversed(self.axes):
            rank, result[name] = divmod(rank, extent)
        return {name: result[name] for name, _ in self.axes}

    def color(self, rank: int, over: frozenset[str]) -> int:
        """A number shared by exactly the ranks that differ from ``rank`` only along the axes ``over``."""
        color = 0
        for name, extent in self.axes:
            if name not in over:
                color = color * extent + self.coordinates(rank)[name]
        return color

    def groups(self, over: frozenset[str]) -> list[list[int]]:
        """All groups of ranks that differ only along ``over``, each in rank order."""
        by_color = sorted(range(self.size), key=lambda r: (self.color(r, over), r))
        return [list(g) for _, g in itertools.groupby(by_color, key=lambda r: self.color(r, over))]


def shares(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of ``size`` contiguous parts of ``count`` things; the first parts take the remainder.

    >>> shares(10, 4)
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    least, rest = divmod(count, size)
    bounds = [rank * least + min(rank, rest) for rank in range(size + 1)]
    return list(itertools.pairwise(bounds))


def parse_mesh(text: str) -> Mesh:
    """Read ``data=2,pipeline=3`` (also with ``mesh(…)`` around it)."""
    body = text.strip()
    if body.startswith("mesh(") and body.endswith(")"):
        body = body[5:-1]
    axes = []
    for part in filter(None, (p.strip() for p in body.split(","))):
        name, _, extent = part.partition("=")
        if not extent.strip().isdigit() or not name.strip().isidentifier():
            raise BadInput(f"mesh {text!r}: the form is axis=extent,axis=extent, e.g. data=2,pipeline=2.")
        axes.append((name.strip(), int(extent)))
    if not axes and not text.strip().startswith("mesh("):
        raise BadInput(f"mesh {text!r} names no axis: the form is axis=extent,axis=extent, e.g. data=2,pipeline=2.")
    return Mesh(axes)
