"""Some entries of a vector: finding the largest, and index-value pairs as bytes.

An entry is 4 bytes of index and 4 (or 8) of value; indices stand first, in ascending order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.communication.compression.compressor import Layout, check_length, check_numbers
from manyhands.errors import DamagedPayload

#: Indices are whole numbers of 31 bits.
LONGEST = 2**31 - 1
#: How many values are looked at to guess where the k-th largest lies.
SAMPLE = 16_384


def entries(ratio: float, numel: int) -> int:
    """How many of ``numel`` values are ``ratio`` of them; at least one."""
    return min(numel, max(1, math.ceil(ratio * numel))) if numel else 0


def check_ratio(ratio: object, name: str = "ratio") -> None:
    """Refuse what is no share of a vector."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"{name}={ratio!r}: it is above 0 and at most 1, the share of the values that is sent")


def beyond(x: NDArray[Any], threshold: float) -> NDArray[np.int64]:
    """Where |x| ≥ threshold, ascending."""
    return np.flatnonzero((x >= threshold) | (x <= -threshold))


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


def unpack(payload: Tensor, layout: Layout, name: str) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Indices and values of `pack`, looked at: whoever writes there writes within the vector."""
    coded = payload.numpy()
    k = coded.size // (4 + layout.itemsize)
    check_length(coded, k * (4 + layout.itemsize), name)
    indices = coded[: 4 * k].view(np.int32)
    check_indices(indices, layout.numel, name)
    values = coded[4 * k :].view(np.float64 if layout.itemsize == 8 else np.float32)
    check_numbers(values, name)
    return indices, values


def check_indices(indices: NDArray[Any], numel: int, name: str) -> None:
    """Refuse indices outside of the vector, or in another order than ascending."""
    if not indices.size:
        return
    if indices[0] < 0 or indices[-1] >= numel or not bool((indices[1:] > indices[:-1]).all()):
        raise DamagedPayload(f"{name}: indices that are not ascending from 0 to {numel - 1}")
