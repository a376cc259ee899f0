"""What is particular to the transports whose ranks are threads: virtual time, deadlocks, aborts, random numbers."""

import math
import threading
import time

import pytest
import torch

from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.communication.transports.threads import ThreadsWorld
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded, Deadlock, PeerLost, Vetoed, WorkerFailed

both_worlds = pytest.mark.parametrize("world", [ThreadsWorld, SimulatedWorld])


def one_second_each(operation):
    return 1.0


# -- virtual time ------------------------------------------------------------------------------------------------------


def test_the_price_is_charged_after_the_last_arrival():
    def rank(comm):
        comm.elapse(float(comm.rank))
        comm.all_reduce(torch.ones(3))
        return comm.now, comm.counters.wait_s, comm.counters.communicate_s

    assert SimulatedWorld(3, one_second_each).run(rank) == [(3.0, 2.0, 1.0), (3.0, 1.0, 1.0), (3.0, 0.0, 1.0)]


def test_operations_are_priced_by_their_record():
    seen = []

    def rank(comm):
        pair = comm.split(comm.rank // 2)  # free, like allocate
        memory = comm.allocate(4, common=True)
        comm.all_gather(memory)
        pair.broadcast(torch.zeros(10, dtype=torch.float64), root=1)
        if comm.rank == 3:
            comm.send(torch.zeros(5), 0)
        if comm.rank == 0:
            comm.recv(torch.zeros(5))
        with comm.counting("consensus"):
            comm.barrier()

    SimulatedWorld(4, lambda operation: seen.append(operation) or 0.0).run(rank)
    everyone = (0, 1, 2, 3)
    assert set(seen) == {
        ("all_gather", 16, 4, everyone, None, None, True, "step"),
        ("broadcast", 80, 2, (0, 1), 1, None, False, "step"),
        ("broadcast", 80, 2, (2, 3), 3, None, False, "step"),
        ("send", 20, 2, (3, 0), 3, 0, False, "step"),
        ("barrier", 0, 4, everyone, None, None, False, "consensus"),
    }


def test_a_message_occupies_its_sender_and_arrives_after_its_price():
    def rank(comm):
        if comm.rank == 0:
            comm.send(torch.zeros(1), 1)
            comm.send(torch.zeros(1), 1)
        else:
            comm.recv(torch.zeros(1), 0)
            first = comm.now
            comm.elapse(5.0)
            comm.recv(torch.zeros(1), 0)  # has long been there
            return first, comm.now, comm.counters.wait_s
        return comm.now, comm.counters.wait_s, comm.counters.communicate_s

    assert SimulatedWorld(2, one_second_each).run(rank) == [(2.0, 0.0, 2.0), (1.0, 6.0, 1.0)]


def test_a_receive_from_anyone_takes_the_earliest_virtual_arrival():
    def rank(comm):
        if comm.rank == 0:
            comm.elapse(0.5)
            return [comm.recv(torch.zeros(1)).source for _ in range(4)]
        # Wall time tells the opposite order from virtual time; ranks 3 and 4 tie.
        time.sleep(0.01 * comm.rank)
        comm.elapse([9.0, 4.0, 3.0, 2.0, 2.0][comm.rank])
        comm.send(torch.zeros(1), 0)
        return None

    assert SimulatedWorld(5, one_second_each).run(rank)[0] == [3, 4, 2, 1]


def test_ranks_run_in_the_order_of_their_clocks():
    log = []

    def rank(comm):
        for _ in range(3):
            comm.elapse([0.5, 0.25, 1.0][comm.rank])
            log.append((comm.now, comm.rank))

    SimulatedWorld(3).run(rank)
    assert log == sorted(log)
    assert len(log) == 9


def test_common_memory_is_read_in_virtual_order():
    def rank(comm):
        """HOGWILD in miniature: read, compute, write back what may be stale by then."""
        x = comm.allocate(1, common=True)
        staleness = []
        for _ in range(4):
            read = float(x)
            comm.elapse(1.0 + 0.3 * comm.rank)
            staleness.append(float(x) - read)
            x += 1
        return staleness

    first = SimulatedWorld(3).run(rank)
    assert first == SimulatedWorld(3).run(rank)
    assert max(max(s) for s in first) > 0


def parameter_server(comm):
    """Asynchronous SGD: the server's history depends on every receive's order."""
    if comm.rank == 0:
        centre, history = torch.zeros(4), []
        for _ in range(5 * (comm.size - 1)):
            received = comm.recv(torch.empty(4))
            centre -= 0.1 * received.tensor
            comm.send(centre, received.source)
            history.append(received.source)
        return history, centre.tolist()
    x = torch.zeros(4)
    for _ in range(5):
        comm.elapse(float(torch.rand(())))
        comm.send(x + torch.randn(4), 0)
        comm.recv(x, 0)
    return x.tolist(), comm.now


def test_an_asynchronous_run_repeats_itself_bit_for_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        world = SimulatedWorld(5, lambda operation: 0.01 + 1e-3 * operation.payload_B)
        runs.append((world.run(parameter_server), world.clocks))
    assert runs[0] == runs[1]


def test_virtual_time_does_not_run_backward():
    with pytest.raises(WorkerFailed, match="passes forward only"):
        SimulatedWorld(1).run(lambda comm: comm.elapse(-1.0))
    with pytest.raises(WorkerFailed, match="a price is a number of seconds"):
        SimulatedWorld(2, lambda operation: float("nan")).run(lambda comm: comm.barrier())


def test_sizes_alone_can_be_simulated():
    def rank(comm):
        x = torch.empty(10**9, device="meta")
        comm.all_reduce(x, weight=1.0)
        lo, hi = comm.reduce_scatter(x)
        comm.all_gather(x)
        comm.broadcast(x)
        comm.all_to_all(x)
        comm.send(x, comm.rank)
        comm.recv(x, comm.rank)
        return hi - lo, comm.now

    results = SimulatedWorld(4, lambda operation: operation.payload_B / 4e9).run(rank)
    assert results == [(250_000_000, 6.0)] * 4


@pytest.mark.parametrize(("size", "rounds"), [(64, 200), (512, 4)])
def test_many_ranks_are_cheap(size, rounds):
    def rank(comm):
        x = torch.ones(16)
        for _ in range(rounds):
            comm.all_reduce(x, weight=1.0)
        return comm.now

    begun = time.perf_counter()
    assert SimulatedWorld(size, one_second_each).run(rank) == [float(rounds)] * size
    assert time.perf_counter() - begun < 10  # about 0.4 s on two idle cores; the margin is for a busy machine


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_every_simulated_rank_has_its_own_random_stream():
    def rank(comm):
        drawn = []
        for _ in range(3):
            drawn.append(float(torch.rand(())))
            comm.barrier()
        return drawn

    torch.manual_seed(11)
    expected = torch.rand(3).tolist()
    torch.manual_seed(11)
    assert SimulatedWorld(3).run(rank) == [expected] * 3
    assert torch.rand(3).tolist() == expected  # the caller's stream was not touched


def test_the_callers_random_stream_survives_a_failure():
    def rank(comm):
        torch.rand(5)
        comm.barrier()
        raise ValueError("after the barrier")

    before = torch.get_rng_state()
    with pytest.raises(WorkerFailed):
        SimulatedWorld(3).run(rank)
    assert torch.equal(torch.get_rng_state(), before)


# -- deadlocks and mismatches ------------------------------------------------------------------------------------------


def test_a_deadlock_is_found_at_once_and_names_who_waits_in_what():
    def rank(comm):
        if comm.rank == 0:
            comm.all_reduce(torch.ones(3))
        if comm.rank == 2:
            comm.step = 7
            comm.recv(torch.ones(3))

    begun = time.perf_counter()
    with pytest.raises(Deadlock) as caught:
        SimulatedWorld(3).run(rank)
    assert time.perf_counter() - begun < 1
    assert str(caught.value) == (
        "rank 0 waits in all_reduce #1; rank 2 waits in recv(from anyone, tag 0) at step 7; rank 1 has returned"
    )


def test_a_deadlock_in_groups_names_the_group_and_the_ranks_of_the_world():
    def rank(comm):
        group = comm.split(comm.rank % 2)
        group.barrier()
        if comm.rank == 1:
            group.recv(torch.ones(1), 1, tag=4)
        else:
            comm.barrier()

    with pytest.raises(Deadlock) as caught:
        SimulatedWorld(4).run(rank)
    assert str(caught.value) == (
        "rank 0 waits in barrier #1; rank 1 waits in recv(from rank 3, tag 4) of ranks 1, 3; "
        "rank 2 waits in barrier #1; rank 3 waits in barrier #1"
    )


def test_a_message_with_another_tag_does_not_end_the_wait():
    def rank(comm):
        comm.send(torch.ones(1), 1 - comm.rank, tag=1)
        comm.recv(torch.ones(1), 1 - comm.rank, tag=2)

    with pytest.raises(Deadlock, match=r"rank 1 waits in recv\(from rank 0, tag 2\)"):
        SimulatedWorld(2).run(rank)


@both_worlds
@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ((lambda c: c.all_reduce(torch.ones(4)), lambda c: c.broadcast(torch.ones(4), 1)), ("all_reduce", "broadcast")),
        ((lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(5))), ("4 float32", "5 float32")),
        (
            (lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(4, dtype=torch.float64))),
            ("4 float32", "4 float64"),
        ),
        (
            (lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(4), weight=1.0)),
            ("(4 float32)", "weighted"),
        ),
        ((lambda c: c.broadcast(torch.ones(1), 0), lambda c: c.broadcast(torch.ones(1), 1)), ("rank 0", "rank 1")),
        ((lambda c: c.barrier(), lambda c: c.split(0)), ("barrier()", "split()")),
    ],
)
def test_mismatched_collectives_are_reported_plainly(world, calls, words):
    with pytest.raises(CommunicationError) as caught:
        world(3).run(lambda comm: calls[comm.rank == 1](comm))
    assert type(caught.value) is CommunicationError
    assert all(word in str(caught.value) for word in (*words, "rank 1", "in the same order"))


