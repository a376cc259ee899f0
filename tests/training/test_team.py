"""Worker teams: jobs in, results in rank order out, the first failure named, nothing left behind."""

import os
import signal
import time

import pytest
import torch

from manyhands import testing
from manyhands.communication.communicator import Communicator
from manyhands.errors import BadInput, DeadlineExceeded, PeerLost, UnknownName, WorkerFailed
from manyhands.testing import run_ranks
from manyhands.training.member import Member
from manyhands.training.team import team
from manyhands.training.team.processes import ended
from tests import guards
from tests.training.factories import wait_until_asleep

HERE = "tests.training.test_team"
PROCESSES = ("shared", "gloo", "mpi")
ALL = ("threads", "simulated", *PROCESSES)


# -- jobs --------------------------------------------------------------------------------------------------------------


def place(member: Member) -> list:
    comm = member.comm
    return [comm.rank, comm.size, comm.transport, torch.get_num_threads(), os.getpid(), os.getcwd()]


def echo(member: Member, *values: object) -> list:
    return list(values)


def live(member: Member) -> object:
    return member.live


def reports(member: Member, times: int) -> int:
    for i in range(times):
        member.report({"rank": member.comm.rank, "i": i})
    return member.comm.rank


def raises(member: Member, rank: int) -> None:
    member.comm.step = 12
    if member.comm.rank == rank:
        raise RuntimeError("what went wrong")
    member.comm.barrier()


def returns_what_cannot_travel(member: Member) -> object:
    return object()


def sleeps(member: Member, seconds: float) -> None:
    time.sleep(seconds)


def dies(member: Member, rank: int, how: int) -> None:
    member.comm.step = 7
    member.comm.barrier()
    if member.comm.rank == rank:
        os.kill(os.getpid(), how)
    member.comm.barrier()


def rank_and_size(comm: Communicator) -> list[int]:
    return [comm.rank, comm.size]


def catches(comm: Communicator) -> str:
    try:
        if comm.rank == 0:
            raise KeyError("mine")
        comm.barrier()
    except PeerLost as e:
        return str(e)
    return ""


# -- what a team does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ALL)
def test_results_come_in_rank_order(on):
    assert run_ranks(rank_and_size, 3, on=on) == [[0, 3], [1, 3], [2, 3]]


@pytest.mark.parametrize("on", ["threads", "shared", "gloo"])
def test_a_team_does_one_job_after_another(on):
    with team(on, 2) as crew:
        assert [crew.run(f"{HERE}:echo", i) for i in range(5)] == [[[i]] * 2 for i in range(5)]


def test_workers_are_processes_of_their_own_in_the_callers_folder_with_the_threads_asked_for():
    with team("shared", 2, threads=3) as crew:
        said = crew.run(f"{HERE}:place")
        assert [s[:4] for s in said] == [[0, 2, "shared", 3], [1, 2, "shared", 3]]
        assert [s[4] for s in said] == crew.pids
        assert len({os.getpid(), *crew.pids}) == 3
        assert {s[5] for s in said} == {os.getcwd()}


@pytest.mark.parametrize(
    "value", [1, 1.5, True, None, "text", [1, [2]], (1, (2,)), {"a": {"b": 1}}, float("inf"), 2**70, ""]
)
def test_plain_values_travel_both_ways_with_their_types(value):
    (got,) = testing.standing_team("shared", 2).run(f"{HERE}:echo", value)[1]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_tensors_travel_bit_for_bit(dtype, shape):
    sent = (torch.arange(6).reshape(2, 3) if shape == (2, 3) else torch.ones(shape)).to(dtype)
    (got,) = testing.standing_team("shared", 2).run(f"{HERE}:echo", sent)[1]
    assert got.dtype == dtype
    assert got.shape == sent.shape
    assert torch.equal(got, sent)


def test_a_tensor_that_is_a_view_travels_as_it_looks():
    sent = torch.arange(12.0).view(3, 4).t()[1:]
    (got,) = testing.standing_team("shared", 2).run(f"{HERE}:echo", sent)[0]
    assert torch.equal(got, sent)


@pytest.mark.parametrize("on", ["single", "threads", "shared"])
def test_live_objects_reach_every_worker(on):
    size = 1 if on == "single" else 2
    with team(on, size, live={"a": [1, 2]}) as crew:
        assert crew.run(f"{HERE}:live") == [{"a": [1, 2]}] * size


@pytest.mark.parametrize("on", ["threads", "shared"])
def test_reports_arrive_on_the_way_in_each_workers_order(on):
    seen = []
    with team(on, 2) as crew:
        assert crew.run(f"{HERE}:reports", 5, report=lambda rank, value: seen.append((rank, value))) == [0, 1]
    for rank in range(2):
        assert [v for r, v in seen if r == rank] == [{"rank": rank, "i": i} for i in range(5)]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("on", ["threads", "simulated", "shared", "gloo"])
