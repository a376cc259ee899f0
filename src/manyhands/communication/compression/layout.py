"""What a flat vector consists of: where its tensors, columns and blocks begin, for compressors that look at these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Shape = tuple[int, ...]


class Layout:
    """The tensors that a flat vector consists of, end to end. Work is done in float32, or float64 where they are."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> None:
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = [math.prod(shape) for shape in self.shapes]
        self.numel = sum(sizes)
        self._ends = np.cumsum(np.array(sizes, np.int64))

    @property
    def itemsize(self) -> int:
        """Bytes of a value as it is worked on, and sent where values are."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def scalar(self) -> type[np.floating[Any]]:
        """The same as NumPy's type."""
        return np.float64 if self.dtype == torch.float64 else np.float32

    @cached_property
    def tensors(self) -> NDArray[np.int64]:
        """Where each tensor that is not empty begins."""
        return _starts(self._ends)

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Where each column begins: the weights into one unit, which torch stores as a row; else a whole tensor."""
        ends = [np.zeros(0, np.int64)]
        for shape, end in zip(self.shapes, self._ends.tolist(), strict=True):
            numel = math.prod(shape)
            width = numel // shape[0] if len(shape) > 1 and numel else max(numel, 1)
            ends.append(np.arange(end - numel + width, end + 1, width))
        return _starts(np.concatenate(ends))

    def blocks(self, width: int) -> NDArray[np.int64]:
        """Where each run of ``width`` values begins, whatever tensors they belong to."""
        return np.arange(0, self.numel, width)

    def lengths(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the runs that begin at ``starts``."""
        return np.diff(starts, append=self.numel)

    def part(self, lo: int, hi: int) -> Layout:
        """The vector's elements ``[lo, hi)`` as a vector of their own; tensors and columns are cut at its bounds."""
        part = Layout(((hi - lo,),), self.dtype)
        part.tensors, part.columns = (_clipped(starts, lo, hi) for starts in (self.tensors, self.columns))
        return part


def _starts(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([np.zeros(1, np.int64), ends]))[:-1]


def _clipped(starts: NDArray[np.int64], lo: int, hi: int) -> NDArray[np.int64]:
    inner = starts[(starts > lo) & (starts < hi)] - lo
    return np.concatenate([np.zeros(int(hi > lo), np.int64), inner])
