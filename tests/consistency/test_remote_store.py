"""Servers that are ranks: what they hold is what shared memory would, over messages.

Over MPI the same claims are made of servers that are windows, where no rank serves; see also `test_window_store`.
"""

import os
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.remote_board import ANY, OTHERS, far_enough
from manyhands.consistency.parameter_server.remote_store import RemoteStore
from manyhands.consistency.parameter_server.server import serving
from manyhands.errors import DeadlineExceeded, InvalidPlan, PeerLost, WorkerFailed
from manyhands.partition.data import DataReplica
from manyhands.plan import SERVERS_IN_MEMORY, Facts, resolve
from manyhands.testing import run_ranks
from manyhands.training.team import team
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.consistency.test_served import dawdled, push_and_add, shares, started, trajectory
from tests.partition import test_rows
from tests.training import factories

HERE = "tests.consistency.test_remote_store"
CARRIED = ("gloo", pytest.param("mpi", marks=pytest.mark.slow))


def ranks(fn, n: int, *args, on: str = "gloo", servers: int = 1) -> list:
    return run_ranks(fn, n, on=on, args=args, servers=0 if on in SERVERS_IN_MEMORY else servers, timeout_s=40)


# -- one worker is plain torch -----------------------------------------------------------------------------------------


def optimizers_and_servers():
    """Every optimizer on two servers, and one that keeps state on any number; the others are slow."""
    for optimizer in ("sgd", "decay", "momentum", "nesterov", "adam", "adamw", "adagrad"):
        for servers in (1, 2, 3):
            slow = servers != 2 and optimizer != "adam"
            yield pytest.param(optimizer, servers, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("optimizer", "servers"), list(optimizers_and_servers()))
@pytest.mark.parametrize("strategy", ["asynchronous", "downpour"])
@pytest.mark.parametrize("on", CARRIED)
def test_one_worker_is_plain_torch_bit_for_bit_whatever_the_number_of_servers(on, strategy, optimizer, servers):
    spec = problem(optimizer=optimizer, dtype="float32", schedule=True)
    (mine,) = ranks(jobs.train, 1, f"{strategy}(servers={servers})", spec, on=on, servers=servers)
    with jobs.one_thread():
        theirs = jobs.plain(spec)
    for step, (a, b) in enumerate(zip(mine["parameters"][1:], theirs["parameters"], strict=True)):
        assert torch.equal(a, b), f"after step {step}"
    assert torch.equal(mine["consensus"], mine["final"])


def test_parameters_that_no_loss_depends_on_stay_as_they_are_and_the_others_learn():
    for model in ("unused", "used_later"):
        spec = problem(model, "adamw", dtype="float32")
        (mine,) = ranks(jobs.train, 1, "asynchronous(servers=2)", spec, servers=2)
        with jobs.one_thread():
            theirs = jobs.plain(spec)
        for a, b in zip(mine["parameters"][1:], theirs["parameters"], strict=True):
            assert torch.equal(a, b)


# -- several workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", CARRIED)
@pytest.mark.parametrize(
    ("text", "servers"),
    [("asynchronous", 1), ("asynchronous(servers=2)", 2), ("downpour(fetch=2, push=3, server='sgd(lr=0.1)')", 1)],
)
def test_servers_move_by_the_sum_of_what_was_pushed_and_nothing_is_lost_or_applied_twice(on, text, servers):
    results = ranks(push_and_add, 2, text, problem(), 25, on=on, servers=servers)
    assert (results[0]["moved"] + 0.1 * sum(r["pushed"] for r in results)).abs().max() < 1e-12
    for r in results:
        assert (r["pushed"] + r["left"] - r["accrued"]).abs().max() < 1e-12
        if "asynchronous" in text:
            assert sum(n for _, n in r["staleness"]) == 25 * servers
            assert all(late >= 0 for late, _ in r["staleness"])


def in_turn(comm: Communicator, spec: dict, rounds: int) -> dict:
    """Both take a gradient, then push one after the other: the second is always one update late."""
    worker = started(comm, "asynchronous(staleness_aware=True)", spec)
    pieces = worker.replica.pieces
    start = jobs.vector(p.flat for p in pieces)
    moved = torch.zeros_like(start)
    for batch in shares(comm, spec, steps=rounds):
        worker.store.pull()
        comm.barrier()
        worker.gradients(batch)
        for turn in range(comm.size):
            if turn == comm.rank:
                worker.store.push([p.grad for p in pieces])
            comm.barrier()
        moved -= 0.1 * jobs.vector(p.grad for p in pieces) / (1 + comm.rank)
    return {
        "staleness": sorted(worker.staleness.items()),
        "moved": moved,
        "all": jobs.vector(worker.consensus()) - start,
    }


