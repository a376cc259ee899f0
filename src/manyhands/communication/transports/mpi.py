"""MPI through mpi4py: the algorithms of the MPI that is installed, on one host or many.

Every operation is a nonblocking one, awaited by polling: the blocking calls know no deadline, and they spin. Polling
yields the processor at first and then naps, never longer than a twentieth of the time waited so far. That is as fast
as the blocking call while there is a core for each rank, and faster when there is not: all_reduce of 28,938 floats by
MPICH 5.0.2 on 2 cores, means of 100, µs, 2 / 4 / 8 ranks: blocking 42 / 120 / 6561, polling 43 / 131 / 859.

The weights of a mean are gathered first, which costs a latency of MPI (2 µs on one host) and makes the factor of a
rank that alone has weight exactly 1. Tensors are moved as bytes; half precision is summed in float32.

Memory that ranks reach at each other (`window`, and locks and boards made of it) is in `mpi_window`.

MPI alone cannot tell a rank that another has failed: a failing one says so on a communicator kept for that (`fail`).
One that is killed takes the others along where the launcher cleans up (mpiexec does); otherwise they meet a deadline.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from manyhands.communication.communicator import Board, Lock, Received, Window, Work, wrong_length
from manyhands.communication.reduction import coefficients, slices
from manyhands.communication.transports.engine import EngineCommunicator
from manyhands.communication.transports.mpi_window import MpiBoard, MpiWindow, locks_between
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded

#: So often the processor is yielded before the first nap: about a millisecond, the docstring's measurement.
YIELDS = 1000
#: The shortest nap is what the kernel makes of any (its timer slack), the longest is what a user does not notice.
NAP_S = (50e-6, 1e-3)
FAILED_TAG = 1


class MpiCommunicator(EngineCommunicator):
    """One MPI process's end of a communicator. Operations progress only while some rank's call waits."""

    transport: ClassVar[str] = "mpi"
    one_sided: ClassVar[bool] = True
    _world: MpiCommunicator

    def __init__(
        self,
        mpi_comm: Any,
        control: Any,
        *,
        timeout_s: float = 60.0,
        within: tuple[MpiCommunicator, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(mpi_comm.rank, mpi_comm.size, timeout_s=timeout_s, within=within)
        self._mpi, self._engine, self._control = _mpi(), mpi_comm, control
        self._parent = None if within is None else within[0]
        self._split_off: list[MpiCommunicator] = []
        self._windows: list[Any] = []  # of MPI's, in the order in which all ranks of the group made them
        self._failed = False
        self._sums = {
            torch.float32: self._mpi.FLOAT,
            torch.float64: self._mpi.DOUBLE,
            torch.int64: self._mpi.INT64_T,
        }
        self._highest_tag = mpi_comm.Get_attr(self._mpi.TAG_UB)

    @classmethod
    def join(cls, *, timeout_s: float = 60.0) -> MpiCommunicator:
        """Join the processes that mpiexec (or srun) started; without one, a group of one."""
        comm = cls.wrap(_mpi().COMM_WORLD, timeout_s=timeout_s)
        comm._barrier()
        _unlink_segments()
        return comm

    @classmethod
    def wrap(cls, mpi_comm: Any, *, timeout_s: float = 60.0) -> MpiCommunicator:
        """The ranks of an mpi4py communicator, over duplicates of it. Collective."""
        return cls(mpi_comm.Dup(), mpi_comm.Dup(), timeout_s=timeout_s)

    # -- memory ----------------------------------------------------------------------------------------------------

    def window(self, size_B: int) -> Window:
        """See `Communicator.window`."""
        return MpiWindow(self, size_B)

    def locks(self, count: int) -> list[Lock]:
        """Words of a window, taken turns with the ranks: lock i lies with rank i mod P."""
        return locks_between(self, count)

    def board(self) -> Board:
        """Words of a window, with rank 0."""
        return MpiBoard(self)

    def _open_window(self, size_B: int) -> Any:
        """A window of MPI's with so many bytes here, all 0, open to everybody until it is freed. Collective."""
        self._barrier()  # all are here: what MPI waits for next is there
        with self._translating("window"):
            # A window takes one of MPI's groups. MPICH 5.0.2 crashes where there are no more, unless it is asked first.
            self._comm.Dup().Free()
            made = self._mpi.Win.Allocate(size_B, 1, self._mpi.INFO_NULL, self._comm)
            self._windows.append(made)
            made.Lock_all(self._mpi.MODE_NOCHECK)
            np.frombuffer(made.tomemory(), np.uint8).fill(0)
            made.Sync()
        self._barrier()
        return made

    def _free_windows(self, but: int = 0) -> None:
        """Give back all but so many. Collective; MPI takes none back unasked."""
        freed = self._windows[but:]
        del self._windows[but:]
        if freed and not self._world._failed:
            self._barrier()
            with self._translating("release"):
                for window in freed:
                    window.Unlock_all()
                    window.Free()

    def mark(self) -> int:
        """How many windows there are."""
        return len(self._windows)

    def release(self, mark: int) -> None:
        """Give back groups and windows made since ``mark``; an access to such a window is an error from now on."""
        super().release(mark)
        self._free_windows(mark)

    # -- collectives -----------------------------------------------------------------------------------------------

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        summand = self._summand(x, weight, "all_reduce")
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, self._numbers(summand))
        return _Pending(self, "all_reduce", request, lambda: _put(summand, x))

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        summand = self._summand(x, weight, "reduce_scatter")
        cuts = slices(x.numel(), self.size)
        lo, hi = cuts[self.rank]
        result = torch.empty(hi - lo, dtype=summand.dtype)
        lengths = [b - a for a, b in cuts]
        request = self._comm.Ireduce_scatter(self._numbers(summand), self._numbers(result), lengths)
        self._await(request, "reduce_scatter")
        x[lo:hi].copy_(result)

    def _summand(self, x: Tensor, weight: float | None, doing: str) -> Tensor:
        """What this rank adds: ``x`` itself, scaled in place, or a wider copy."""
        wide = x if x.dtype in self._sums else x.to(torch.float32)
        if weight is None:
            return wide
        weights = torch.full((self.size,), weight, dtype=torch.float64)
        mine = weights[:1].clone()
        self._await(self._comm.Iallgather(self._numbers(mine), self._numbers(weights)), doing)
        factor = (coefficients(weights.tolist()) or [])[self.rank]
        if factor == 0:
            wide.zero_()  # whatever it holds
        elif factor != 1:
            wide.mul_(factor)
        return wide

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        width = x.element_size()
        lengths, starts = [(hi - lo) * width for lo, hi in bounds], [lo * width for lo, _ in bounds]
        whole = [_bytes(x), lengths, starts, self._mpi.BYTE]
        return _Pending(self, "all_gather", self._comm.Iallgatherv(self._mpi.IN_PLACE, whole))

    def _all_to_all(self, x: Tensor) -> Tensor:
        result = torch.empty_like(x)
        self._await(self._comm.Ialltoall(self._raw(x), self._raw(result)), "all_to_all")
        return result

    def _broadcast(self, x: Tensor, root: int) -> Work:
        return _Pending(self, "broadcast", self._comm.Ibcast(self._raw(x), root))

    def _barrier(self) -> None:
        self._await(self._comm.Ibarrier(), "barrier")

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        self._check_tag(tag)
        return _Pending(self, "send", self._comm.Isend(self._raw(x), to, tag), peer=to)

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        self._check_tag(tag)
        status = self._mpi.Status()
        request = self._comm.Irecv(self._raw(like), self._mpi.ANY_SOURCE if frm is None else frm, tag)
        self._await(request, "recv", frm, status)  # a longer one is MPI's own error
        source, sent_B = status.Get_source(), status.Get_count(self._mpi.BYTE)
        if sent_B != like.nbytes:
            raise wrong_length(self._names[self.rank], self._names[source], tag, sent_B, like)
        return Received(source, like)

    def _arrived(self, tag: int) -> bool:
        with self._translating("arrived"):
            return bool(self._comm.Iprobe(self._mpi.ANY_SOURCE, tag))

    def _check_tag(self, tag: int) -> None:
        if not 0 <= tag <= self._highest_tag:
            raise BadInput(f"tag {tag}: this MPI's tags are whole numbers from 0 to {self._highest_tag}.")

    # -- groups and ends -------------------------------------------------------------------------------------------

    def _split(self, color: int) -> MpiCommunicator:
        colors = torch.full((self.size,), color, dtype=torch.int64)
        mine = colors[:1].clone()
        self._await(self._comm.Iallgather(self._numbers(mine), self._numbers(colors)), "split")
        members = [r for r, c in enumerate(colors.tolist()) if c == color]
        # MPI wants a color from 0; the lowest member's rank serves.
        return self._group(lambda: self._comm.Split(members[0], self.rank), members)

    def _alone(self) -> MpiCommunicator:
        return self._group(self._mpi.COMM_SELF.Dup, [self.rank])

    def _group(self, make: Callable[[], Any], members: list[int]) -> MpiCommunicator:
        with self._translating("split"):
            engine = make()
        group = MpiCommunicator(engine, self._control, timeout_s=self.timeout_s, within=(self, members))
        self._split_off.append(group)
        return group

    def close(self) -> None:
        """Free windows and the groups split from this one, and this one if it was split itself. Collective over each.

        MPI has only so many (MPICH: 2048) and takes none back unasked. An error under way when this is called (in a
        ``finally``) stays the one that is raised; that windows then could not be freed is a note to it.
        """
        first = sys.exception()
        super().close()
        while self._split_off:
            self._split_off[-1].close()
        try:
            self._free_windows()
        except CommunicationError as e:
            if first is None:
                raise
            first.add_note(f"Windows were not given back: {e}")
        if self._parent is not None and self in self._parent._split_off:
            self._parent._split_off.remove(self)
            if not self._world._failed:
                self._engine.Free()
            self._engine = None

    @property
    def _comm(self) -> Any:
        if self._engine is None:
            raise CommunicationError(f"rank {self._names[self.rank]} has left this group: it was closed")
        return self._engine

    def fail(self) -> None:
        """Tell all ranks of the world, whose waits then end with `PeerLost`."""
        self._world._failed = True
        for rank in range(self._control.size):
            if rank != self._control.rank:
                self._control.Isend([b"", self._mpi.BYTE], rank, FAILED_TAG)

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _await(self, request: Any, doing: str, peer: int | None = None, status: Any = None) -> None:
        """Return when ``request`` is done, or raise what is known about why it is not."""
        whom = None if peer is None else [peer]
        with self._translating(doing, peer), self._spending(doing):
            try:
                self._poll(functools.partial(request.Test, status), doing, lambda s: self._late(doing, s, whom))
            except CommunicationError:
                if doing == "recv":  # what comes now must not be written to the caller's tensor
                    request.Cancel()
                    request.Wait()
                raise

    @contextlib.contextmanager
    def _translating(self, doing: str, peer: int | None = None) -> Iterator[None]:
        """Turn MPI's exceptions into ours."""
        try:
            yield
        except self._mpi.Exception as e:
            if "PROC_FAILED" in e.Get_error_string().upper():
                raise self._lost(doing, peer) from e
            raise CommunicationError(f"rank {self._names[self.rank]}, {doing}: {e.Get_error_string()}") from e

    def _poll(self, done: Callable[[], bool], doing: str, late: Callable[[float], DeadlineExceeded]) -> None:
        """Return when ``done``; raise `PeerLost` when a rank says that it has failed, ``late`` at the deadline."""
        t0 = time.perf_counter()
        for _ in range(YIELDS):
            if done():
                return
            os.sched_yield()
        while not done():
            waited_s = time.perf_counter() - t0
            news = self._mpi.Status()
            if self._control.Iprobe(self._mpi.ANY_SOURCE, FAILED_TAG, news):
                raise self._world._lost(doing, news.Get_source())
            if waited_s > self.timeout_s:
                raise late(waited_s)
            time.sleep(min(max(waited_s / 20, NAP_S[0]), NAP_S[1]))

    # -- tensors as MPI sees them ----------------------------------------------------------------------------------

    def _numbers(self, x: Tensor) -> list[Any]:
        return [x.numpy(), self._sums[x.dtype]]

    def _raw(self, x: Tensor) -> list[Any]:
        return [_bytes(x), self._mpi.BYTE]