@both_worlds
def test_a_message_of_another_length_is_reported(world):
    def rank(comm):
        if comm.rank == 0:
            comm.send(torch.ones(3), 1)
        else:
            comm.recv(torch.ones(4), 0)

    with pytest.raises(CommunicationError, match="expects 4 float32, but rank 0 sent 3 float32"):
        world(2).run(rank)


# -- failures ----------------------------------------------------------------------------------------------------------


@both_worlds
def test_a_failing_rank_is_named_and_the_others_are_unwound(world):
    unwound = []

    def rank(comm):
        comm.step = 5
        if comm.rank == 1:
            raise ValueError("no such luck")
        try:
            if comm.rank == 0:
                comm.recv(torch.ones(1))
            comm.all_reduce(torch.ones(1))
        except PeerLost as lost:
            unwound.append((comm.rank, lost.peer, lost.step))
            raise

    before = threading.active_count()
    ended = world(4)
    with pytest.raises(WorkerFailed, match="worker 1 at step 5 failed: ValueError: no such luck") as caught:
        ended.run(rank)
    assert "raise ValueError" in caught.value.traceback
    assert sorted(unwound) == [(0, 1, 5), (2, 1, 5), (3, 1, 5)]
    assert threading.active_count() == before
    with pytest.raises(CommunicationError, match="this world was ended"):
        ended.run(rank)


