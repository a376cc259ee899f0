"""One-sided memory of MPI: windows that other ranks read and write, and locks and boards made of their words.

    window   MPI_Win_allocate, open to everybody by one MPI_Win_lock_all for all its life; each access ends with a flush
    lock     a word: compare-and-swap 0 → rank + 1 takes it, and rank + 1 → 0 gives it back: only operations of one kind
             need be atomic to each other (MPI's accumulate_ops). Tries are polled as all waits of `mpi` are
    board    a word a rank, all with rank 0, read and replaced by accumulates, which are atomic word by word

Guarantee: what was put under a lock is what the lock's next holder gets. The rank whose memory it is takes no part
(passive target), but *whether it must be inside some call of MPI* for an access to end is the MPI's matter. On one
host MPICH keeps windows in shared memory and whoever accesses them copies: by MPICH 5.0.2 on 2 cores, of a rank that
computed for 2 s outside MPI just as of an idle one, 1 MB is got or put in 80 µs and a word in 3 µs; a compare-and-swap
takes 3 to 4 µs of processor time, and 8 to 20 µs on the clock where others use the cores. Between hosts (not measured)
the same holds of what the network does by itself. The rest waits until the target communicates, which a training step
does, or for a thread of the MPI that sees to it: ``MPIR_CVAR_ASYNC_PROGRESS=1`` of MPICH, ``I_MPI_ASYNC_PROGRESS=1`` of
Intel's; Open MPI has one over TCP only,
``OMPI_MCA_btl_tcp_progress_thread=1``.

Waits for locks and counters have deadlines that name who is waited for, and end at once when a rank says that it has
failed. An access has no deadline: MPI has no flush that can be asked whether it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manyhands.communication.communicator import At, Lock
from manyhands.errors import CommunicationError

if TYPE_CHECKING:
    from manyhands.communication.transports.mpi import MpiCommunicator

WORD_B = 8


class _OneSided:
    """What windows, locks and boards have in common. Collective to make."""

    def __init__(self, comm: MpiCommunicator, size_B: int) -> None:
        self._comm, self._memory, self._mpi = comm, comm._open_window(size_B), comm._mpi

    @property
    def _window(self) -> Any:
        if not self._memory:  # MPI itself would crash
            rank = self._comm._names[self._comm.rank]
            raise CommunicationError(f"rank {rank} reaches for a window that has been given back")
        return self._memory

    def _words(self, *values: int) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[Any]]:
        """Whole numbers, and what MPI wants to know of them."""
        words = np.array(values, np.int64)
        return words, [words, self._mpi.INT64_T]


class MpiWindow(_OneSided):
    """See `communicator.Window`."""

    def get(self, frm: int, *parts: tuple[At, Tensor]) -> None:
        """Fill the tensors from the memory of rank ``frm``."""
        self._access("get", self._window.Get, frm, parts)

    def put(self, to: int, *parts: tuple[At, Tensor]) -> None:
        """Write the tensors to the memory of rank ``to``."""
        self._access("put", self._window.Put, to, parts)

    def _access(self, what: str, access: Callable[..., None], whose: int, parts: tuple[tuple[At, Tensor], ...]) -> None:
        comm, byte = self._comm, self._mpi.BYTE
        types = []
        with comm._translating(what, whose), comm._spending(what):
            for at, x in parts:
                if not x.numel():
                    continue
                if whose != comm.rank:
                    comm._count(what, x, 1)
                here = [x.view(torch.uint8).numpy(), byte]
                if isinstance(at, int):
                    access(here, whose, [at, x.nbytes, byte])
                else:
                    types.append(byte.Create_hindexed_block(x.nbytes // len(at), at.numpy()).Commit())
                    access(here, whose, [0, 1, types[-1]])
            self._window.Flush(whose)
            for rows in types:
                rows.Free()


def locks_between(comm: MpiCommunicator, count: int) -> list[Lock]:
    """So many locks, lock i with rank i mod P. Collective."""
    one = _OneSided(comm, WORD_B * len(range(comm.rank, count, comm.size)))
    return [MpiLock(one, i) for i in range(count)]


class MpiLock:
    """See `communicator.Lock`; a word of ``words``. Not to be taken twice by the same rank."""

    def __init__(self, words: _OneSided, index: int) -> None:
        self._words, self._comm, self._doing = words, words._comm, f"lock {index}"
        place, self._with = divmod(index, self._comm.size)
        self._at = place * WORD_B
        self._holder, self._found = words._words(0)  # from 1
        _, self._mine = words._words(self._comm.rank + 1)
        _, self._nobody = words._words(0)
        #: Never any: a rank that dies takes all others along.
        self.lost: list[int] = []

    def __enter__(self) -> None:
        comm = self._comm
        with comm._translating(self._doing), comm._waiting():
            comm._poll(self._take, self._doing, lambda s: comm._late(self._doing, s, [int(self._holder[0]) - 1]))

    def _take(self) -> bool:
        window = self._words._window
        window.Compare_and_swap(self._mine, self._nobody, self._found, self._with, self._at)
        window.Flush(self._with)
        return not self._holder[0]

    def __exit__(self, *_: object) -> None:
        window, me = self._words._window, self._comm.rank
        with self._comm._translating(self._doing):
            window.Compare_and_swap(self._nobody, self._mine, self._found, self._with, self._at)
            window.Flush(self._with)
        if self._holder[0] != me + 1:
            holder = f"rank {self._holder[0] - 1}" if self._holder[0] else "nobody"
            raise CommunicationError(f"rank {me} gives back {self._doing}, which {holder} holds")


class MpiBoard(_OneSided):
    """See `communicator.Board`; the counters lie with rank 0."""

    def __init__(self, comm: MpiCommunicator) -> None:
        super().__init__(comm, WORD_B * comm.size if comm.rank == 0 else 0)
        self._counters, self._found = self._words(*[0] * comm.size)
        _, self._nothing = self._words(*[0] * comm.size)
        self._others = [p for p in range(comm.size) if p != comm.rank]

    def post(self, value: int) -> None:
        """Set this rank's counter."""
        (_, mine), (_, before) = self._words(value), self._words(0)
        with self._comm._translating("board"):
            self._window.Fetch_and_op(mine, before, 0, self._comm.rank * WORD_B, self._mpi.REPLACE)
            self._window.Flush(0)

    def read(self) -> list[int]:
        """All counters, in rank order."""
        with self._comm._translating("board"):
            return self._read()

    def wait(self, least: int, doing: str, *, rank: int | None = None) -> int:
        """The least of all counters, once those of the other ranks (or that of ``rank``) are at least ``least``."""
        among = self._others if rank is None else [rank]
        self._until(lambda counters: [p for p in among if counters[p] < least], doing)
        return int(self._counters.min())

    def wait_for_one(self, least: int, doing: str) -> None:
        """Return when one of them is at least ``least``."""
        self._until(lambda counters: [] if max(counters) >= least else self._others or [0], doing)

    def _until(self, behind: Callable[[list[int]], list[int]], doing: str) -> None:
        """Return when ``behind`` names no rank, with the counters as they then are."""
        comm = self._comm
        with comm._translating(doing), comm._waiting():
            comm._poll(
                lambda: not behind(self._read()), doing, lambda s: comm._late(doing, s, behind(self._counters.tolist()))
            )

    def _read(self) -> list[int]:
        everything = [0, self._comm.size, self._mpi.INT64_T]
        self._window.Get_accumulate(self._nothing, self._found, 0, everything, self._mpi.NO_OP)
        self._window.Flush(0)
        result: list[int] = self._counters.tolist()
        return result