class _Pending:
    """An operation of MPI under way, and what remains to be done when it has ended."""

    def __init__(
        self,
        comm: MpiCommunicator,
        doing: str,
        request: Any,
        then: Callable[[], None] | None = None,
        *,
        peer: int | None = None,
    ) -> None:
        self._comm, self._doing, self._request, self._then, self._peer = comm, doing, request, then, peer

    def wait(self) -> None:
        request, then = self._request, self._then
        self._request = self._then = None
        if request is not None:
            self._comm._await(request, self._doing, self._peer)
        if then is not None:
            then()


def _put(result: Tensor, x: Tensor) -> None:
    if result is not x:
        x.copy_(result)


def _bytes(x: Tensor) -> Any:
    return x.view(torch.uint8).numpy()


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # RuntimeError: mpi4py is there and no MPI library
        raise BadInput(
            f'transport mpi: there is no usable MPI ({e}). Install one: pip install "manyhands[mpi]".'
        ) from e
    return MPI


def _unlink_segments() -> None:
    """Take away the names of MPICH's shared memory, which every rank has mapped by now.

    MPICH does so itself when it ends, but not when it is killed: 4 MB then stay in /dev/shm.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.parent == Path("/dev/shm") and path.name.startswith("mpich_shm_"):
                path.unlink(missing_ok=True)