@both_worlds
def test_cleaning_up_while_being_unwound_may_communicate_in_vain(world):
    def rank(comm):
        if comm.rank == 0:
            raise ValueError("first")
        try:
            comm.barrier()
        finally:
            comm.all_reduce(torch.ones(1))

    with pytest.raises(WorkerFailed, match="worker 0 failed: ValueError: first"):
        world(3).run(rank)


@both_worlds
def test_what_the_last_to_come_runs_into_is_everybodys(world):
    def rank(comm):
        try:
            comm.all_reduce(torch.ones(3), weight=math.inf if comm.rank == 1 else 1.0)
        except Vetoed as e:
            comm.barrier()  # the group goes on
            return str(e)

    results = world(3).run(rank)
    assert results == [results[0]] * 3
    assert "vetoed by rank 1" in results[0]


@both_worlds
def test_a_world_that_ended_well_runs_again(world):
    again = world(3)
    for _ in range(2):
        assert again.run(lambda comm, y: comm.rank + y, 10) == [10, 11, 12]


@both_worlds
def test_fail_tells_the_peers(world):
    def rank(comm):
        if comm.rank == 1:
            comm.fail()
            return
        comm.recv(torch.ones(1), 1)

    with pytest.raises(PeerLost, match="rank 0 lost rank 1"):
        world(2).run(rank)


