"""Some entries of a vector: finding the largest, index-value pairs as bytes, and what schemes that send them share.

An entry is 4 bytes of index and 4 (or 8) of value; indices stand first, in ascending order.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.communication.compression.bits import chunks
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries, OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload

#: Indices are whole numbers of 31 bits.
LONGEST = 2**31 - 1
#: How many values are looked at to guess where the k-th largest lies.
SAMPLE = 16_384


class Sparsifier(OneShot):
    """A scheme whose payload stands for some entries of the vector; all others are zero."""

    longest: ClassVar[int | None] = LONGEST

    @abstractmethod
    def entries(self, payload: Tensor, state: State) -> Entries | None:
        """See `OneShot.entries`."""

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        found = self.entries(payload, state)
        assert found is not None
        out.numpy()[found.indices] += found.values if sign > 0 else -found.values


def entries(ratio: float, numel: int) -> int:
    """How many of ``numel`` values are ``ratio`` of them; at least one."""
    return min(numel, max(1, math.ceil(ratio * numel))) if numel else 0


def check_ratio(ratio: object, name: str = "ratio") -> None:
    """Refuse what is no share of a vector."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"{name}={ratio!r}: it is above 0 and at most 1, the share of the values that is sent")


def beyond(x: NDArray[Any], threshold: float) -> NDArray[np.int64]:
    """Where |x| ≥ threshold, ascending."""
    found, parts = [], chunks(x.size)
    flags = np.empty((2, parts[0].stop if parts else 0), bool)
    for part in parts:
        above, below = flags[:, : part.stop - part.start]
        np.greater_equal(x[part], threshold, out=above)
        np.less_equal(x[part], -threshold, out=below)
        indices = np.flatnonzero(np.logical_or(above, below, out=above))
        indices += part.start
        found.append(indices)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def largest(x: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Where the k largest |x| are, ascending.

    A sample says where the k-th largest lies at least; only what is beyond that is sorted. Were the guess wrong, all
    would be: the result is exact either way.
    """
    n = x.size
    if k >= n:
        return np.arange(n)
    candidates = None
    if n > 2 * SAMPLE and 8 * k < n:
        sample = np.abs(x[:: n // SAMPLE])
        expected = k * sample.size / n
        rank = min(sample.size, math.ceil(expected + 4 * math.sqrt(expected) + 4))  # four standard deviations
        bound = np.partition(sample, sample.size - rank)[sample.size - rank]
        if bound > 0:
            candidates = beyond(x, bound)
    if candidates is None or candidates.size < k:
        candidates = np.arange(n)
    magnitudes = np.abs(x[candidates])
    chosen = np.argpartition(magnitudes, magnitudes.size - k)[magnitudes.size - k :]
    return np.sort(candidates[chosen])


def pack(indices: NDArray[np.int64], values: NDArray[Any]) -> Tensor:
    """Entries as bytes."""
    parts = indices.astype(np.int32).view(np.uint8), values.view(np.uint8)
    return torch.from_numpy(np.concatenate(parts))


def unpack(payload: Tensor, layout: Layout, name: str) -> Entries:
    """Indices and values of `pack`, looked at: whoever writes there writes within the vector."""
    coded = payload.numpy()
    k = coded.size // (4 + layout.itemsize)
    check_length(coded, k * (4 + layout.itemsize), name)
    indices = coded[: 4 * k].view(np.int32)
    check_indices(indices, layout.numel, name)
    values = coded[4 * k :].view(layout.scalar)
    check_numbers(values, name)
    return Entries(indices, values)


def check_indices(indices: NDArray[Any], numel: int, name: str) -> None:
    """Refuse indices outside of the vector, or in another order than ascending."""
    if not indices.size:
        return
    if indices[0] < 0 or indices[-1] >= numel or not bool((indices[1:] > indices[:-1]).all()):
        raise DamagedPayload(f"{name}: indices that are not ascending from 0 to {numel - 1}")
