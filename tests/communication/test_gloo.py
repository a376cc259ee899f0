"""What is gloo's own, beside the contract: where it listens, how weights travel, what a lost or stuck peer becomes.

Each test starts its ranks as plain processes that run a function of this file.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from manyhands import testing
from manyhands.communication.reduction import coefficients, reduce_into
from manyhands.communication.transports.launchers_word import LaunchersWord
from manyhands.communication.transports.torch_distributed import GlooCommunicator, NcclCommunicator
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded, Deadlock, PeerLost, Vetoed
from manyhands.training.team import team
from tests import guards

ROOT = Path(__file__).parent.parent.parent


def run(fn, size: int, path: Path, *, dies: int | None = None) -> None:
    """``fn(path, rank, size)`` in ``size`` processes; all but rank ``dies`` must end within 40 s and say nothing."""
    with team("shared", 1):
        pass  # processes are forked from a server; now it runs, and has imported torch
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=as_rank, args=(fn, path, r, size)) for r in range(size)]
    deadline = time.monotonic() + 40
    try:
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(max(deadline - time.monotonic(), 0.1))
    finally:
        for p in ranks:
            p.kill()
            p.join()
    for r, p in enumerate(ranks):
        said = (path / f"said-{r}").read_text()
        assert p.exitcode == (-signal.SIGKILL if r == dies else 0), f"rank {r}: {said}"
        assert r == dies or said == "", f"rank {r}: {said}"


def as_rank(fn, path: Path, rank: int, size: int) -> None:
    """What is written, by gloo itself too, goes to a file."""
    torch.set_num_threads(1)
    with open(path / f"said-{rank}", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    fn(str(path / "meet"), rank, size)
    gc.collect()  # such a process ends without clearing up as an interpreter does


def listeners() -> list[str]:
    return guards._listening(guards.Snapshot.take().sockets)


# -- where it listens and whom it leaves alone -------------------------------------------------------------------------


def listen(path: str, rank: int, size: int) -> None:
    comm = GlooCommunicator.join_file(path, rank, size, timeout_s=10)
    half = comm.split(rank // 2)
    comm.barrier()
    found = listeners()
    assert found
    assert all(address.startswith("loopback") for address in found), found
    assert not dist.is_initialized()
    half.barrier()
    comm.barrier()
    comm.close()
    comm.close()
    half.close()
    assert listeners() == []
    with pytest.raises(CommunicationError, match="was closed"):
        comm.barrier()


def test_it_listens_on_loopback_only_and_makes_no_default_group(tmp_path):
    run(listen, 4, tmp_path)
    assert not (tmp_path / "meet").exists()


def join_user(path: str, rank: int, size: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size)
    for _ in range(2):  # and again after closing
        comm = GlooCommunicator.join_launcher(timeout_s=10)
        assert (comm.rank, comm.size) == (rank, size)
        ours, theirs = torch.ones(5), torch.full((5,), 2.0)
        work = comm.all_reduce(ours)
        dist.all_reduce(theirs)
        work.wait()
        assert ours.tolist() == [size] * 5
        assert theirs.tolist() == [2 * size] * 5
        comm.barrier()
        comm.close()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_default_group_of_the_users_is_joined_and_left_as_it_was(tmp_path):
    run(join_user, 2, tmp_path)


def join_torchrun() -> None:
    comm = GlooCommunicator.join_launcher(timeout_s=10)
    x = torch.full((3,), float(comm.rank + 1))
    comm.all_reduce(x).wait()
    assert x.tolist() == [3.0] * 3
    assert all(address.startswith("loopback") for address in listeners())
    comm.barrier()


@pytest.mark.slow
def test_it_joins_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from tests.communication.test_gloo import join_torchrun\njoin_torchrun()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_launcher_it_says_which_variables_are_missing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match=r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set.*torchrun"):
        GlooCommunicator.join_launcher()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_nccl_without_cuda_is_refused(tmp_path):
    with pytest.raises(BadInput, match="Without: gloo"):
        NcclCommunicator.join_file(tmp_path / "meet", 0, 1)


# -- weights -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A backend that notes what is called."""

    def __init__(self, backend) -> None:
        self.backend, self.calls = backend, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.backend, name)


