"""What is MPI's own, beside the contract: what it leaves on the machine, and what a lost or stuck peer becomes.

A test whose ranks do not survive it starts ``mpiexec`` for them; what they run is a function of this file. ``UCX_TLS``
keeps MPICH's ranks to shared memory, so that they listen nowhere; mpiexec itself listens on all interfaces whatever it
is told (MPICH 5.0.2).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from manyhands.communication.topology import Mesh
from manyhands.communication.transports.mpi import MpiCommunicator
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded, PeerLost
from manyhands.testing import run_ranks
from tests import guards

ROOT = Path(__file__).parent.parent.parent
MPIEXEC = Path(sys.executable).with_name("mpiexec")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "UCX_TLS": "self,posix,sysv,cma", "UCX_LOG_LEVEL": "error"}

needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpich wheel")


def run(fn, size: int) -> subprocess.CompletedProcess[str]:
    """``fn(comm)`` on ``size`` ranks; its output is to be empty where all is well."""
    code = "from tests.communication import test_mpi as t; t.{}(t.MpiCommunicator.join(timeout_s=10))"
    command = [MPIEXEC, "-n", str(size), sys.executable, "-c", code.format(fn.__name__)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )


def assert_well(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (0, "")


def use_beside_the_user(comm: MpiCommunicator) -> None:
    """A communicator of the user's is wrapped; messages and collectives on it and on ours do not meet."""
    from mpi4py import MPI

    theirs = MPI.COMM_WORLD.Split(0, -comm.rank)  # in reverse order
    ours = MpiCommunicator.wrap(theirs, timeout_s=10)
    assert (ours.rank, ours.size) == (comm.size - 1 - comm.rank, comm.size)
    after, before = (ours.rank + 1) % ours.size, (ours.rank - 1) % ours.size
    request = theirs.Isend(torch.full((2,), 1.0).numpy(), after, tag=5)
    work = ours.send(torch.full((2,), 2.0), after, tag=5)
    x = torch.empty(2)
    assert ours.recv(x, None, tag=5).source == before
    assert x.tolist() == [2.0, 2.0]
    theirs.Recv(x.numpy(), before, tag=5)
    assert x.tolist() == [1.0, 1.0]
    request.Wait()
    work.wait()
    with pytest.raises(BadInput, match="tags are whole numbers"):
        ours.send(x, after, tag=-1)
    found = guards._listening(guards.Snapshot.take().sockets)
    inherited = [a for a in found if a.startswith("00000000")]  # of mpiexec, which leaks it to its children
    assert len(inherited) <= 1
    assert found == inherited
    ours.close()
    comm.barrier()
    comm.close()


@needs_mpiexec
@pytest.mark.slow
def test_it_wraps_the_users_communicator_and_opens_no_listener():
    assert_well(run(use_beside_the_user, 3))


def check_exactness(comm: MpiCommunicator) -> None:
    for weights in ([33.0] * 3, [32.0, 33.0, 0.0], [0.1, 1e6, 3.0], [0.0, 7.0, 0.0]):
        parts = [torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(3)]
        x = parts[comm.rank].clone() if weights[comm.rank] else torch.full((1000,), torch.nan, dtype=torch.float64)
        comm.all_reduce(x, weight=weights[comm.rank]).wait()
        true = sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
        assert (x - true).abs().max() <= 1e-12


@needs_mpiexec
@pytest.mark.slow
def test_weighted_means_are_exact_to_rounding():
    assert_well(run(check_exactness, 3))


def lose(comm: MpiCommunicator) -> None:
    (lock,) = comm.locks(1)
    if comm.rank == 1:
        lock.__enter__()
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if comm.rank == 0:
        lock.__enter__()
    comm.recv(torch.empty(3), 1)


@needs_mpiexec
def test_a_killed_rank_ends_the_run_and_leaves_no_memory_behind():
    done = run(lose, 2)
    assert done.returncode == signal.SIGKILL
    assert "DeadlineExceeded" not in done.stdout  # it was at once
    assert "Killed" in done.stdout  # and that /dev/shm is as it was is seen to by conftest


def say_so(comm: MpiCommunicator) -> None:
    group = comm.split(comm.rank % 2)  # ranks 0 and 2; rank 1 alone
    comm.step = 4
    (lock,), board = comm.locks(1), comm.board()
    if comm.rank == 1:
        lock.__enter__()
    comm.barrier()
    t0 = time.monotonic()
    token = torch.zeros(1)
    if comm.rank == 1:
        comm.recv(token, 0)  # the others have left the barrier, too
        comm.recv(token, 2)
        comm.fail()
        return
    comm.send(token, 1).wait()
    with pytest.raises(PeerLost, match=f"rank {comm.rank} lost rank 1 while in all_reduce at step 4"):
        comm.all_reduce(torch.zeros(1000)).wait()
    with pytest.raises(PeerLost, match=f"rank {comm.rank} lost rank 1 while in recv at step 4"):
        group.recv(torch.zeros(3), None)  # a group's error names ranks of the world
    with pytest.raises(PeerLost, match=f"rank {comm.rank} lost rank 1 while in lock 0 at step 4"):
        lock.__enter__()
    with pytest.raises(PeerLost, match=f"rank {comm.rank} lost rank 1 while in the test at step 4"):
        board.wait(1, "the test", rank=1)
    comm.fail()  # as a worker does that has met an error
    assert time.monotonic() - t0 < 5


