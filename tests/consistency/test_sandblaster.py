"""Sandblaster: L-BFGS by dot products alone, and units of which each counts once."""

import contextlib
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.consistency.lbfgs import History, combination, is_curved, two_loop
from manyhands.consistency.sandblaster import Sandblaster
from manyhands.consistency.work_units import WorkUnits
from manyhands.contract import Batch, Setting
from manyhands.plan import strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.matrices import halved

SHARING = ("threads", "shared", "simulated")


def vectors(k: int, n: int, seed: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """k pairs of a convex quadratic function, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    root = draw(n, n)
    curvature = root @ root.T / n + 0.5 * torch.eye(n, dtype=torch.float64)
    return [(s, curvature @ s) for s in draw(k, n)], draw(n)


def dense(pairs: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> torch.Tensor:
    """H as a matrix, by the update formula of BFGS."""
    eye = torch.eye(n, dtype=torch.float64)
    s, y = pairs[-1] if pairs else (torch.ones(1), torch.ones(1))
    result = eye * (s.dot(y) / y.dot(y))
    for s, y in pairs:
        rho = 1 / y.dot(s)
        result = (eye - rho * s.outer(y)) @ result @ (eye - rho * y.outer(s)) + rho * s.outer(s)
    return result


# -- the direction -----------------------------------------------------------------------------------------------------


@given(k=st.integers(0, 6), n=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_two_loops_are_the_product_with_bfgs_matrix(k, n, seed):
    pairs, grad = vectors(k, n, seed)
    expected = dense(pairs, n) @ grad
    assert (two_loop(grad, pairs) - expected).abs().max() <= 1e-9 * (1 + expected.abs().max())


@given(k=st.integers(0, 6), n=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_products_alone_give_the_same_direction(k, n, seed):
    pairs, grad = vectors(k, n, seed)
    basis = torch.stack([*(s for s, _ in pairs), *(y for _, y in pairs), grad])
    expected = two_loop(grad, pairs)
    found = combination(basis @ basis.T) @ basis
    assert (found - expected).abs().max() <= 1e-9 * (1 + expected.abs().max())


@given(steps=st.integers(1, 9), parts=st.integers(1, 4), most=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_slices_of_the_history_make_slices_of_what_the_whole_one_makes(steps, parts, most, seed):
    generator = torch.Generator().manual_seed(seed)
    n, like = 12, torch.zeros(0, dtype=torch.float64)
    histories = [History(most, [n // parts], [like]) for _ in range(parts)]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    moved, before = torch.zeros(parts * (n // parts)).double(), None
    for _ in range(steps):
        grad = torch.randn(len(moved), generator=generator, dtype=torch.float64)
        cut = lambda x: x.view(parts, -1)  # noqa: E731
        sums = sum(h.look([g]) for h, g in zip(histories, cut(grad), strict=True))
        mine = torch.cat([h.direction(sums.clone())[0] for h in histories])
        if before is not None and is_curved(*(float(x) for x in _products(moved, grad - before))):
            pairs = [*pairs, (moved, grad - before)][-most:]
        expected = two_loop(grad, pairs)
        scale = 1 + expected.abs().max() + max((s.abs().max() / abs(s.dot(y)) for s, y in pairs), default=0)
        assert (mine - expected).abs().max() <= 1e-7 * scale**2
        moved, before = torch.randn(len(moved), generator=generator, dtype=torch.float64), grad
        for h, m in zip(histories, cut(moved), strict=True):
            h.displacements[0].copy_(m)
    assert all(h.kept == histories[0].kept >= len(pairs) for h in histories)


def _products(s: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return s.dot(y), s.dot(s), y.dot(y)


@pytest.mark.parametrize("history", [1, 3, 10])
def test_steps_are_those_of_torchs_lbfgs(history):
    """torch shortens its first step to η·min(1, 1 / Σ|g|); from a gradient of less than that in sum it does not."""
    _, start = vectors(2, 6, 5)
    x = (start / start.norm() * 1e-2).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 6 + torch.eye(6, dtype=torch.float64)
    mine = History(history, [6], [x.detach()])
    own = x.detach().clone()
    theirs = torch.optim.LBFGS([x], lr=0.5, max_iter=1, history_size=history)

    def loss():
        theirs.zero_grad()
        value = 0.5 * x @ matrix @ x
        value.backward()
        return value

    for _ in range(8):
        theirs.step(loss)
        step = -0.5 * mine.direction(mine.look([matrix @ own]))[0]
        own += step
        mine.displacements[0].copy_(step)
        assert (own - x.detach()).abs().max() <= 1e-10


def test_a_pair_that_curves_downwards_is_not_kept():
    history = History(3, [2], [torch.zeros(0).double()])
    first, second = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 1.0]).double()
    history.direction(history.look([first]))
    history.displacements[0].copy_(first)  # uphill, and yet the gradient gets smaller
    (direction,) = history.direction(history.look([second]))
    assert history.kept == 0
    assert torch.equal(direction, second)


# -- units -------------------------------------------------------------------------------------------------------------


def listed(most: int, workers: int, backups: int) -> WorkUnits:
    lock = contextlib.nullcontext()
    return WorkUnits(most, workers, backups, allocate=lambda n, dtype: torch.zeros(n, dtype=dtype), lock=lock)


@given(
    workers=st.integers(1, 5),
    each=st.integers(1, 4),
    backups=st.integers(0, 2),
    few=st.integers(0, 20),
    seed=st.integers(),
)
def test_each_unit_counts_once_whatever_the_order(workers, each, backups, few, seed):
    """Workers begin and end in any order; some are far behind."""
    work, chance = listed(workers * each, workers, backups), random.Random(seed)
    units = max(1, min(work.most, few))
    for _ in range(2):  # jobs, one after the other
        counted, begun = [0] * units, [0] * units
        doing: dict[int, int | None] = {}
        left = list(range(workers))
        while left:
            rank = chance.choice(left)
            if rank in doing and doing[rank] is not None:
                counted[doing[rank]] += work.finish(doing[rank])
                doing[rank] = work.take(units)
            else:
                doing[rank] = work.own(rank) if rank < units else work.take(units)
            if doing[rank] is None:
                left.remove(rank)
            else:
                begun[doing[rank]] += 1
        assert counted == [1] * units
        assert max(begun) <= 2 + backups  # an owner comes even to what others have done for him
        if not backups:
            assert begun == [1] * units
        work.clear()


def test_a_unit_that_dawdles_is_done_again_and_its_late_result_dropped():
    work = listed(4, 2, 1)
    assert (work.own(0), work.own(1)) == (0, 1)
    assert work.finish(0)
    assert work.take(4) == 2
    assert work.finish(2)
    assert work.take(4) == 3
    assert work.finish(3)
    assert work.take(4) == 1  # worker 1 is still at it
    assert work.take(4) is None  # no third time
    assert work.finish(1)
    assert not work.finish(1)


# -- on ranks ----------------------------------------------------------------------------------------------------------

PROBLEMS = {
    "sgd": problem(batches=(8, 8, 8, 5)),
    "several pieces": problem("mixed", dtype="mixed"),
    "fewer samples than workers": problem(batches=(8, 2, 1, 1, 8)),
    "tokens": problem(loss="tokens"),
    "sum and l2": problem("regression", "small_sgd", "sum_l2"),
    "decay, schedule": problem(optimizer="decay", schedule=True),
    "clip": problem(clip=0.05),
    "micro": problem(micro_batches=2),
    "used later": problem("used_later_in_part", "decay", batches=(8, 8, 8, 8)),
}


def serial(spec: dict, history: int = 10) -> list[torch.Tensor]:
    """Whole batches, one process and `two_loop`, with torch alone; for one dtype."""
    model, opt = jobs.build(spec)
    group, result, pairs, before = opt.param_groups[0], [], [], None
    for inputs, target in jobs.batches(spec):
        model.zero_grad()
        jobs.LOSSES[spec["loss"]](model(inputs), target).backward()
        grad, at = jobs.vector(p.grad for p in model.parameters()), jobs.vector(model.parameters())
        if before is not None:
            s, y = at - before[0], grad - before[1]
            pairs = (
                [*pairs, (s, y)][-history:] if is_curved(float(s.dot(y)), float(s.dot(s)), float(y.dot(y))) else pairs
            )
        before = at, grad
        after = at - group["lr"] * (two_loop(grad, pairs) + group["weight_decay"] * at)
        torch.nn.utils.vector_to_parameters(after, model.parameters())
        result.append(after.detach())
    return result


def run(spec: dict, size: int, on: str, text: str = "sandblaster") -> list[dict]:
    return run_ranks(jobs.train, size, on=on, args=(text, spec), timeout_s=30)


@pytest.mark.parametrize("optimizer", ["sgd", "decay"])
@pytest.mark.parametrize("history", [1, 10])
def test_one_worker_is_the_serial_algorithm(optimizer, history):
    """Products of differences are divided by, which magnifies rounding: 1e-9 where a sum is good to 1e-15."""
    spec = problem(optimizer=optimizer, batches=(8,) * 6)
    (mine,) = run(spec, 1, "single", f"sandblaster(history={history})")
    for a, b in zip(mine["parameters"][1:], serial(spec, history), strict=True):
        assert (a - b).abs().max() <= 1e-9
    assert not mine["sent_B"][0]


@pytest.mark.parametrize(("name", "on"), halved(PROBLEMS, SHARING))
def test_three_workers_are_one_and_bit_identical_everywhere(name, on):
    spec = PROBLEMS[name]
    (alone,), together = run(spec, 1, "single"), run(spec, 3, on)
    tolerance = 1e-5 if name == "several pieces" else 1e-9  # half of that one is float32
    if name != "used later":  # passes are counted there, and three workers make more of them
        for a, b in zip(alone["parameters"], together[0]["parameters"], strict=True):
            assert (a - b).abs().max() <= tolerance
        assert together[0]["losses"] == pytest.approx(alone["losses"], abs=tolerance)
    for other in together:
        assert all(torch.equal(a, b) for a, b in zip(together[0]["parameters"], other["parameters"], strict=True))
        declared = [[sum(c) for c in zip(*p, strict=True)] for p in zip(*other["traffic"], strict=True)]
        for (sent_B, messages), said in zip(
            zip(other["sent_B"], other["messages"], strict=True), declared, strict=True
        ):
            assert 0 < sent_B <= said[0]
            assert messages == said[1]


def test_no_order_of_workers_changes_a_single_bit():
    spec = problem(batches=(8,) * 4)
    runs = [run(spec, 3, "simulated"), run(spec, 3, "shared"), run(spec, 3, "shared", "sandblaster(backups=0)")]
    runs += [run(spec | {"delays": seed}, 3, "shared") for seed in range(2)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][0]["parameters"], other[0]["parameters"], strict=True))


@pytest.mark.parametrize("on", ["shared", "simulated"])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_that_is_not_finite_stops_all_with_the_parameters_untouched(size, step, on):
    spec = problem(poison=(size - 1, step))
    clean = run(spec | {"poison": None}, size, on)
    for result in run(spec, size, on):
        assert result["raised"][0] == step
        assert torch.equal(result["parameters"][-1], clean[0]["parameters"][step])


def stopped(comm: Communicator) -> list[torch.Tensor]:
    """Six steps in one go, and six of which the last three are taken up by a new worker: what both end in."""
    spec, ends = problem(batches=(8,) * 6), []
    for halts in (False, True):
        model, opt = jobs.build(spec)
        replica, worker = _started(comm, model, opt)
        for i, (x, target) in enumerate(jobs.batches(spec)):
            if halts and i == 3:
                state, parameters = worker.state_dict(), [p.flat.clone() for p in replica.pieces]
                model, opt = jobs.build(spec)
                replica, worker = _started(comm, model, opt)
                comm.barrier()
                for piece, saved in zip(replica.pieces, parameters, strict=True):
                    piece.flat.copy_(saved)
                comm.barrier()
                worker.rebase()
                worker.load_state_dict(state)
            worker.step(Batch(x, target, len(target), len(target)))
        ends.append(jobs.vector(model.parameters()))
        comm.barrier()
    return ends


def _started(comm, model, opt):
    replica = jobs.DataReplica(model, opt, jobs.LOSSES["mean"], comm, common=True, shares=1)
    return replica, strategy_from("sandblaster(history=2)").start(replica, comm)


@pytest.mark.parametrize(("on", "size"), [("single", 1), ("shared", 2)])
def test_a_resume_is_exact(on, size):
    for whole, halted in run_ranks(stopped, size, on=on, timeout_s=30):
        assert torch.equal(whole, halted)


def late(comm: Communicator) -> tuple[int, int, torch.Tensor]:
    """Worker 1 comes to its unit only when worker 0 has done it, and everything else, too."""
    spec = problem(batches=(8,))
    model, opt = jobs.build(spec)
    replica, worker = _started(comm, model, opt)
    board, gradients, take = comm.board(), replica.gradients, worker._units.take

    def slow(batch, ready=None):
        board.wait(1, "for worker 0", rank=0)
        return gradients(batch, ready)

    def taken(units):
        unit = take(units)
        if unit is None:
            board.post(1)
        return unit

    if comm.rank:
        replica.gradients = slow
    else:
        worker._units.take = taken
    ((x, target),) = jobs.batches(spec)
    worker.step(Batch(x, target, len(target), len(target)))
    return worker.done, worker.dropped, jobs.vector(model.parameters())


@pytest.mark.parametrize("on", SHARING)
def test_a_backup_task_counts_and_the_late_result_is_dropped(on):
    (done, dropped, mine), (late_done, late_dropped, _) = run_ranks(late, 2, on=on, timeout_s=30)
    assert (done, dropped) == (8, 0)
    assert (late_done, late_dropped) == (1, 1)
    assert (mine - serial(problem(batches=(8,)))[0]).abs().max() <= 1e-12


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"), [({"units": 0}, "units=0"), ({"history": 0}, "history=0"), ({"backups": -1}, "backups=-1")]
)
def test_options_are_whole_numbers(options, said):
    with pytest.raises(ValueError, match=said):
        Sandblaster(**options)


def test_it_is_refused_without_common_memory_and_with_another_rule():
    def refused(transport: str, shares: bool, stateless: bool, workers: int = 2) -> list[str]:
        setting = Setting(workers, transport, shares_memory=shares, elementwise=True, stateless=stateless)
        return [p.asked for p in Sandblaster().problems(setting)]

    assert refused("shared", True, True) == refused("gloo", False, True, workers=1) == []
    assert refused("gloo", False, True) == ["sandblaster on transport=gloo"]
    assert refused("mpi", False, False)[0] == "sandblaster on transport=mpi"
    (said,) = refused("shared", True, False)
    assert "momentum of its own" in said


def test_it_learns_the_digits_where_the_batch_is_all_data():
    task = mh.Task(
        model="perceptron(hidden=10)", data="digits(limit=200)", optimizer="sgd(lr=0.5)", batch_size=200, steps=20
    )
    result = mh.train(task, mh.Plan(strategy="sandblaster", workers=2, transport="threads", threads=1))
    assert result.summary.train_loss < 0.5


@pytest.mark.parametrize("transport", ["threads", "shared"])
def test_a_checkpoint_holds_the_history(tmp_path, transport):
    def train(steps: int, **options: object) -> list[torch.Tensor]:
        task = mh.Task(
            model="perceptron(hidden=10)", data="digits(limit=60)", optimizer="sgd(lr=0.2)", batch_size=60, steps=steps
        )
        plan = mh.Plan(strategy="sandblaster(history=3)", workers=2, transport=transport, threads=1)
        return [p.detach().clone() for p in mh.train(task, plan, **options).model.parameters()]

    whole = train(8)
    train(5, out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(train(8, out=tmp_path, resume=True), whole, strict=True))
