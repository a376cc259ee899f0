"""Shards in windows: what they hold is what common memory would, and only what is touched travels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.common_store import CommonStore
from manyhands.consistency.parameter_server.opening import opened
from manyhands.consistency.parameter_server.window_store import WindowStore
from manyhands.contract import Batch
from manyhands.partition.data import DataReplica
from manyhands.plan import Facts, resolve, strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.consistency.test_remote_store import in_turn
from tests.consistency.test_served import push_and_add, shares, started, trajectory
from tests.partition import test_rows

#: Why 1e-12: see test_contract; what is done is the same, element for element.
SAME = 1e-12


def as_on_threads(fn, *args, size: int = 2) -> tuple[list, list]:
    return run_ranks(fn, size, on="mpi", args=args), run_ranks(fn, size, on="threads", args=args)


def in_order(comm: Communicator, worker, batches) -> None:
    """A step of rank 0, then one of rank 1, and so on."""
    for batch in batches:
        for turn in range(comm.size):
            if turn == comm.rank:
                worker.step(batch)
            comm.barrier()


def state_of(worker) -> dict:
    snapshot, saved = jobs.vector(worker.consensus()), worker.state_dict()["store"]
    return {
        "store": type(worker.store).__name__,
        "pulled": jobs.vector(p.flat for p in worker.replica.pieces),
        "snapshot": snapshot,
        "slots": jobs.vector([snapshot[:0], *(slot for slots in saved.get("slots", []) for slot in slots)]),
        "counts": [saved.get(name) for name in ("read", "versions", "updates", "used")],
        "staleness": sorted(worker.staleness.items()),
    }


def assert_same(windows: list[dict], common: list[dict]) -> None:
    for mine, theirs in zip(windows, common, strict=True):
        assert (mine.pop("store"), theirs.pop("store")) == ("WindowStore", "CommonStore")
        for what in mine:
            if isinstance(mine[what], torch.Tensor):
                assert mine[what].shape == theirs[what].shape
                assert not mine[what].numel() or (mine[what] - theirs[what]).abs().max() <= SAME, what
            else:
                assert mine[what] == theirs[what], what


def stepped(comm: Communicator, text: str, spec: dict, steps: int) -> dict:
    worker = started(comm, text, spec)
    in_order(comm, worker, shares(comm, spec, steps=steps))
    result = state_of(worker)
    comm.barrier()
    return result


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("asynchronous(servers=3)", problem(optimizer="adam")),
        ("asynchronous(servers=2, staleness_aware=True)", problem(optimizer="momentum")),
        ("asynchronous(servers=1)", problem("used_later", "adamw")),
        ("asynchronous(servers=3)", problem("mixed", "momentum", dtype="mixed")),
        ("downpour(fetch=2, push=3, server='adagrad(lr=0.05)', servers=2)", problem(optimizer="momentum")),
    ],
)
def test_workers_that_take_turns_leave_what_they_leave_in_common_memory(text, spec):
    assert_same(*as_on_threads(stepped, text, spec, 7))


def taken_up(comm: Communicator, text: str, spec: dict, steps: int) -> dict:
    """As `stepped`, but in the middle another worker takes up the state, as a resume does."""
    batches = list(shares(comm, spec, steps=steps))
    worker = started(comm, text, spec)
    in_order(comm, worker, batches[: steps // 2])
    parameters, saved = worker.consensus(), worker.state_dict()
    comm.barrier()
    other = started(comm, text, spec)
    for piece, values in zip(other.replica.pieces, parameters, strict=True):
        piece.flat.copy_(values)
    other.rebase()
    other.load_state_dict(saved)
    in_order(comm, other, batches[steps // 2 :])
    other.store.staleness += worker.store.staleness
    result = state_of(other)
    comm.barrier()
    return result


@pytest.mark.parametrize("model", ["mlp", "unused"])
def test_what_one_worker_saves_another_takes_up(model):
    args = "asynchronous(servers=3)", problem(model, "adam"), 8
    resumed, straight = run_ranks(taken_up, 2, on="mpi", args=args), run_ranks(stepped, 2, on="threads", args=args)
    assert_same(resumed, straight)


def test_staleness_is_counted_and_divides_the_rate_as_on_shared_memory():
    windows, common = as_on_threads(in_turn, problem(), 4)
    assert [r["staleness"] for r in windows] == [[(0, 4)], [(1, 4)]]
    assert (windows[0]["all"] - common[0]["all"]).abs().max() < SAME


@pytest.mark.parametrize("text", ["asynchronous(servers=3)", "downpour(fetch=2, push=3, server='sgd(lr=0.1)')"])
def test_nothing_that_racing_workers_push_is_lost_or_applied_twice(text):
    results = run_ranks(push_and_add, 2, on="mpi", args=(text, problem(), 40))
    assert (results[0]["moved"] + 0.1 * sum(r["pushed"] for r in results)).abs().max() < SAME
    for r in results:
        assert (r["pushed"] + r["left"] - r["accrued"]).abs().max() < SAME
        if "asynchronous" in text:
            assert sum(n for _, n in r["staleness"]) == 40 * 3


def test_ssp_without_staleness_is_lock_step():
    mine = run_ranks(trajectory, 2, on="mpi", args=("ssp(staleness=0, servers=2)", problem(), 12))
    theirs = run_ranks(trajectory, 2, on="simulated", args=("synchronous(update='replicated')", problem(), 12))
    assert (mine[0][-1] - theirs[0][-1]).abs().max() < SAME


@pytest.mark.parametrize("aggregate", ["mean", "median"])
def test_rounds_that_wait_for_all_are_lock_step(aggregate):
    """The median of two is their mean, here of workers that count alike."""
    spec = problem(optimizer="momentum", batches=(8, 8, 8, 8))
    mine = run_ranks(trajectory, 2, on="mpi", args=(f"backup_workers(backups=0, aggregate={aggregate})", spec, 12))
    theirs = run_ranks(trajectory, 2, on="simulated", args=("synchronous(update='replicated')", spec, 12))
    assert (mine[0][-1] - theirs[0][-1]).abs().max() < SAME


def moved_in_rounds(comm: Communicator, aggregate: str, steps: int) -> dict:
    """What windows move in rounds to which workers come in order, beyond pulls and the update."""
    worker = started(comm, f"backup_workers(backups=0, aggregate={aggregate})", problem())
    numel = sum(p.flat.numel() for p in worker.replica.pieces)
    window, moved = worker.rounds.round._window, {"get": 0, "put": 0}
    for name in moved:
        access = getattr(window, name)

        def counted(whose, *parts, name=name, access=access):
            moved[name] += sum(x.nbytes for _, x in parts if x.dtype == torch.float64 and x.numel() > 1)
            access(whose, *parts)

        setattr(window, name, counted)
    come = comm.board()
    bring = worker.rounds.round.take

    def noted(*args, **how):
        bring(*args, **how)
        come.post(step + 1)

    worker.rounds.round.take = noted
    for step, batch in enumerate(shares(comm, problem(), steps=steps)):
        if comm.rank:
            come.wait(step + 1, "the test", rank=comm.rank - 1)
        worker.step(batch)
    worker.meet()
    comm.barrier()
    return {what: each / (8 * numel * steps) for what, each in moved.items()}


@pytest.mark.parametrize(
    ("aggregate", "gets"), [("mean", [0, 1, 1]), pytest.param("median", [0, 0, 2], marks=pytest.mark.slow)]
)
def test_of_a_round_only_those_vectors_travel_that_somebody_needs(aggregate, gets):
    results = run_ranks(moved_in_rounds, 3, on="mpi", args=(aggregate, 4))
    assert [r["get"] for r in results] == gets
    assert [r["put"] for r in results] == [1, 1, 0]


@pytest.mark.parametrize("text", ["asynchronous(servers=2)", "downpour(fetch=2, push=2)"])
def test_a_loss_that_is_not_finite_stops_all_workers(text):
    for result in run_ranks(jobs.train, 2, on="mpi", args=(text, problem(poison=(1, 1)))):
        step, said = result["raised"]
        assert step == 1
        assert "worker 1" in said


# -- sparse tables -----------------------------------------------------------------------------------------------------


def looked_up(comm: Communicator, servers: int, optimizer: str) -> dict:
    worker = test_rows.started(comm, f"asynchronous(servers={servers})", optimizer)
    comm.barrier()
    in_order(comm, worker, [Batch(x, y, len(y), len(y)) for x, y in test_rows.batches(6)])
    result = state_of(worker)
    comm.barrier()
    return result


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("optimizer", test_rows.OPTIMIZERS)
def test_a_table_in_windows_is_one_in_common_memory(optimizer, servers):
    assert_same(*as_on_threads(looked_up, servers, optimizer))


def test_only_touched_rows_change_and_only_they_travel():
    windows, common = as_on_threads(test_rows.touched, "asynchronous(servers=2)")
    assert windows == common


def moved_for_rows(comm: Communicator, rows: int) -> list[int]:
    """What one step on two rows of a table counts as payload, and what the windows move for it."""
    table = nn.EmbeddingBag(rows, 4, mode="sum", sparse=True).double()
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    replica = DataReplica(table, optimizer, F.mse_loss, comm, common=False, sparse=True)
    worker = strategy_from("asynchronous(servers=1)").start(replica, comm)
    before = [comm.counters.sent_B(purpose) for purpose in ("step", "service")]
    in_order(comm, worker, [Batch(torch.tensor([[3, 7]]), torch.zeros(1, 4, dtype=torch.float64), 1, comm.size)])
    sent = [comm.counters.sent_B(purpose) - b for purpose, b in zip(("step", "service"), before, strict=True)]
    comm.barrier()
    return sent


@pytest.mark.parametrize("rows", [10, 1000])
def test_what_a_step_costs_does_not_depend_on_the_tables_size(rows):
    owner, other = run_ranks(moved_for_rows, 2, on="mpi", args=(rows,))
    payload_B = 2 * 2 * (8 + 4 * 8)  # pulled and pushed: two rows with their numbers
    assert owner == [payload_B, 0]
    rows_B, version_B, updates_B, used_B = 2 * 4 * 8, 8, 8, 8
    pulled_B = rows_B + version_B
    pushed_B = 2 * (2 * rows_B + version_B + updates_B)  # there and back, each row with Adagrad's squares
    assert other == [payload_B, pulled_B + pushed_B + used_B]


# -- which servers there are -------------------------------------------------------------------------------------------


def kinds(comm: Communicator) -> str:
    model, optimizer = jobs.build(problem())
    replica = DataReplica(model, optimizer, jobs.LOSSES["mean"], comm, common=False)
    return type(opened(replica, comm, 2)).__name__


def test_servers_are_memory_where_workers_reach_any():
    assert run_ranks(kinds, 2, on="mpi") == [WindowStore.__name__] * 2
    assert run_ranks(kinds, 2, on="shared") == [CommonStore.__name__] * 2


@pytest.mark.parametrize(
    "strategy", ["asynchronous(servers=3)", "downpour", "ssp", "backup_workers", "asynchronous_gossip"]
)
def test_over_mpi_no_rank_serves(strategy):
    planned = resolve(mh.Plan(strategy=strategy, workers=2, transport="mpi"), Facts(cores=2))
    assert planned.plan.strategy.server_ranks(in_memory=planned.setting.servers_in_memory) == 0
    started_by_mpiexec = resolve(mh.Plan(strategy=strategy), Facts(cores=8, launched=5, launcher="mpi"))
    assert started_by_mpiexec.plan.workers == 5
