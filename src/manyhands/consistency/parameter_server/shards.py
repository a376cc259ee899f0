"""How pieces are cut into shards, one a server, and what of them lies where (survey §VI-A).

Shards cut every piece into equal slices, so that all have the same amount to do; a table is cut between its rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Shape
from manyhands.communication.reduction import slices
from manyhands.consistency.compressed import layout_for
from manyhands.contract import Traffic


class Shard(NamedTuple):
    """``pieces[piece].flat[lo:hi]``; ``units`` are the parts of it that belong to single parameters."""

    piece: int
    lo: int
    hi: int
    units: slice  # in the store's list of all units
    server: int = 0  # which of them has it


class Unit(NamedTuple):
    """The part of one parameter that lies in one shard: it has been updated as a whole or not at all."""

    lo: int
    hi: int
    parameter: int  # counted over all pieces


class To(Enum):
    """What is done with a shard: READ values and version, change (ADD to) them, or UPDATE the optimizer's state too."""

    READ, ADD, UPDATE = range(3)


def bounds(numel: int, servers: int, width: int = 0) -> list[tuple[int, int]]:
    """How a piece is cut among the servers, a table between its rows; small pieces have fewer shards."""
    if width:
        cuts = [numel // width * s // servers * width for s in range(servers + 1)]
        return [(lo, hi) for lo, hi in itertools.pairwise(cuts) if hi > lo]
    return [(lo, hi) for lo, hi in slices(numel, servers) if hi > lo]


def within(rows: Tensor, shard: Shard, width: int) -> Tensor:
    """Those of ``rows``, which are in order, that lie in ``shard``."""
    first, last = torch.searchsorted(rows, torch.tensor([shard.lo // width, shard.hi // width])).tolist()
    return rows[first:last]


def traffic(
    shapes: Sequence[Shape],
    size: int,
    itemsize: int,
    servers: int,
    *,
    every: int = 1,
    compressor: Compressor | None = None,
) -> Traffic:
    """Of pulling or pushing all shards of a piece once in ``every`` steps: n elements, or a payload a shard.

    A worker alone sends nothing.
    """
    if size == 1:
        return Traffic()
    numel = sum(map(math.prod, shapes))
    shards = bounds(numel, servers)
    if compressor is None:
        return Traffic(numel * itemsize, len(shards), every)
    layout = layout_for(shapes, itemsize)
    return Traffic(sum(compressor.payload_B(layout.part(lo, hi)) for lo, hi in shards), len(shards), every)