def test_staleness_is_counted_and_divides_the_rate_as_on_shared_memory():
    apart = ranks(in_turn, 2, problem(), 4)
    common = run_ranks(in_turn, 2, on="threads", args=(problem(), 4))
    for results in (apart, common):
        assert [r["staleness"] for r in results] == [[(0, 4)], [(1, 4)]]
        assert (results[0]["all"] - sum(r["moved"] for r in results)).abs().max() < 1e-12
    assert (apart[0]["all"] - common[0]["all"]).abs().max() < 1e-12


@pytest.mark.parametrize("on", CARRIED)
@pytest.mark.parametrize(
    "text", ["asynchronous(servers=2)", "downpour(fetch=2, push=3, servers=2)", "ssp(servers=2, staleness=0)"]
)
def test_payload_counted_is_payload_declared_and_what_carries_it_is_service(on, text):
    for result in ranks(jobs.train, 2, text, problem(optimizer="momentum"), on=on, servers=2):
        declared = [sum(of_piece[0] for of_piece in step) for step in zip(*result["traffic"], strict=True)]
        if "ssp" in text:  # the first read is what all begin with
            result["sent_B"][0] += declared[0] // 2
        assert result["sent_B"] == declared


@pytest.mark.parametrize("text", ["asynchronous", "downpour(fetch=2, push=2)"])
def test_a_loss_that_is_not_finite_stops_all_workers_and_no_server(text):
    for result in ranks(jobs.train, 2, text, problem(poison=(1, 1))):
        step, said = result["raised"]
        assert step == 1
        assert "worker 1" in said
    ranks(jobs.train, 2, text, problem())  # the same ranks go on


# -- sparse tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", CARRIED)
@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("optimizer", test_rows.OPTIMIZERS)
def test_a_table_whose_rows_lie_on_servers_is_one_whose_rows_do_not(on, optimizer, servers):
    text = f"asynchronous(servers={servers})"
    (apart,) = ranks(test_rows.alone, 1, text, optimizer, False, on=on, servers=servers)
    (common,) = run_ranks(test_rows.alone, 1, on="single", args=(text, optimizer, False))
    assert torch.equal(apart, common)


@pytest.mark.parametrize("on", CARRIED)
def test_only_touched_rows_change_and_only_they_travel(on):
    apart = ranks(test_rows.touched, 2, "asynchronous(servers=2)", on=on, servers=2)
    assert apart == run_ranks(test_rows.touched, 2, on="threads", args=("asynchronous(servers=2)",))
    assert apart[0]["moved"] == [2, 5, 7, 30, 31]


# -- bounded staleness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", CARRIED)
def test_ssp_without_staleness_is_lock_step(on):
    spec = problem()
    mine = ranks(trajectory, 3, "ssp(staleness=0, servers=2)", spec, 12, on=on, servers=2)
    theirs = run_ranks(trajectory, 3, on="simulated", args=("synchronous(update='replicated')", spec, 12))
    assert (mine[0][-1] - theirs[0][-1]).abs().max() < 1e-12


@pytest.mark.parametrize("on", CARRIED)
@pytest.mark.parametrize(
    ("bound", "cached"),
    [
        *((0, True), (1, False), (3, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, False), (1, True), (3, False))),
    ],
)
def test_no_read_is_staler_than_the_bound(on, bound, cached):
    results = ranks(dawdled, 3, f"ssp(staleness={bound}, cached={cached})", 25, 4, on=on)
    assert max(late for r in results for late, _ in r["staleness"]) <= bound
    assert all(sum(n for _, n in r["staleness"]) == 25 for r in results)
    assert all(r["finite"] for r in results)


def boards(comm: Communicator) -> list:
    store = RemoteStore(jobs_replica(comm), comm, 1)
    one, other = store.board(), store.board()
    seen = [one.read()]
    if comm.rank == 1:
        one.post(3)
    one.wait_for_one(3, "for one")
    seen.append(one.read())
    if comm.rank == 0:
        assert one.wait(3, "for rank 1", rank=1) == 0
        seen.append(one.read())
        one.post(5)
    if comm.rank == 2:
        assert one.wait(3, "for both", rank=0) == 0
        seen.append(one.read())
    comm.barrier()
    return [*seen, other.read()]


def jobs_replica(comm: Communicator) -> DataReplica:
    model, optimizer = jobs.build(problem())
    return DataReplica(model, optimizer, jobs.LOSSES["mean"], comm, common=False)


