"""One-sided memory: what is put is there, a lock has one holder, and the rank whose memory it is takes no part."""

import time
from pathlib import Path

import pytest
import torch

from manyhands.communication import transports
from manyhands.communication.communicator import Communicator
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded
from manyhands.plan import ONE_SIDED
from manyhands.testing import run_ranks
from tests.communication.test_locks_and_boards import stay_within

SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))


def word() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


def test_the_plan_knows_which_transports_are_one_sided():
    assert {name for name in transports if transports.load(name).one_sided} == set(ONE_SIDED)


def round_trips(comm: Communicator) -> None:
    """Each writes a part of its right neighbour's memory and reads all of its left neighbour's."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    window = comm.window(64 + 8 * comm.rank)  # sizes may differ
    everything = torch.empty(8, dtype=torch.float64)
    window.get(before, (0, everything))
    assert everything.tolist() == [0.0] * 8
    comm.barrier()
    halves = torch.tensor([1.5, 2.5], dtype=torch.bfloat16) + comm.rank
    window.put(after, (16, torch.full((2,), comm.rank + 0.25, dtype=torch.float64)), (40, halves), (0, torch.empty(0)))
    comm.barrier()
    numbers, twos = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.bfloat16)
    window.get(comm.rank, (16, numbers), (40, twos))
    assert numbers.tolist() == [before + 0.25] * 2
    assert twos.tolist() == [before + 1.5, before + 2.5]
    window.get(before, (0, everything))
    writer = (before - 1) % comm.size
    assert everything[2:4].tolist() == [writer + 0.25] * 2
    assert everything[[0, 1, 4, 6, 7]].tolist() == [0.0] * 5
    comm.barrier()


def rows(comm: Communicator) -> None:
    """Rows of a table of 3 columns that begins at byte 8."""
    window = comm.window(8 + 10 * 3 * 4)
    chosen, other = torch.tensor([1, 4, 9]), (comm.rank + 1) % comm.size
    starts = 8 + chosen * 12
    values = torch.arange(9.0).view(3, 3) + 10 * comm.rank
    window.put(other, (starts, values))
    comm.barrier()
    table, some = torch.empty(30), torch.empty(2, 3)
    owner = (comm.rank - 1) % comm.size
    window.get(comm.rank, (8, table))
    expected = torch.zeros(10, 3)
    expected[chosen] = torch.arange(9.0).view(3, 3) + 10 * owner
    assert torch.equal(table.view(10, 3), expected)
    window.get(comm.rank, (starts[1:], some), (starts[:0], torch.empty(0, 3)))
    assert torch.equal(some, expected[[4, 9]])
    comm.barrier()


def counted(comm: Communicator) -> None:
    window, x = comm.window(80), torch.zeros(10)
    tallies = comm.counters.tallies["service"]
    before = [(tallies[what].calls, tallies[what].sent_B) for what in ("get", "put")]
    with comm.counting("service"):
        window.get((comm.rank + 1) % comm.size, (0, x), (40, x[:3]))
        window.put((comm.rank + 1) % comm.size, (0, x))
        window.put(comm.rank, (0, x))
    after = [(tallies[what].calls, tallies[what].sent_B) for what in ("get", "put")]
    grown = [(a - c, b - d) for (a, b), (c, d) in zip(after, before, strict=True)]
    assert grown == ([(2, 52), (1, 40)] if comm.size > 1 else [(0, 0), (0, 0)])
    comm.barrier()


def count_under_a_lock(comm: Communicator) -> None:
    window, locks = comm.window(16), comm.locks(3)
    for _ in range(100):
        with locks[0], locks[2]:
            pass
        with locks[1]:
            seen = word()
            window.get(0, (8, seen))
            time.sleep(0)  # a chance for others to come in between
            window.put(0, (8, seen + 1))
    comm.barrier()
    total = word()
    window.get(0, (8, total))
    assert int(total) == 100 * comm.size
    comm.barrier()


def keep_order(comm: Communicator) -> None:
    """Ranks write their names in turn; what was put before a counter was posted is there for who waited for it."""
    board, window, rounds = comm.board(), comm.window(8 * 10 * comm.size), 10
    assert board.read() == [0] * comm.size
    comm.barrier()
    for i in range(rounds):
        turn = i * comm.size + comm.rank
        if comm.size > 1:
            board.wait(turn, "the test", rank=(comm.rank - 1) % comm.size)
        window.put(0, (8 * turn, torch.tensor([comm.rank])))
        board.post(turn + 1)
    assert board.wait((rounds - 1) * comm.size + 1, "the test's end") > (rounds - 1) * comm.size
    board.wait_for_one(rounds * comm.size, "the last")
    assert max(board.read()) == rounds * comm.size
    written = torch.zeros(rounds * comm.size, dtype=torch.int64)
    window.get(0, (0, written))
    assert written.tolist() == list(range(comm.size)) * rounds
    comm.barrier()


def groups_have_their_own(comm: Communicator) -> None:
    group = comm.split(comm.rank % 2)
    window, (lock,), board = group.window(8), group.locks(1), group.board()
    for _ in range(20):
        with lock:
            seen = word()
            window.get(0, (0, seen))
            window.put(0, (0, seen + 1))
    board.post(3)
    assert board.wait(3, "the test") == 3
    group.barrier()
    window.get(0, (0, seen))
    assert int(seen) == 20 * group.size
    group.close()
    for reach in (lambda: window.get(0, (0, seen)), board.read, lock.__enter__):
        with pytest.raises(CommunicationError, match=f"rank {comm.rank} reaches for a window that has been given back"):
            reach()


CHECKS = (round_trips, rows, counted, count_under_a_lock, keep_order, groups_have_their_own)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_window(check, size):
    run_ranks(check, size, on="mpi")


def computing(comm: Communicator, folder: str) -> int:
    """Rank 0 is in no call of MPI until rank 1 has read, written and locked in its memory."""
    window, (lock,), board = comm.window(2**20), comm.locks(1), comm.board()
    done, passes = Path(folder) / "done", 0
    comm.barrier()
    if comm.rank == 1:
        x = torch.ones(2**18)
        with lock:
            window.put(0, (0, x))
            window.get(0, (0, x))
        board.post(1)
        done.touch()
    else:
        deadline = time.monotonic() + 15
        while not done.exists() and time.monotonic() < deadline:
            passes += 1
    found = done.exists()
    comm.barrier()
    return int(found)


def test_on_one_host_the_rank_whose_memory_it_is_need_not_take_part(tmp_path):
    assert run_ranks(computing, 2, on="mpi", args=(str(tmp_path),)) == [1, 1]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_is_let_go_further_ahead_than_the_bound(bound):
    assert max(run_ranks(stay_within, 2, on="mpi", args=(60, bound))) <= bound


def held_for_ever(comm: Communicator) -> list[str]:
    (lock,), board = comm.locks(1), comm.board()
    before, comm.step = comm.timeout_s, 7
    said: list[str] = []
    comm.barrier()
    if comm.rank == 1:
        with lock:
            comm.barrier()
            comm.barrier()
    else:
        comm.barrier()
        comm.timeout_s = 0.3
        for wait in (lock.__enter__, lambda: board.wait(1, "the test"), lambda: board.wait_for_one(1, "the test")):
            with pytest.raises(DeadlineExceeded) as e:
                wait()
            said.append(str(e.value))
        comm.timeout_s = before
        comm.barrier()
    with lock:  # it is an ordinary one again
        pass
    comm.barrier()
    return said


def test_waits_end_at_the_deadline_and_name_who_is_waited_for():
    in_lock, on_board, for_one = run_ranks(held_for_ever, 2, on="mpi")[0]
    assert "rank 0 waited 0.3 s in lock 0 at step 7 for rank 1;" in in_lock
    for said in (on_board, for_one):
        assert "rank 0 waited 0.3 s in the test at step 7 for rank 1;" in said


def given_back_by_another(comm: Communicator) -> None:
    (lock,) = comm.locks(1)
    if comm.rank == 0:
        lock.__enter__()
    comm.barrier()
    if comm.rank == 1:
        with pytest.raises(CommunicationError, match="rank 1 gives back lock 0, which rank 0 holds"):
            lock.__exit__()
    comm.barrier()
    if comm.rank == 0:
        lock.__exit__()
        with pytest.raises(CommunicationError, match="rank 0 gives back lock 0, which nobody holds"):
            lock.__exit__()
    comm.barrier()


def test_a_lock_is_given_back_by_its_holder_alone():
    run_ranks(given_back_by_another, 2, on="mpi")


def no_windows(comm: Communicator) -> str:
    with pytest.raises(BadInput) as e:
        comm.window(8)
    return str(e.value)


def test_elsewhere_there_are_no_windows():
    assert "mpi has windows" in run_ranks(no_windows, 1, on="single")[0]