def test_the_worker_that_raised_is_named_and_not_those_that_waited_for_it(on, rank):
    with pytest.raises(WorkerFailed) as e, team(on, 3, timeout_s=10) as crew:
        crew.run(f"{HERE}:raises", rank)
    assert e.value.rank == rank
    assert "what went wrong" in str(e.value)
    if on in PROCESSES:
        assert e.value.step == 12
        assert e.value.traceback.count("RuntimeError: what went wrong") == 1
        assert "member.py" not in e.value.traceback  # our own frames are no help


def test_a_team_in_which_a_worker_failed_is_closed():
    with team("shared", 2) as crew:
        with pytest.raises(WorkerFailed):
            crew.run(f"{HERE}:raises", 0)
        assert crew.pids == []
        with pytest.raises(BadInput, match="closed"):
            crew.run(f"{HERE}:echo")


def test_run_ranks_gets_a_fresh_team_after_a_failure():
    before = testing.standing_team("shared", 2).pids
    with pytest.raises(WorkerFailed):
        testing.run_ranks(fails_on_one, 2)
    assert run_ranks(rank_and_size, 2) == [[0, 2], [1, 2]]
    assert not set(before) & set(testing.standing_team("shared", 2).pids)


def fails_on_one(comm: Communicator) -> None:
    if comm.rank == 1:
        raise RuntimeError("on one")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_ended_by_a_signal_is_named_with_it(how):
    with pytest.raises(WorkerFailed) as e, team("shared", 2) as crew:
        crew.run(f"{HERE}:dies", 1, int(how))
    assert (e.value.rank, e.value.step) == (1, 7)
    assert how.name in str(e.value)


def test_a_worker_that_dies_between_jobs_is_noticed_at_the_next():
    with team("shared", 2) as crew:
        crew.run(f"{HERE}:echo")
        os.kill(crew.pids[0], signal.SIGKILL)
        with pytest.raises(WorkerFailed, match=r"worker 0 .*SIGKILL"):
            crew.run(f"{HERE}:raises", 5)


def test_ctrl_c_does_not_reach_workers_by_themselves():
    with team("shared", 2) as crew:
        for pid in crew.pids:
            wait_until_asleep(pid)
            os.kill(pid, signal.SIGINT)
        assert crew.run(f"{HERE}:echo", 1) == [[1], [1]]


def test_what_cannot_travel_back_is_a_failure_that_says_what_can():
    with pytest.raises(WorkerFailed, match="return numbers, text, lists or tensors"), team("shared", 2) as crew:
        crew.run(f"{HERE}:returns_what_cannot_travel")


def test_a_job_that_outlasts_its_deadline_is_ended():
    with pytest.raises(DeadlineExceeded, match=r"rank 0 .*its own job"), team("shared", 2) as crew:
        crew.run(f"{HERE}:sleeps", 60, deadline_s=0.2)


def test_a_job_that_is_not_there_is_bad_input():
    with pytest.raises(BadInput, match="no_such_job"), team("shared", 2) as crew:
        crew.run(f"{HERE}:no_such_job")


@pytest.mark.parametrize(
    ("on", "size", "options", "said"),
    [
        ("single", 2, {}, "it has one worker"),
        ("shard", 2, {}, "shared"),
        ("mpi", 2, {"live": 1}, "live objects"),
        ("shared", 2, {"live": lambda: 0}, "my_module:factory"),
    ],
)
def test_a_team_that_cannot_be_is_refused(on, size, options, said):
    with pytest.raises(BadInput, match=said):
        team(on, size, **options)
    assert issubclass(UnknownName, BadInput)


def test_closing_twice_is_closing_once():
    crew = team("shared", 2)
    crew.close()
    crew.close()
    assert crew.pids == []


@pytest.mark.parametrize("on", ["shared", pytest.param("mpi", marks=pytest.mark.slow)])
def test_teams_that_are_dismissed_end_by_themselves_and_are_closed_all_the_same(on):
    crews = [team(on, 2), team(on, 2)]
    pids = [pid for crew in crews for pid in crew.pids]
    assert len(pids) == 4
    for crew in crews:
        crew.dismiss()
    end = time.monotonic() + 30
    while any(guards._status(pid)[0] not in ("", "Z") for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)
    for crew in crews:
        crew.dismiss()
        crew.close()


def test_an_exit_status_in_words():
    assert ended(-9) == "was killed by SIGKILL"
    assert ended(3) == "exited with status 3"
    assert ended(-200) == "exited with status -200"


def reserves(member: Member) -> int:
    """Takes a megabyte of symmetric memory; the size of the memory file before."""
    segment = member.comm._segment  # type: ignore[attr-defined]
    before = int(segment.end)
    member.comm.barrier()  # the first to reserve moves the end for all
    member.comm.allocate(1 << 18, torch.float32, common=True).fill_(1.0)
    return before


def test_a_standing_team_gives_a_jobs_memory_back():
    with team("shared", 2) as crew:
        ends = [crew.run(f"{HERE}:reserves") for _ in range(4)]
    assert ends[1:] == [ends[0]] * 3
