"""Parameter server, SSP, HOGWILD: pushes arrive once, staleness is bounded and measured, races are survived."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.communication.communicator import Communicator
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.consistency.downpour import due
from manyhands.consistency.parameter_server import shards
from manyhands.consistency.ssp import must_read, needed
from manyhands.contract import Batch, Setting
from manyhands.errors import BadInput
from manyhands.partition.data import DataReplica
from manyhands.plan import Facts, Plan, resolve, strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem

SHARING = ("threads", "shared", "simulated")
#: Where many steps are taken: threads share memory as processes do.
SHARING_PER_COMMIT = [pytest.param(on, marks=[pytest.mark.slow] if on == "threads" else []) for on in SHARING]


def started(comm: Communicator, text: str, spec: dict):
    strategy = strategy_from(text)
    model, opt = jobs.build(spec)
    replica = DataReplica(model, opt, jobs.LOSSES[spec["loss"]], comm, common=strategy.parameters == "common")
    with comm.counting("control"):
        return strategy.start(replica, comm)


def shares(comm: Communicator, spec: dict, *, steps: int):
    """Batches without end; each worker's share of them."""
    for inputs, target in itertools.islice(itertools.cycle(jobs.batches(spec)), steps):
        lo, hi = jobs.cut(len(target), comm.size, "even")[comm.rank]
        yield Batch(inputs[lo:hi], target[lo:hi], hi - lo, len(target))


# -- shards ------------------------------------------------------------------------------------------------------------


@given(numel=st.integers(0, 5000), servers=st.integers(1, 9))
def test_shards_tile_a_piece_and_are_balanced(numel, servers):
    cuts = shards.bounds(numel, servers)
    assert [x for lo, hi in cuts for x in range(lo, hi)] == list(range(numel))
    assert len(cuts) <= servers
    sizes = [hi - lo for lo, hi in cuts] or [0]
    assert max(sizes) <= numel / servers + 64  # cuts lie at multiples of 64


# -- conservation ------------------------------------------------------------------------------------------------------


def push_and_add(comm: Communicator, text: str, spec: dict, steps: int) -> dict:
    """Plain SGD with rate 1 on the servers: they end at the start minus all that was pushed."""
    worker = started(comm, text, spec)
    pushed = [torch.zeros_like(p.flat) for p in worker.replica.pieces]
    kept = worker.store
    push = kept.push

    def noted(vectors, **how):
        for sum_, vector in zip(pushed, vectors, strict=True):
            sum_ += vector
        push(vectors, **how)

    kept.push = noted
    accrued = [torch.zeros_like(p.flat) for p in worker.replica.pieces]
    for step, batch in enumerate(shares(comm, spec, steps=steps)):
        comm.step = step
        worker.step(batch)
        for sum_, piece in zip(accrued, worker.replica.pieces, strict=True):
            sum_ += piece.grad
    left = getattr(worker, "accrued", [torch.zeros_like(p.flat) for p in worker.replica.pieces])
    left = [x if getattr(worker, "_sums", False) else torch.zeros_like(x) for x in left]
    end = worker.consensus()
    start = jobs.vector(jobs.build(spec)[0].parameters())
    comm.barrier()
    return {
        "moved": jobs.vector(end) - start,
        "pushed": jobs.vector(pushed),
        "accrued": jobs.vector(accrued),
        "left": jobs.vector(left),
        "staleness": sorted(worker.staleness.items()),
    }


@pytest.mark.parametrize("on", SHARING)
@pytest.mark.parametrize(
    "text", ["asynchronous", "asynchronous(servers=3)", "downpour(fetch=2, push=3, server='sgd(lr=0.1)')"]
)
def test_servers_move_by_the_sum_of_what_was_pushed_and_nothing_is_lost_or_applied_twice(on, text):
    results = run_ranks(push_and_add, 3, on=on, args=(text, problem(), 25))
    total = sum(r["pushed"] for r in results)
    assert (results[0]["moved"] + 0.1 * total).abs().max() < 1e-12
    for r in results:
        assert (r["pushed"] + r["left"] - r["accrued"]).abs().max() < 1e-12


@pytest.mark.parametrize("on", SHARING)
def test_staleness_is_measured_once_a_push_and_shard(on):
    for servers in (1, 2):
        results = run_ranks(push_and_add, 3, on=on, args=(f"asynchronous(servers={servers})", problem(), 20))
        assert all(sum(n for _, n in r["staleness"]) == 20 * servers for r in results)
        assert all(late >= 0 for r in results for late, _ in r["staleness"])