def test_a_board_on_a_server_is_a_board():
    first, second, third = ranks(boards, 3)
    for seen in (first, second, third):
        assert seen[1][1] == 3
        assert seen[-1] == [0, 0, 0]
    assert first[2] == [0, 3, 0]
    assert third[2] == [5, 3, 0]


@given(counters=st.lists(st.integers(0, 9), min_size=1, max_size=5), least=st.integers(0, 9), data=st.data())
def test_whom_a_wait_waits_for(counters, least, data):
    me = data.draw(st.integers(0, len(counters) - 1))
    one = data.draw(st.integers(0, len(counters) - 1))
    assert far_enough(counters, least, one, me) == (counters[one] >= least)
    assert far_enough(counters, least, ANY, me) == any(c >= least for c in counters)
    others = [c for p, c in enumerate(counters) if p != me]
    assert far_enough(counters, least, OTHERS, me) == all(c >= least for c in others)


# -- whole runs --------------------------------------------------------------------------------------------------------


def task(**changed) -> mh.Task:
    said = {"model": f"{factories.HERE}:model", "data": f"{factories.HERE}:data", "optimizer": "adam(lr=0.01)"}
    return mh.Task(**{**said, "schedule": "step(step_size=4, gamma=0.7)", "batch_size": 8, "steps": 20, **changed})


def train(what: mh.Task, strategy: str, workers: int = 1, transport: str = "gloo", **options) -> mh.Result:
    plan = mh.Plan(strategy=strategy, workers=workers, threads=1, transport=transport, timeout_s=20)
    return mh.train(what, plan, progress=False, **options)


@pytest.mark.parametrize("transport", ["gloo", "single"])
@pytest.mark.parametrize("strategy", ["asynchronous(servers=2)", "downpour(fetch=2, push=3, servers=2)"])
def test_a_resume_is_exact_from_a_checkpoint_of_servers_of_either_kind(tmp_path, strategy, transport):
    whole = train(task(), strategy, transport="single")
    train(task(steps=10), strategy, transport="gloo" if transport == "single" else "single", out=tmp_path)
    resumed = train(task(), strategy, transport=transport, out=tmp_path, resume=True)
    assert all(torch.equal(resumed.state[k], whole.state[k]) for k in whole.state)


def test_two_workers_resume_with_what_the_servers_held(tmp_path):
    train(task(steps=10), "asynchronous(servers=2)", 2, out=tmp_path)
    resumed = train(task(), "asynchronous(servers=2)", 2, out=tmp_path, resume=True)
    assert resumed.summary.steps == 20
    assert all(bool(v.isfinite().all()) for v in resumed.state.values())


@pytest.mark.parametrize("transport", CARRIED)
def test_two_workers_and_two_servers_learn_as_workers_on_shared_memory_do(transport):
    digits = mh.Task(model="perceptron", data="digits", optimizer="sgd(lr=0.05)", batch_size=50, epochs=4)
    apart = train(digits, "asynchronous(servers=2)", 2, transport)
    common = train(digits, "asynchronous(servers=2)", 2, "shared")
    assert apart.summary.workers == 2
    assert apart.summary.test_accuracy > 0.8
    assert abs(apart.summary.test_accuracy - common.summary.test_accuracy) < 0.05


# -- accidents ---------------------------------------------------------------------------------------------------------


def stepping(member, text: str, spec: dict) -> None:
    """Steps without end; says when they have begun, and how they ended."""
    with serving(member.comm, 1) as comm:
        if comm is None:
            return
        worker = started(comm, text, spec)
        try:
            for step, batch in enumerate(shares(comm, spec, steps=10**6)):
                comm.step = step
                worker.step(batch)
                if step == 5:
                    member.report("stepping")
        except Exception as e:
            member.report(f"{type(e).__name__}: {e}")
            raise


def ended_by(how: signal.Signals, rank: int, timeout_s: float) -> tuple[Exception, list[str], float]:
    """Two workers and a server, one of which gets a signal: what the launcher raises, what workers said, and when."""
    said: dict[int, list[str]] = {0: [], 1: []}
    t0 = 0.0

    def strike(worker: int, word: str) -> None:
        nonlocal t0
        said[worker].append(word)
        if word == "stepping" and all(said.values()):
            t0 = time.monotonic()
            os.kill(crew.pids[rank], how)

    crew = team("gloo", 3, threads=1, timeout_s=timeout_s, allocator="plain")
    with crew, pytest.raises((WorkerFailed, DeadlineExceeded, PeerLost)) as e:
        crew.run(f"{HERE}:stepping", "asynchronous", problem(), report=strike)
    return e.value, [words[-1] for words in said.values()], time.monotonic() - t0


