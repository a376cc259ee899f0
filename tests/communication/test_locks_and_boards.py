"""Locks and boards of common memory: mutual exclusion, order, deadlines, and holders that die."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from manyhands.communication import robust_mutex
from manyhands.communication.communicator import Communicator, Context
from manyhands.communication.segment import Segment
from manyhands.errors import BadInput, DeadlineExceeded
from manyhands.testing import run_ranks

SHARING = ("single", "threads", "shared", "simulated")


def count_under_a_lock(comm: Communicator, times: int) -> int:
    counter = comm.allocate(1, torch.int64, common=True)
    (lock,) = comm.locks(1)
    comm.barrier()
    for _ in range(times):
        with lock:
            seen = int(counter[0])
            if comm.transport != "simulated":
                time.sleep(0)  # a chance for others to come in between
            counter[0] = seen + 1
    comm.barrier()
    return int(counter[0])


@pytest.mark.parametrize("on", SHARING)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_count_is_lost_under_a_lock(on, size):
    if on == "single" and size > 1:
        pytest.skip("single is one rank")
    assert run_ranks(count_under_a_lock, size, on=on, args=(200,)) == [200 * size] * size


def keep_order(comm: Communicator, rounds: int) -> list[int]:
    """Ranks write their names in turn: r waits until the one before it has written."""
    board = comm.board()
    written = comm.allocate(rounds * comm.size, torch.int64, common=True)
    comm.barrier()
    for i in range(rounds):
        turn = i * comm.size + comm.rank
        board.wait(turn, "the test", rank=(comm.rank - 1) % comm.size)
        written[turn] = comm.rank
        board.post(turn + 1)
    least = board.wait((rounds - 1) * comm.size + 1, "the test's end")
    comm.barrier()
    assert least > (rounds - 1) * comm.size
    return written.tolist()


@pytest.mark.parametrize("on", ["threads", "shared", "simulated"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_who_waits_for_the_rank_before_him_comes_after_it(on, size):
    assert run_ranks(keep_order, size, on=on, args=(20,))[0] == list(range(size)) * 20


def stay_within(comm: Communicator, steps: int, bound: int) -> int:
    """The largest lead over the slowest that this rank has seen when it was let go on."""
    board, lead = comm.board(), 0
    for clock in range(steps):
        lead = max(lead, clock - board.wait(clock - bound, "the bound"))
        if comm.rank == 0 and comm.transport != "simulated":
            time.sleep(0.0005)
        board.post(clock + 1)
    return lead


@pytest.mark.parametrize("on", ["threads", "shared", "simulated"])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_is_let_go_further_ahead_than_the_bound(on, bound):
    assert max(run_ranks(stay_within, 3, on=on, args=(60, bound))) <= bound


def hold_for_ever(comm: Communicator, what: str) -> str:
    comm.timeout_s = 0.5
    comm.step = 7
    (lock,), board = comm.locks(1), comm.board()
    try:
        if what == "board":
            if comm.rank:
                board.wait(1, "the test")
        elif comm.rank == 0:
            with lock:
                comm.barrier()
                time.sleep(1.2)
        else:
            comm.barrier()
            with lock:
                pass
    except DeadlineExceeded as e:
        return str(e)
    return ""


@pytest.mark.parametrize("on", ["threads", "shared"])
@pytest.mark.parametrize("what", ["lock", "board"])
def test_a_wait_for_a_lock_or_a_counter_ends_at_its_deadline_and_names_who_is_waited_for(on, what):
    said = run_ranks(hold_for_ever, 2, on=on, args=(what,))[1]
    assert "rank 1 waited" in said
    assert "rank 0" in said
    assert "at step 7" in said


def no_locks(comm: Communicator) -> list[str]:
    said = []
    for ask in (lambda: comm.locks(1), comm.board):
        with pytest.raises(BadInput) as e:
            ask()
        said.append(str(e.value))
    return said


def test_without_common_memory_there_is_nothing_to_lock():
    assert all("no memory that its workers share" in said for said in run_ranks(no_locks, 2, on="gloo")[0])


def test_a_lock_whose_holder_was_killed_goes_to_the_next_who_is_told_whose_it_was():
    segment = Segment.create()
    try:
        region = segment.map(segment.reserve(robust_mutex.LINE_B), robust_mutex.LINE_B)
        robust_mutex.initialise(region.address)

        def die_with_it() -> None:
            robust_mutex.RobustMutex(region, 0, 5, Context(), timeout_s=5).__enter__()
            os.kill(os.getpid(), signal.SIGKILL)

        child = multiprocessing.get_context("fork").Process(target=die_with_it)
        child.start()
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
        lock = robust_mutex.RobustMutex(region, 0, 1, Context(), timeout_s=5)
        for _ in range(2):  # it is an ordinary lock again
            with lock:
                pass
        assert lock.lost == [5]
    finally:
        segment.close()


def pulled(comm: Communicator) -> list[int]:
    x = torch.zeros(100)
    sent_B, messages = comm.counters.sent_B(), comm.counters.messages()
    comm.access("pull", x)
    comm.access("push", x[:10])
    return [comm.counters.sent_B() - sent_B, comm.counters.messages() - messages]


@pytest.mark.parametrize("on", ["threads", "shared", "simulated"])
def test_what_stands_for_a_server_counts_as_messages_with_one(on):
    assert run_ranks(pulled, 2, on=on) == [[440, 2]] * 2
    assert run_ranks(pulled, 1, on="single") == [[0, 0]]