def test_abort_reaches_threads_of_ones_own():
    world = ThreadsWorld(2, timeout_s=30)
    raised = []

    def waits():
        with pytest.raises(PeerLost) as caught:
            world.communicator(0).barrier()
        raised.append(caught.value)

    thread = threading.Thread(target=waits)
    thread.start()
    world.abort(1, "its disk is full")
    thread.join(timeout=5)
    assert (raised[0].rank, raised[0].peer) == (0, 1)
    assert raised[0].__notes__ == ["its disk is full"]


def test_a_wait_has_a_deadline_that_names_everything():
    def rank(comm):
        comm.step = 3
        if comm.rank in (1, 3):
            time.sleep(0.9)
        comm.all_reduce(torch.ones(1))

    with pytest.raises(DeadlineExceeded) as caught:
        ThreadsWorld(4, timeout_s=0.3).run(rank)
    assert caught.value.rank in (0, 2)
    assert str(caught.value).startswith(
        f"rank {caught.value.rank} waited 0.3 s in all_reduce #1 at step 3 for ranks 1, 3;"
    )


def test_nobody_completes_a_collective_that_a_rank_has_given_up():
    """The late rank would otherwise write into memory whose owner has gone on."""

    def rank(comm):
        x = torch.ones(1)
        if comm.rank == 1:
            time.sleep(0.2)
            with pytest.raises(CommunicationError, match="rank 0 has given up waiting for rank 1"):
                comm.all_reduce(x)
        else:
            with pytest.raises(DeadlineExceeded):
                comm.all_reduce(x)
        return x.item()

    assert ThreadsWorld(2, timeout_s=0.05).run(rank) == [1.0, 1.0]


def test_a_receive_has_a_deadline_too():
    with pytest.raises(DeadlineExceeded, match=r"in recv\(from rank 1, tag 6\) for a message from rank 1"):
        ThreadsWorld(2, timeout_s=0.05).run(lambda comm: comm.rank == 0 and comm.recv(torch.ones(1), 1, tag=6))


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_threads_see_one_copy_of_common_memory():
    results = ThreadsWorld(3).run(lambda comm: comm.allocate(5, common=True).data_ptr())
    assert len(set(results)) == 1


@both_worlds
def test_common_memory_is_not_kept_after_the_run(world):
    again = world(2)
    assert again.run(lambda comm: comm.is_common(comm.allocate(5, common=True))) == [True, True]
    assert again.common == {}


def test_the_sum_of_common_memory_counts_every_rank():
    """All ranks hand in the same tensor: the running sum must not read itself."""

    def rank(comm):
        x = comm.allocate(4, common=True)
        comm.broadcast(torch.ones(1))
        if comm.rank == 0:
            x.fill_(1.5)
        comm.barrier()
        comm.all_reduce(x)
        return x.tolist()

    assert ThreadsWorld(5).run(rank) == [[7.5] * 4] * 5


def test_a_message_is_a_copy_made_when_it_is_sent():
    def rank(comm):
        x = torch.ones(3)
        comm.send(x, 1 - comm.rank)
        x.zero_()
        comm.barrier()
        return comm.recv(torch.empty(3), 1 - comm.rank).tensor.tolist()

    assert ThreadsWorld(2).run(rank) == [[1.0] * 3] * 2


def test_collectives_may_run_inside_backward():
    """CPU backward runs in the rank's own thread; each rank's hook meets the others'."""

    def rank(comm):
        w = torch.full((3,), 1.0, requires_grad=True)
        w.register_post_accumulate_grad_hook(lambda p: comm.all_reduce(p.grad, weight=1.0).wait())
        (w * float(comm.rank)).sum().backward()
        return w.grad.tolist()

    for world in (ThreadsWorld(4), SimulatedWorld(4)):
        assert world.run(rank) == [[1.5] * 3] * 4


def test_a_rank_alone_says_what_it_waits_for_in_vain():
    comm = SingleCommunicator()
    comm.send(torch.ones(2), 0, tag=1)
    with pytest.raises(Deadlock, match=r"rank 0 waits in recv\(from anyone, tag 2\)"):
        comm.recv(torch.empty(2), None, tag=2)
    assert comm.recv(torch.empty(2), None, tag=1).tensor.tolist() == [1.0, 1.0]
    with pytest.raises(BadInput):
        comm.send(torch.ones(2), 1)