@given(
    usable=st.lists(st.booleans(), max_size=12),
    fetch=st.integers(1, 5),
    push=st.integers(1, 5),
    values=st.lists(st.integers(-9, 9), min_size=12, max_size=12),
)
def test_downpour_pushes_what_it_has_accrued_whatever_the_periods(usable, fetch, push, values):
    """Whole numbers, so that sums are exact; a gradient over no samples is none, whatever is in its memory."""
    spec = problem()
    worker = started(SingleCommunicator(), f"downpour(fetch={fetch}, push={push})", spec)
    pieces, said = worker.replica.pieces, iter(zip(usable, values, strict=False))
    pushed, exchanges = [], []

    def gradients(_):
        counts, value = next(said)
        for piece in pieces:
            piece.grad.fill_(value)
        return torch.zeros(()), float(counts)

    def noted(vectors, *, pull):
        assert {float(x) for v in vectors for x in (v.min(), v.max())} == {float(vectors[0][0])}
        pushed.append(float(vectors[0][0]))
        exchanges.append((worker.steps, pull))

    worker.replica.gradients, worker.store.push = gradients, noted
    worker.store.pull = lambda: exchanges.append((worker.steps, True))
    for batch in shares(worker.comm, spec, steps=len(usable)):
        worker.step(batch)
    left = float(worker.accrued[0][0]) if worker.pending else 0.0
    assert sum(pushed) + left == sum(v for v, counts in zip(values, usable, strict=False) if counts)
    assert [s for s, pulled in exchanges if pulled] == list(range(fetch, len(usable) + 1, fetch))
    assert all(s % push == 0 or pulled for s, pulled in exchanges)
    assert worker.pending == any(usable[len(usable) // push * push :])  # nothing waits longer than a period


@given(steps=st.integers(0, 100), period=st.integers(1, 30))
def test_what_is_due_in_every_period_is_due_once_in_it(steps, period):
    assert sum(due(step, period) for step in range(1, steps + 1)) == steps // period


# -- degenerate identities ---------------------------------------------------------------------------------------------


def trajectory(comm: Communicator, text: str, spec: dict, steps: int) -> torch.Tensor:
    worker = started(comm, text, spec)
    seen = []
    for step, batch in enumerate(shares(comm, spec, steps=steps)):
        comm.step = step
        worker.step(batch)
        seen.append(jobs.vector(p.flat for p in worker.replica.pieces))
    worker.meet()
    worker.finish()
    seen.append(jobs.vector(p.flat for p in worker.replica.pieces))
    comm.barrier()
    return torch.stack(seen)


@pytest.mark.parametrize("servers", [2, 5])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("strategy", ["asynchronous", "downpour"])
def test_with_one_worker_the_number_of_servers_is_irrelevant(strategy, optimizer, servers):
    spec = problem(optimizer=optimizer)
    one, many = (
        run_ranks(trajectory, 1, on="single", args=(f"{strategy}(servers={n})", spec, 8))[0] for n in (1, servers)
    )
    assert torch.equal(one, many)


def test_a_downpour_client_alone_with_both_periods_1_is_adagrad_on_the_server():
    spec = problem()
    (mine,) = run_ranks(trajectory, 1, on="single", args=("downpour(server='adagrad(lr=0.05)')", spec, 4))
    with jobs.one_thread():
        model, _ = jobs.build(spec)
        opt = torch.optim.Adagrad(model.parameters(), lr=0.05)
        for step, (x, target) in enumerate(jobs.batches(spec)):
            opt.zero_grad()
            jobs.LOSSES["mean"](model(x), target).backward()
            opt.step()
            assert torch.equal(mine[step], jobs.vector(model.parameters()))


@pytest.mark.parametrize("on", SHARING)
def test_ssp_without_staleness_is_lock_step(on):
    spec = problem()
    mine = run_ranks(trajectory, 3, on=on, args=("ssp(staleness=0)", spec, 12))
    theirs = run_ranks(trajectory, 3, on="simulated", args=("synchronous(update='replicated')", spec, 12))
    assert (mine[0][-1] - theirs[0][-1]).abs().max() < 1e-12


def own_writes(comm: Communicator) -> torch.Tensor:
    """A worker's parameters without a pull, against its own updates alone: their largest difference, by step."""
    worker = started(comm, "ssp(staleness=3)", problem())
    pieces, differences = worker.replica.pieces, []
    for batch in shares(comm, problem(), steps=3):
        before = jobs.vector(p.flat for p in pieces)
        worker.step(batch)
        part = batch.count / batch.total
        expected = before - 0.1 * part * jobs.vector(p.grad for p in pieces)
        differences.append((jobs.vector(p.flat for p in pieces) - expected).abs().max())
    assert comm.counters.tallies["step"]["pull"].calls == 0
    comm.barrier()
    return torch.stack(differences)


def test_an_ssp_worker_sees_its_own_writes_at_once():
    assert all(d.max() < 1e-12 for d in run_ranks(own_writes, 2, on="simulated"))


def without_a_share(comm: Communicator, text: str, steps: int) -> dict:
    """All samples are the first two workers'; the third has none in any step."""
    worker = started(comm, text, problem())
    for step, (x, y) in enumerate(itertools.islice(itertools.cycle(jobs.batches(problem())), steps)):
        comm.step = step
        lo, hi = [*jobs.cut(len(y), 2, "even"), (0, 0)][comm.rank]
        worker.step(Batch(x[lo:hi], y[lo:hi], hi - lo, len(y)))
    worker.meet()
    end = jobs.vector(worker.consensus())
    comm.barrier()
    return {"end": end, "staleness": sorted(worker.staleness.items())}


@pytest.mark.parametrize("on", ["shared", "simulated"])
@pytest.mark.parametrize("bound", [0, 2])
def test_a_worker_whose_share_is_empty_does_not_stop_the_others(bound, on):
    results = run_ranks(without_a_share, 3, on=on, args=(f"ssp(staleness={bound})", 12))
    assert all(sum(n for _, n in r["staleness"]) == 12 for r in results)
    assert max(late for r in results for late, _ in r["staleness"]) <= bound
    if not bound:
        theirs = run_ranks(trajectory, 2, on="simulated", args=("synchronous(update='replicated')", problem(), 12))
        assert (results[0]["end"] - theirs[0][-1]).abs().max() < 1e-12


# -- bounded staleness -------------------------------------------------------------------------------------------------


def dawdled(comm: Communicator, text: str, steps: int, seed: int) -> dict:
    spec = problem()
    worker = started(comm, text, spec)
    if comm.transport == "simulated":
        generator = torch.Generator().manual_seed(seed + comm.rank)
        gradients = worker.replica.gradients

        def slow(*args):
            comm.elapse(float(torch.rand((), generator=generator)) ** 4)  # now and then one is very late
            return gradients(*args)

        worker.replica.gradients = slow
    else:
        jobs.slow_down(worker.replica, seed, comm.rank)
    for step, batch in enumerate(shares(comm, spec, steps=steps)):
        comm.step = step
        worker.step(batch)
    worker.meet()
    worker.finish()
    finite = all(bool(p.flat.isfinite().all()) for p in worker.replica.pieces)
    comm.barrier()
    return {
        "staleness": sorted(worker.staleness.items()),
        "finite": finite,
        "pulled_B": comm.counters.tallies["step"]["pull"].sent_B,
    }


@given(workers=st.integers(1, 5), bound=st.integers(0, 4), cached=st.booleans(), order=st.lists(st.integers(0, 4)))
def test_by_the_reading_rule_no_interleaving_reads_staler_than_the_bound_and_somebody_can_always_go_on(
    workers, bound, cached, order
):
    clocks, seen, held = [0] * workers, [0] * workers, [[0] * workers for _ in range(workers)]
    for turn in order:
        waiting = [
            (not cached or must_read(seen[p], c, bound)) and min(clocks) < needed(c, bound)
            for p, c in enumerate(clocks)
        ]
        assert not waiting[clocks.index(min(clocks))]
        p = turn % workers
        if waiting[p]:
            continue
        if not cached or must_read(seen[p], clocks[p], bound):
            seen[p], held[p] = min(clocks), list(clocks)  # all updates that there are
        held[p][p] = clocks[p]  # its own it always has
        assert all(updates >= clocks[p] - bound for updates in held[p])
        if bound == 0:
            assert set(clocks) <= {clocks[p], clocks[p] + 1}  # lock-step: nobody has begun a step beyond
        clocks[p] += 1
    assert max(clocks) - min(clocks) <= bound + 1


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("on", SHARING_PER_COMMIT)
def test_no_read_is_staler_than_the_bound(on, bound, cached):
    results = run_ranks(dawdled, 3, on=on, args=(f"ssp(staleness={bound}, cached={cached})", 25, 4))
    seen = [late for r in results for late, _ in r["staleness"]]
    assert max(seen) <= bound
    assert all(sum(n for _, n in r["staleness"]) == 25 for r in results)
    if bound and on == "simulated":
        assert max(seen) == bound  # the bound is made use of


def test_cached_reads_pull_less():
    cached, fresh = (
        run_ranks(dawdled, 3, on="simulated", args=(f"ssp(staleness=4, cached={c})", 40, 1)) for c in (True, False)
    )
    assert sum(r["pulled_B"] for r in cached) < 0.7 * sum(r["pulled_B"] for r in fresh)


@pytest.mark.parametrize("on", SHARING_PER_COMMIT)
@pytest.mark.parametrize(
    "text", ["asynchronous(servers=2)", "downpour(fetch=3, push=2)", "ssp", "hogwild", "hogwild(lock='round_robin')"]
)
def test_workers_that_dawdle_at_random_come_to_an_end_with_finite_parameters(on, text):
    assert all(r["finite"] for r in run_ranks(dawdled, 3, on=on, args=(text, 30, 2)))


def test_a_staleness_aware_rate_is_divided_by_one_more_than_the_staleness():
    """In virtual time the race is the same every time: all start together, so the k-th push is k − 1 updates late."""
    plain, aware = (
        run_ranks(push_and_add, 3, on="simulated", args=(f"asynchronous(staleness_aware={a})", problem(), 1))
        for a in (False, True)
    )
    assert [r["staleness"] for r in aware] == [[(0, 1)], [(1, 1)], [(2, 1)]]
    moved = -0.1 * sum(r["pushed"] / (1 + r["staleness"][0][0]) for r in aware)
    assert (aware[0]["moved"] - moved).abs().max() < 1e-12
    assert not torch.allclose(plain[0]["moved"], aware[0]["moved"])


# -- hogwild -----------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """Each sample has a row to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(24, 8).double()
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(24 * 8).view(24, 8) / 100)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table(rows)


def rows_of(rank: int, size: int, steps: int) -> list[Batch]:
    per = 24 // size
    rows = [torch.tensor([rank * per + step % per]) for step in range(steps)]
    return [Batch(row, torch.full((1, 8), float(i), dtype=torch.float64), 1) for i, row in enumerate(rows)]


def on_rows_of_its_own(comm: Communicator, lock: str) -> torch.Tensor:
    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    replica = DataReplica(model, optimizer, torch.nn.functional.mse_loss, comm, common=True)
    worker = strategy_from(f"hogwild(lock={lock!r})").start(replica, comm)
    comm.barrier()
    for batch in rows_of(comm.rank, comm.size, 30):
        worker.step(batch)
    worker.meet()
    worker.finish()
    result = model.table.weight.detach().clone()
    comm.barrier()
    return result


@pytest.mark.parametrize("on", SHARING)
@pytest.mark.parametrize("lock", ["one"])
def test_where_supports_are_disjoint_hogwild_is_serial_in_any_order(on, lock):
    model = Table()
    with jobs.one_thread():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for batch in itertools.chain.from_iterable(rows_of(rank, 3, 30) for rank in range(3)):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(batch.inputs), batch.target).backward()
            optimizer.step()
    for result in run_ranks(on_rows_of_its_own, 3, on=on, args=(lock,)):
        assert torch.equal(result, model.table.weight)