def test_a_killed_server_is_named_by_its_rank():
    error, said, seconds = ended_by(signal.SIGKILL, 2, timeout_s=20)
    assert isinstance(error, WorkerFailed)
    assert error.rank == 2
    assert "SIGKILL" in str(error)
    assert all("PeerLost" in words and "lost rank 2" in words for words in said)
    assert seconds < 5


def test_a_frozen_server_is_a_deadline_exceeded_that_names_it():
    error, said, _ = ended_by(signal.SIGSTOP, 2, timeout_s=1)
    assert isinstance(error, DeadlineExceeded)
    assert any("for rank 2" in words for words in said)


class EndsTheServer(torch.nn.Module):
    """In its third step worker 0 kills the server, whose process is the youngest of all its siblings."""

    def __init__(self, inputs, classes) -> None:
        super().__init__()
        self.last = torch.nn.Linear(inputs[0], classes).double()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == 3 and factories.rank() == 0:
            ours = f"/proc/{os.getppid()}/task/{os.getppid()}/children"
            with open(ours) as children:
                os.kill(max(map(int, children.read().split()), key=started_at), signal.SIGKILL)
        return self.last(x)


def started_at(pid: int) -> int:
    """In clock ticks; numbers of processes begin anew after the largest."""
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])


def test_a_killed_server_of_a_run_is_called_a_server():
    with pytest.raises(WorkerFailed, match=r"server 0 \(rank 2\) failed: its process was killed by SIGKILL"):
        train(task(model=f"{HERE}:EndsTheServer"), "asynchronous", 2)


def test_a_killed_worker_ends_servers_and_workers():
    error, _, seconds = ended_by(signal.SIGKILL, 1, timeout_s=20)
    assert isinstance(error, WorkerFailed)
    assert error.rank == 1
    assert seconds < 5


@pytest.mark.parametrize("transport", CARRIED)
@pytest.mark.parametrize("where", ["start", "forward", "evaluation"])
def test_a_worker_that_raises_ends_everything_and_shows_its_own_traceback(tmp_path, where, transport):
    model = f"{factories.HERE}:fragile(folder={str(tmp_path)!r}, how='raise', where={where!r})"
    with pytest.raises(WorkerFailed) as e:
        train(task(model=model), "asynchronous", 2, transport)
    assert time.time() - float((tmp_path / "happened").read_text()) < 5
    assert e.value.rank == 1
    assert "the user's own words" in e.value.traceback


def idling(member, seconds: float) -> bool:
    with serving(member.comm, 1) as comm:
        if comm is None:
            return True
        worker = started(comm, "asynchronous", problem())
        time.sleep(seconds)
        worker.store.pull()
        return True


def test_a_server_that_hears_nothing_waits_beyond_the_deadline_of_any_other_wait():
    with team("gloo", 2, threads=1, timeout_s=1.0, allocator="plain") as crew:
        assert crew.run(f"{HERE}:idling", 2.0) == [True, True]


# -- plans -------------------------------------------------------------------------------------------------------------


def facts(ranks_started: int, launcher: str = "torchrun") -> Facts:
    return Facts(cores=8, launched=ranks_started, launcher=launcher, batch_size=100)


@pytest.mark.parametrize(("launcher", "workers"), [("torchrun", 3), ("mpi", 5)])
def test_under_a_launcher_the_last_ranks_serve_unless_servers_are_memory(launcher, workers):
    plan = resolve(mh.Plan(strategy="asynchronous(servers=2)"), facts(5, launcher)).plan
    assert plan.workers == workers
    assert resolve(mh.Plan(strategy="synchronous"), facts(5, launcher)).plan.workers == 5


def test_a_launcher_that_started_other_ranks_than_workers_and_servers_is_refused_with_the_number_that_works():
    with pytest.raises(InvalidPlan, match=r"workers=4 under torchrun, which started 5: .* last 2, .* start 6 ranks"):
        resolve(mh.Plan(strategy="downpour(servers=2)", workers=4), facts(5))
    with pytest.raises(InvalidPlan, match=r"which started 2 ranks: .* Start 3 ranks or more"):
        resolve(mh.Plan(strategy="downpour(servers=2)"), facts(2))


def test_on_shared_memory_there_are_no_server_ranks():
    plan = resolve(mh.Plan(strategy="asynchronous(servers=3)", workers=2, transport="threads"), Facts(cores=2)).plan
    assert plan.strategy.server_ranks(in_memory=True) == 0
    assert plan.strategy.server_ranks(in_memory=False) == 3
