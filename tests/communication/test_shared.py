"""What is the shared transport's own, beside the contract: who is named, who is served, what is counted and given back.

Ranks are threads of this process, each with its own view of the memory file; the protocol cannot tell.
"""

import os
import threading
import time

import pytest
import torch

from manyhands.communication import futex
from manyhands.communication.segment import Segment
from manyhands.communication.transports.shared import ONE_SHOT_B, SharedCommunicator
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded, PeerLost

pytestmark = pytest.mark.skipif(not futex.AVAILABLE, reason="needs Linux on x86-64")


def run(fn, size, *, timeout_s=20.0):
    """``fn(comm)`` on ``size`` ranks; the results in rank order. What a rank raises is raised here."""
    first = Segment.create()
    offset = first.reserve(SharedCommunicator.control_B(size))
    segments = [Segment(os.dup(first.fd)) for _ in range(size)]
    results, errors = [None] * size, []

    def body(rank):
        try:
            results[rank] = fn(SharedCommunicator(segments[rank], offset, rank, size, timeout_s=timeout_s))
        except BaseException as e:
            errors.append(e)
            segments[rank].report_failure(rank)

    threads = [threading.Thread(target=body, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for segment in (first, *segments):
        segment.close()
    if errors:
        raise errors[0]
    return results


# -- failures in groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", ["barrier", "recv"])
def test_a_failed_rank_is_noticed_in_groups_under_its_name_in_the_world(doing):
    def rank(comm):
        group = comm.split(int(comm.rank > 0))  # ranks 1 and 2 are 0 and 1 of theirs
        if comm.rank == 0:
            comm.fail()  # has the very number that rank 1 has in its group
        if comm.rank != 1:
            return None
        begun = time.perf_counter()
        with pytest.raises(PeerLost, match=rf"rank 1 lost rank 0 while in {doing}"):
            group.barrier() if doing == "barrier" else group.recv(torch.zeros(1), 1)
        return time.perf_counter() - begun

    assert run(rank, 3)[1] < 5


def test_a_group_reports_failures_and_deadlines_under_names_of_the_world():
    def rank(comm):
        group = comm.split(int(comm.rank > 0)).split(0)
        if comm.rank == 1:
            with pytest.raises(DeadlineExceeded, match=r"rank 1 waited .* in barrier for ranks 2, 3;"):
                group.barrier()
            with pytest.raises(DeadlineExceeded, match=r"in recv\(from rank 3, tag 0\) for rank 3;"):
                group.recv(torch.zeros(1), 2)
            group.fail()
        time.sleep(0.6)

    def failed(comm):
        rank(comm)
        return comm._segment.failed

    assert run(failed, 4, timeout_s=0.2)[1] == 1


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_receive_from_anyone_serves_ranks_in_turn():
    def rank(comm):
        for _ in range(5 if comm.rank else 0):
            comm.send(torch.zeros(8), 0).wait()
        comm.barrier()
        return [comm.recv(torch.zeros(8)).source for _ in range(15)] if comm.rank == 0 else None

    assert run(rank, 4)[0] == [1, 2, 3] * 5


def test_waiting_for_a_message_to_leave_is_accounted_and_names_the_step():
    def rank(comm):
        comm.step = 7
        if comm.rank == 0:
            work = comm.send(torch.zeros(2_000_000), 1)
            with pytest.raises(
                DeadlineExceeded, match=r"rank 0 waited 0\.3 s in send at step 7 for rank 1 to receive;"
            ):
                work.wait()
            return comm.counters.wait_s, comm.counters.communicate_s
        time.sleep(0.5)
        return None

    waited_s, communicated_s = run(rank, 2, timeout_s=0.3)[0]
    assert 0.3 <= waited_s < 0.5
    assert communicated_s < 0.1


# -- counting ----------------------------------------------------------------------------------------------------------


def test_moved_bytes_are_those_that_were_copied():
    def rank(comm):
        def moved(call):
            before = comm.counters.moved_B
            call()
            return comm.counters.moved_B - before

        large = ONE_SHOT_B  # of float32: four times the limit
        plain, ours, common = torch.zeros(100), comm.allocate(100), comm.allocate(100, common=True)
        uneven = [(0, 90), (90, 100)]
        return [
            moved(lambda: comm.all_gather(plain, uneven).wait()),
            moved(lambda: comm.all_gather(ours, uneven).wait()),
            moved(lambda: comm.all_gather(common, uneven).wait()),
            moved(lambda: comm.all_reduce(plain).wait()),
            moved(lambda: comm.all_reduce(torch.zeros(large)).wait()),
            moved(lambda: comm.all_reduce(comm.allocate(large)).wait()),
            moved(lambda: comm.reduce_scatter(ours)),
        ]

    whole_B, half_B = 4 * ONE_SHOT_B, 2 * ONE_SHOT_B
    assert run(rank, 2) == [
        [360, 40, 0, 400, whole_B + half_B, half_B, 0],
        [40, 360, 0, 400, whole_B + half_B, half_B, 0],
    ]


# -- memory ------------------------------------------------------------------------------------------------------------


def used_B(comm):
    """What the memory file holds on to."""
    return os.fstat(comm._segment.fd).st_blocks * 512


def test_memory_is_given_back_to_the_system():
    def rank(comm):
        mark = comm.mark()
        before_B = used_B(comm)
        for _ in range(3):
            x = comm.allocate(1_000_000)
            x.fill_(1.0)
            comm.all_reduce(torch.zeros(100_000)).wait()  # staged
            comm.split(0).all_reduce(torch.zeros(10)).wait()
            comm.barrier()
            assert used_B(comm) - before_B > comm.size * 4_000_000
            del x
            comm.release(mark)
            assert comm._segment.end == mark
            assert used_B(comm) - before_B < 1_000_000
            comm.barrier()

    run(rank, 2)


def test_memory_that_one_rank_still_holds_stays_for_all():
    def rank(comm):
        mark = comm.mark()
        x = comm.allocate(1000, common=True)
        if comm.rank == 0:
            x.fill_(3.0)
            kept = x[10:20]
        del x
        comm.release(mark)
        assert comm._segment.end > mark
        y = comm.allocate(1000)
        y.fill_(1.0)
        comm.barrier()
        if comm.rank == 0:
            assert kept.tolist() == [3.0] * 10
            del kept
        del y
        comm.release(mark)
        assert comm._segment.end == mark

    run(rank, 2)


def test_only_the_world_gives_back():
    def rank(comm):
        with pytest.raises(BadInput, match="all ranks"):
            comm.split(0).mark()

    run(rank, 2)


def test_tensors_from_elsewhere_are_not_remembered():
    def rank(comm):
        ours = [comm.allocate(64) for _ in range(5)]
        for _ in range(50):
            comm.all_reduce(torch.zeros(64)).wait()
        for x in ours:
            comm.all_reduce(x[3:60]).wait()
            assert comm._find(x) is not None
            assert comm._find(torch.zeros(64)) is None
            assert comm._find(x[:0]) is None
        return len(comm._symmetric)

    assert run(rank, 2) == [10, 10]


# -- cores -------------------------------------------------------------------------------------------------------------


def test_leaving_a_core_respects_who_pinned_us_since():
    allowed = os.sched_getaffinity(0)
    try:
        pinned = {min(allowed)}
        os.sched_setaffinity(0, pinned)
        futex.leave_core(min(allowed))
        assert os.sched_getaffinity(0) == pinned
    finally:
        os.sched_setaffinity(0, allowed)
    futex.leave_core(min(allowed))
    assert os.sched_getaffinity(0) == allowed


def test_leaving_a_core_is_a_hint(monkeypatch):
    def refuse(pid, cores):
        raise OSError(22, "no such cores any more")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    futex.leave_core(0)


# -- mismatches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (
            (lambda c: c.all_reduce(torch.ones(4)), lambda c: c.broadcast(torch.ones(4), 1)),
            ("all_reduce(4 float32)", "broadcast(4 float32, from rank 1)"),
        ),
        (
            (lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(5))),
            ("all_reduce(4 float32)", "all_reduce(5 float32)"),
        ),
        (
            (lambda c: c.reduce_scatter(torch.ones(4)), lambda c: c.reduce_scatter(torch.ones(4).double())),
            ("reduce_scatter(4 float32)", "reduce_scatter(4 float64)"),
        ),
        (
            (lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(4), weight=1.0)),
            ("all_reduce(4 float32)", "all_reduce(4 float32, weighted)"),
        ),
        (
            (lambda c: c.allocate(4), lambda c: c.allocate(4, torch.bfloat16, common=True)),
            ("allocate(4 float32)", "allocate(4 bfloat16, common)"),
        ),
        ((lambda c: c.barrier(), lambda c: c.split(0)), ("barrier", "split")),
    ],
)
def test_mismatched_collectives_are_reported_plainly(calls, words):
    def rank(comm):
        comm.all_reduce(torch.ones(3)).wait()
        with pytest.raises(CommunicationError) as caught:
            calls[comm.rank == 1](comm)
        assert type(caught.value) is CommunicationError
        mine, other = words if comm.rank != 1 else words[::-1]
        peer = 1 if comm.rank != 1 else 0
        assert f"rank {comm.rank} is in {mine}, but rank {peer} in {other}: all ranks" in str(caught.value)

    run(rank, 3)