def test_a_hogwild_that_cannot_share_memory_is_refused_with_what_would_work():
    setting = Setting(workers=2, transport="gloo", shares_memory=False, elementwise=True, stateless=True)
    (refused,) = strategy_from("hogwild").problems(setting)
    assert "hogwild" in refused.asked
    assert "shared" in refused.cure


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ssp(staleness=-1)", "from 0"),
        ("ssp(staleness=1.5)", "from 0"),
        ("ssp(servers=0)", "from 1"),
        ("asynchronous(servers=0)", "from 1"),
        ("downpour(fetch=0)", "a period in steps"),
        ("downpour(push=-2)", "a period in steps"),
        ("downpour(server='rmsprop')", "sgd, adagrad, adam"),
        ("downpour(server='sdg')", "sgd"),
        ("hogwild(lock='two')", "none, one, coordinate or round_robin"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(text, said):
    with pytest.raises(BadInput, match=said):
        strategy_from(text)


# -- how many servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "decided"), [("shared", "servers=3"), ("threads", "servers=3"), ("gloo", "servers=1")]
)
@pytest.mark.parametrize("text", ["asynchronous", "ssp(staleness=1)", "downpour(fetch=2, push=2)"])
def test_there_is_a_shard_a_worker_where_servers_are_memory_and_one_server_where_they_are_ranks(
    text, transport, decided
):
    strategy = strategy_from(text)
    assert str(strategy) == text
    shares = transport in SHARING
    setting = Setting(workers=3, transport=transport, shares_memory=shares, elementwise=True, stateless=True)
    resolved = strategy.resolve(setting)
    assert decided in str(resolved)
    assert strategy_from(str(resolved)) == resolved == resolved.resolve(dataclasses.replace(setting, workers=5))
    assert resolved.server_ranks(in_memory=shares) == (0 if shares else 1)
    assert resolved.traffic(10**6, 3).messages == 2 * int(decided[-1]) or "downpour" in text
    assert strategy_from(f"{strategy.name}(servers=2)").resolve(setting).servers == 2


def test_a_plan_says_how_many_servers_it_has():
    plan = resolve(Plan(strategy="asynchronous", workers=2, transport="threads"), Facts(cores=2)).plan
    assert plan.as_table()["strategy"] == "asynchronous(servers=2)"