@needs_mpiexec
@pytest.mark.slow
def test_a_failing_rank_is_named_at_once():
    assert_well(run(say_so, 3))


def be_late(comm: MpiCommunicator) -> None:
    comm.barrier()
    usual, comm.timeout_s, comm.step = comm.timeout_s, 0.5, 3
    if comm.rank == 0:
        x = torch.zeros(3)
        with pytest.raises(DeadlineExceeded, match=r"rank 0 waited 0\.5 s in recv at step 3 for rank 1;"):
            comm.recv(x, 1, tag=9)
        with pytest.raises(DeadlineExceeded, match=r"in recv at step 3 for one or more of ranks 1, 2;"):
            comm.recv(x, None, tag=9)
        with pytest.raises(DeadlineExceeded, match=r"in barrier at step 3 for one or more of ranks 1, 2;"):
            comm.barrier()
    else:
        time.sleep(2)
        comm.timeout_s = 10
        comm.barrier()
    # A receive that was given up takes nothing: what was sent since goes to the next one.
    if comm.rank == 1:
        comm.send(torch.ones(3), 0, tag=9).wait()
    if comm.rank == 0:
        comm.timeout_s = 10
        assert comm.recv(torch.zeros(3), None, tag=9).tensor.tolist() == [1.0] * 3
        assert x.tolist() == [0.0] * 3
    comm.timeout_s = usual


@needs_mpiexec
def test_a_late_rank_is_named_at_the_deadline():
    run_ranks(be_late, 3, on="mpi")


def split_often(comm: MpiCommunicator) -> None:
    for n in range(2500):  # MPICH has 2048 groups
        group = comm.split(0)
        if n % 2:
            group.split(0).close()
        group.close()
        group.close()
    with pytest.raises(CommunicationError, match=f"rank {comm.rank} has left this group: it was closed"):
        group.barrier()
    inner = comm.split(0).split(0)
    for extent in (1, comm.size) * 1200:
        comm.mesh = Mesh(data=comm.size // extent, tensor=extent)
        comm.over(frozenset({"data"}))
    comm.release(comm.mark())
    with pytest.raises(CommunicationError, match=f"rank {comm.rank}, split: "):
        [comm.split(0) for _ in range(2500)]
    comm.close()
    with pytest.raises(CommunicationError, match="was closed"):
        inner.barrier()
    comm.split(0).barrier()  # there is room again
    comm.barrier()


@needs_mpiexec
@pytest.mark.slow
def test_closed_groups_are_given_back_and_too_many_are_an_error_of_ours():
    assert_well(run(split_often, 2))


def open_often(comm: MpiCommunicator) -> None:
    mark = comm.mark()
    kept = comm.window(8)
    later = comm.mark()
    for _ in range(25):
        windows = [comm.window(64) for _ in range(100)]  # MPICH has 2048
        comm.release(later)
        with pytest.raises(CommunicationError, match="a window that has been given back"):
            windows[-1].put(0, (0, torch.zeros(1)))
    kept.put(1 - comm.rank, (0, torch.ones(1)))
    comm.release(mark)
    with pytest.raises(CommunicationError, match="a window that has been given back"):
        kept.put(0, (0, torch.zeros(1)))
    with pytest.raises(CommunicationError, match=f"rank {comm.rank}, window: "):
        [comm.window(8) for _ in range(2500)]
    comm.close()
    comm.window(8)  # there is room again
    comm.close()


@needs_mpiexec
@pytest.mark.slow
def test_windows_are_given_back_and_too_many_are_an_error_of_ours():
    assert_well(run(open_often, 2))


def fail_and_close(comm: MpiCommunicator) -> None:
    """Rank 0 meets an error of its own and closes; rank 1 does not."""
    comm.window(8)
    if comm.rank == 0:
        comm.timeout_s = 0.3
        with pytest.raises(ValueError, match="the first") as e, contextlib.closing(comm):
            raise ValueError("the first")
        (note,) = e.value.__notes__
        assert "in barrier" in note
        comm.fail()
    else:
        with pytest.raises(PeerLost):
            comm.recv(torch.zeros(1), 0)
        comm.fail()
        comm.close()


@needs_mpiexec
@pytest.mark.slow
def test_an_error_of_closing_does_not_hide_the_first():
    assert_well(run(fail_and_close, 2))


def test_without_mpi_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BadInput, match=r'pip install "manyhands\[mpi\]"'):
        MpiCommunicator.join()
