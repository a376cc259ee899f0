"""A vector of each worker's that all others can read and write: a row of common memory, or a window's (survey §VI-A).

The caller holds the row's lock. What a window moves is counted as ``service``; of common memory nothing moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator


class Rows(ABC):
    """A row a worker, all 0 at first."""

    @abstractmethod
    def get(self, rank: int) -> Tensor:
        """The row of ``rank``, to be read, or changed and `put`; good until another than one's own is got."""

    @abstractmethod
    def put(self, rank: int) -> None:
        """What was got as the row of ``rank``, and has been changed, is its row from now on."""


def rows_between(comm: Communicator, numel: int, dtype: torch.dtype) -> Rows:
    """Rows of ``numel`` elements. Collective; only where memory is shared or reached one-sidedly."""
    return _InWindow(comm, numel, dtype) if comm.one_sided else _InCommon(comm, numel, dtype)


class _InCommon(Rows):
    def __init__(self, comm: Communicator, numel: int, dtype: torch.dtype) -> None:
        self._rows = comm.allocate(comm.size * numel, dtype, common=True).view(comm.size, -1)

    def get(self, rank: int) -> Tensor:
        return self._rows[rank]

    def put(self, rank: int) -> None:
        return


class _InWindow(Rows):
    def __init__(self, comm: Communicator, numel: int, dtype: torch.dtype) -> None:
        self._comm = comm
        self._own, self._others = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
        self._window = comm.window(self._own.nbytes)

    def get(self, rank: int) -> Tensor:
        with self._comm.counting("service"):
            self._window.get(rank, (0, self._copy(rank)))
        return self._copy(rank)

    def put(self, rank: int) -> None:
        with self._comm.counting("service"):
            self._window.put(rank, (0, self._copy(rank)))

    def _copy(self, rank: int) -> Tensor:
        return self._own if rank == self._comm.rank else self._others