def weigh(path: str, rank: int, size: int) -> None:
    comm = GlooCommunicator.join_file(path, rank, size, timeout_s=10)
    recorder = comm._backends[0] = Recorder(comm._backends[0])

    def mean(weight: float, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor, list[str]]:
        parts = [torch.randn(1000, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
        x = parts[rank].clone() if weight else torch.full((1000,), torch.nan, dtype=dtype)
        recorder.calls.clear()
        comm.all_reduce(x, weight=weight).wait()
        return parts, x, recorder.calls[:]

    for weights in ([33.0] * 3, [32.0, 33.0, 0.0], [0.1, 1e6, 3.0]):
        parts, x, calls = mean(weights[rank])
        true = sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
        assert (x - true).abs().max() <= 1e-12
        assert calls == ["allreduce"]
    parts, x, calls = mean([0.0, 7.0, 0.0][rank])
    assert torch.equal(x, parts[1])
    assert calls == ["allreduce", "broadcast"]
    _, x, _ = mean(0.0)
    assert torch.equal(x, torch.zeros(1000, dtype=torch.float64))
    with pytest.raises(Vetoed):
        mean(float("inf") if rank == 2 else 1.0)
    for dtype in (torch.float16, torch.bfloat16):  # summed here, in rank order and float32
        parts, x, calls = mean(rank + 1.0, dtype)
        expected = torch.empty(1000, dtype=dtype)
        reduce_into(expected, parts, coefficients([1.0, 2.0, 3.0]))
        assert torch.equal(x, expected)
        assert set(calls) == {"send", "recv"}
    comm.barrier()


@pytest.mark.slow
def test_weights_ride_in_the_same_collective(tmp_path):
    run(weigh, 3, tmp_path)


# -- peers that are gone, late or failing ------------------------------------------------------------------------------


def lose(path: str, rank: int, size: int) -> None:
    comm = GlooCommunicator.join_file(path, rank, size, timeout_s=10)
    comm.step = 7
    half = comm.split(rank % 2)  # ranks 0 and 2; rank 1 alone
    comm.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    t0 = time.monotonic()
    calls = {
        "recv": lambda: comm.recv(torch.empty(3), 2),
        "send": lambda: comm.send(torch.empty(3), 2).wait(),
        "all_reduce": lambda: comm.all_reduce(torch.empty(1000)).wait(),
        "reduce_scatter": lambda: comm.reduce_scatter(torch.empty(1000)),
        "barrier": comm.barrier,
    }
    for name, call in calls.items():
        with pytest.raises(PeerLost, match=f"while in {name} at step 7") as caught:
            call()
        assert caught.value.rank == rank
        assert caught.value.peer == (2 if name in ("recv", "send") else None)
    if rank == 0:
        with pytest.raises(PeerLost, match="rank 0 lost rank 2 while in recv at step 7"):
            half.recv(torch.empty(3), 1)  # a group's error names ranks of the world
    assert time.monotonic() - t0 < 5


def test_a_killed_peer_is_noticed_at_once(tmp_path):
    run(lose, 3, tmp_path, dies=2)


def be_late(path: str, rank: int, size: int) -> None:
    comm = GlooCommunicator.join_file(path, rank, size, timeout_s=10)
    comm.timeout_s = 0.5
    comm.step = 3
    comm.barrier()
    if rank == 1:
        time.sleep(3)
        return
    with pytest.raises(DeadlineExceeded, match=r"rank 0 waited 0\.\d s in all_reduce at step 3 for rank 1;") as caught:
        comm.all_reduce(torch.empty(3)).wait()
    assert 0.49 < caught.value.seconds < 2
    with pytest.raises(DeadlineExceeded, match=r"rank 0 waited 0\.\d s in recv at step 3 for rank 1;"):
        comm.recv(torch.empty(3), None)
    with pytest.raises(CommunicationError, match="this group ended when its all_reduce failed"):
        comm.recv(torch.empty(3), 1)
    with pytest.raises(Deadlock, match="from itself"):
        comm.recv(torch.empty(3), 0)
    t0 = time.monotonic()
    comm.close()  # does not wait for what hangs
    assert time.monotonic() - t0 < 1


def test_a_late_peer_is_named_at_the_deadline(tmp_path):
    run(be_late, 2, tmp_path)


def hang_up(path: str, rank: int, size: int) -> None:
    comm = GlooCommunicator.join_file(path, rank, size, timeout_s=10)
    comm.barrier()
    t0 = time.monotonic()
    if rank == 0:
        comm.fail()
        time.sleep(4)  # still alive
        return
    with pytest.raises(PeerLost):
        comm.all_reduce(torch.empty(100_000)).wait()
    assert time.monotonic() - t0 < 3.5


@pytest.mark.slow
def test_a_failing_peer_is_noticed_before_it_ends(tmp_path):
    run(hang_up, 3, tmp_path)


def test_whoever_does_not_come_is_named(tmp_path):
    with pytest.raises(DeadlineExceeded, match=r"rank 0 waited \d\.\d s in join for ranks 1, 2;"):
        GlooCommunicator.join_file(tmp_path / "meet", 0, 3, timeout_s=0.5)


def test_a_meeting_in_a_folder_that_there_is_not_is_refused_at_once(tmp_path):
    with pytest.raises(BadInput, match=r"rank 1 .*absent/meet, and there is no such folder"):
        GlooCommunicator.join_file(tmp_path / "absent" / "meet", 1, 2, timeout_s=0.5)


def test_what_a_launcher_says_is_heard_by_those_of_its_meeting_alone(tmp_path):
    first, second = LaunchersWord(tmp_path / "first"), LaunchersWord(tmp_path / "second")
    first.say("gone", 3)
    assert LaunchersWord(tmp_path / "first").awaited(3)
    second.say("failed", 3)
    assert not second.awaited(3)
    assert not first.gone(1)


def swallows_what_ended_the_group(comm):
    if comm.rank == 0:
        comm.fail()
        return True
    with pytest.raises(PeerLost):
        comm.recv(torch.zeros(1), 0)
    return comm.usable


def test_a_standing_team_whose_group_has_ended_stands_no_longer():
    assert testing.run_ranks(swallows_what_ended_the_group, 2, on="gloo") == [True, False]
    assert testing.run_ranks(summed, 2, on="gloo") == [2.0, 2.0]


def summed(comm):
    x = torch.ones(1)
    comm.all_reduce(x, weight=None).wait()
    return float(x)
