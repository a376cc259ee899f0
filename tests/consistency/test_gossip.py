"""Gossip and push-sum: what they conserve and tend to, against naive loops over P models that use torch alone."""

import math

import pytest
import torch
from torch import nn

from manyhands.communication import graphs
from manyhands.communication.topology import Mesh
from manyhands.consistency.gossip import Gossip
from manyhands.consistency.push_sum import PushSum, PushSumWorker
from manyhands.contract import Batch, Setting
from manyhands.errors import BadInput, NonFiniteLoss
from manyhands.partition.data import DataReplica
from manyhands.plan import strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.matrices import halved

#: float64 rounds at 1.1e-16; a few exchanges and steps of numbers of order 1.
ROUNDING = 1e-12
GOSSIPS = (
    "gossip",
    "gossip(graph='torus')",
    "gossip(graph='exponential')",
    "gossip(graph='complete')",
    "gossip(graph='random_regular', degree=2, seed=3)",
    "gossip(graph='one_peer')",
    "gossip(graph='matching', seed=5)",
    "gossip(graph='one_peer', every=2)",
)
PUSHES = (
    "push_sum",
    "push_sum(graph='exponential')",
    "push_sum(graph='directed_ring', every=2)",
    "push_sum(graph='random_directed', degree=2, seed=1)",
    "push_sum(graph='random_directed', every=2)",
)


def run(text, on, size, spec):
    return run_ranks(jobs.train, size, on=on, args=(text, spec))


# -- naive references --------------------------------------------------------------------------------------------------


def by_hand(graph, size, k):
    """W of exchange k, from 0, written out: column p is where p's vector goes."""
    w = torch.zeros(size, size, dtype=torch.float64)
    powers = [2**i for i in range(math.ceil(math.log2(size)))]
    for p in range(size):
        hops = {
            "ring": {1, -1},
            "directed_ring": {1},
            "exponential": set(powers),
            "complete": set(range(size)),
            "one_peer": {powers[k % len(powers)]},
        }[graph]
        to = {(p + hop) % size for hop in hops} | {p}
        for q in to:
            w[q, p] = 1 / len(to)
    return w


def matrix(strategy, size, k):
    try:
        return by_hand(strategy.graph, size, k)
    except KeyError:  # random, or a torus: tests/communication/test_graphs.py has those
        rounds = strategy.rounds(size)
        return rounds[k % len(rounds)].matrix()


def spread(models):
    return torch.stack([jobs.vector(model.parameters()) for model in models])


def put(models, rows):
    with torch.no_grad():
        for model, row in zip(models, rows, strict=True):
            nn.utils.vector_to_parameters(row.clone(), model.parameters())


def naive_steps(spec, size):
    """P models with an optimizer each; yields after every local step, with the batch's number from 1."""
    replicas = jobs.naive_replicas(spec, size)
    for step, (inputs, target) in enumerate(jobs.batches(spec), 1):
        before = spread(model for model, _ in replicas)
        for (model, opt), (lo, hi) in zip(replicas, jobs.cut(len(target), size, spec["shares"]), strict=True):
            if lo < hi:
                jobs.gradients_of_share(model, jobs.rows(inputs, lo, hi), target[lo:hi], spec)
                opt.step()
        yield step, [model for model, _ in replicas], before


def naive_gossip(strategy, spec, size):
    result = []
    for step, models, _ in naive_steps(spec, size):
        if step % strategy.every == 0:
            put(models, matrix(strategy, size, step // strategy.every - 1) @ spread(models))
        result.append(spread(models))
    return result, ones(size)


def naive_push_sum(strategy, spec, size):
    """Algorithm 1 of Assran et al. with x kept: gradients at z = x / w move x."""
    result, x, w = [], None, ones(size)
    for step, models, before in naive_steps(spec, size):
        x = (before if x is None else x) + (spread(models) - before)
        if step % strategy.every == 0:
            a = matrix(strategy, size, step // strategy.every - 1)
            x, w = a @ x, a @ w
        put(models, x / w[:, None])
        result.append(spread(models))
    return result, w


def naive_cases():
    more = (("even", "sgd"), ("even", "momentum"), ("uneven", "adam"))
    yield from halved(GOSSIPS + PUSHES, [("uneven", "sgd"), ("uneven", "momentum"), ("even", "adam")])
    yield from (pytest.param(text, *case, marks=pytest.mark.slow) for text in GOSSIPS + PUSHES for case in more)


def ones(size):
    return torch.ones(size, dtype=torch.float64)


@pytest.mark.parametrize(("text", "shares", "optimizer"), list(naive_cases()))
def test_it_is_the_naive_loop_over_p_models(text, shares, optimizer):
    spec = problem(optimizer=optimizer, shares=shares, batches=(8, 8, 5, 8, 8))
    strategy = strategy_from(text)
    naive = naive_gossip if isinstance(strategy, Gossip) else naive_push_sum
    with jobs.one_thread():
        expected, weights = naive(strategy, spec, 4)
    results = run(text, "simulated", 4, spec)
    for rank, result in enumerate(results):
        for mine, theirs in zip(result["parameters"][1:], expected, strict=True):
            assert (mine - theirs[rank]).abs().max() <= ROUNDING
        mean = (expected[-1] * weights[:, None]).sum(0) / weights.sum()
        assert (result["consensus"] - mean).abs().max() <= ROUNDING


@pytest.mark.parametrize("text", [*GOSSIPS[:2], GOSSIPS[4], PUSHES[3]])
def test_on_shared_memory_each_worker_has_the_bits_that_it_has_in_virtual_time(text):
    spec = problem(optimizer="nesterov", shares="uneven", batches=(8,) * 5)
    a, b = run(text, "simulated", 4, spec), run(text, "shared", 4, spec | {"delays": 1})
    for mine, theirs in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine["parameters"], theirs["parameters"], strict=True))


@pytest.mark.parametrize("on", ["threads", "gloo", pytest.param("mpi", marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", ["gossip(graph='exponential', every=2)", PUSHES[3]])
def test_other_transports_carry_the_same_bits(text, on):
    """Sums are made here, in rank order, not by the transport."""
    spec = problem(batches=(8,) * 4)
    for mine, theirs in zip(run(text, "simulated", 4, spec), run(text, on, 4, spec), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine["parameters"], theirs["parameters"], strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_on_a_complete_graph_plain_sgd_is_that_of_one_worker(size):
    spec = problem(batches=(8, 8, 8, 8))
    results = run("gossip(graph='complete')", "simulated", size, spec)
    with jobs.one_thread():
        alone, averaged = jobs.plain(spec)["parameters"], jobs.naive_parameter_average(spec, size)
    for result in results:
        for mine, one, local in zip(result["parameters"][1:], alone, averaged, strict=True):
            assert (mine - one).abs().max() <= ROUNDING
            assert (mine - local).abs().max() <= ROUNDING


def test_push_sum_whose_weights_stay_1_is_gossip():
    spec = problem(optimizer="momentum", batches=(8,) * 5)
    pushed, gossiped = (run(f"{name}(graph='one_peer')", "simulated", 4, spec) for name in ("push_sum", "gossip"))
    for a, b in zip(pushed, gossiped, strict=True):
        assert torch.equal(a["parameters"][-1], b["parameters"][-1])


# -- without gradients -------------------------------------------------------------------------------------------------


def started(comm, text, *, lr=0.0, seed=0):
    """A worker of a small linear model, with parameters of its own; and a batch."""
    comm.mesh = Mesh(data=comm.size)
    model = nn.Linear(8, 3).double()
    replica = DataReplica(model, torch.optim.SGD(model.parameters(), lr=lr), nn.MSELoss(), comm, common=False)
    worker = strategy_from(text).start(replica, comm)
    generator = torch.Generator().manual_seed(100 * seed + comm.rank)
    flat = replica.pieces[0].flat
    flat.copy_(torch.randn(flat.numel(), generator=generator, dtype=torch.float64))
    x, y = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (8, 3))
    return worker, flat, Batch(x, y, 5)


def standing(comm, text, steps):
    worker, flat, batch = started(comm, text)
    seen, weights = [flat.clone()], [1.0]
    for _ in range(steps):
        worker.step(batch)
        seen.append(flat.clone())
        weights.append(worker.weights[0] if isinstance(worker, PushSumWorker) else 1.0)
    consensus = worker.consensus()[0]
    comm.barrier()
    return {"seen": torch.stack(seen), "weights": weights, "consensus": consensus}


@pytest.mark.parametrize("size", [3, 8, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 5))])
@pytest.mark.parametrize("text", GOSSIPS + PUSHES)
def test_without_gradients_all_tend_to_the_mean_and_the_mean_is_conserved(text, size):
    strategy = strategy_from(text)
    if graphs.objection(strategy.graph, size, strategy.degree) is not None:
        pytest.skip("there is no such graph")
    rounds = strategy.rounds(size)
    gap = graphs.spectral_gap(rounds)
    periods = 2 if gap > 1 - 1e-9 else math.ceil(math.log(1e-4) / math.log(1 - gap))
    results = run_ranks(standing, size, on="simulated", args=(text, periods * len(rounds) * strategy.every))
    z = torch.stack([r["seen"] for r in results])  # rank, step, element
    w = torch.tensor([r["weights"] for r in results], dtype=torch.float64)
    mean = z[:, 0].mean(0)
    sums = (z * w[:, :, None]).sum(0)
    assert (sums / size - mean).abs().max() <= ROUNDING
    assert (w.sum(0) - size).abs().max() <= ROUNDING
    distance = (z - mean).norm(dim=(0, 2))
    assert distance[-1] <= 1e-2 * distance[0]
    for result in results:
        assert (result["consensus"] - mean).abs().max() <= ROUNDING


@pytest.mark.parametrize("size", [2, 4, 8])
def test_one_peer_agrees_exactly_after_log2_p_exchanges(size):
    results = run_ranks(standing, size, on="simulated", args=("gossip(graph='one_peer')", int(math.log2(size))))
    z = torch.stack([r["seen"] for r in results])
    assert (z[:, -1] - z[:, 0].mean(0)).abs().max() <= 1e-14


def test_where_ranks_hear_from_different_numbers_weights_move_and_x_alone_would_not_agree():
    results = run_ranks(standing, 5, on="simulated", args=("push_sum(graph='random_directed')", 60))
    w = torch.tensor([r["weights"][-1] for r in results])
    assert (w - 1).abs().max() > 0.1
    z = torch.stack([r["seen"][-1] for r in results])
    assert (z - z[0]).abs().max() <= 1e-9
    assert (z * w[:, None] - z[0] * w[0]).abs().max() > 1e-2


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "d"), [("gossip", 2), ("gossip(graph='complete')", 4), ("gossip(graph='one_peer')", 1)]
)
@pytest.mark.parametrize("every", [1, 3])
def test_an_exchange_costs_the_graphs_degree_times_the_parameters(text, d, every):
    strategy = Gossip(strategy_from(text).graph, every=every)
    traffic = strategy.traffic(1000, 5)
    assert [traffic.sent_B_in(1, after=t) for t in range(6)] == [
        4000 * d if (t + 1) % every == 0 else 0 for t in range(6)
    ]
    assert traffic.messages_in(6) == 6 // every * d
    result = run(str(strategy), "simulated", 5, problem(dtype="float32", batches=(8,) * 6))[2]
    assert result["sent_B"] == [sum(B for B, _ in step) for step in zip(*result["traffic"], strict=True)]
    assert sum(result["sent_B"]) == 6 // every * d * 4 * len(result["final"])


# -- a resume ----------------------------------------------------------------------------------------------------------


def resumed(comm, text, stop, steps):
    """Parameters after ``steps``, in one go, and by a worker that took over after ``stop``."""
    whole, flat, batch = started(comm, text, lr=0.05)
    saved = None
    for step in range(steps):
        if step == stop:
            saved = whole.state_dict()
        whole.step(batch)
    end = flat.clone()
    again, flat, batch = started(comm, text, lr=0.05)
    flat.fill_(7.0)
    again.load_state_dict(saved)
    for _ in range(stop, steps):
        again.step(batch)
    comm.barrier()
    return torch.equal(end, flat), torch.equal(whole.consensus()[0], again.consensus()[0])


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("text", GOSSIPS + PUSHES)
def test_a_resume_is_exact_wherever_in_the_period_it_is(text, stop):
    assert run_ranks(resumed, 4, on="simulated", args=(text, stop, 9)) == [(True, True)] * 4


# -- a loss that is not finite -----------------------------------------------------------------------------------------


def poisoned(comm, text, when, steps):
    """In which step this rank was told, of which step and rank, and whether what it holds is finite."""
    worker, flat, batch = started(comm, text, lr=0.05)
    for step in range(steps):
        comm.step = step
        bad = comm.rank == 1 and step == when
        try:
            worker.step(Batch(batch.inputs * math.nan if bad else batch.inputs, batch.target, batch.count))
        except NonFiniteLoss as e:
            return [step, e.step, e.rank, bool(flat.isfinite().all())]
    return [None, None, None, bool(flat.isfinite().all())]


@pytest.mark.parametrize("on", ["simulated", "shared"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gossip(graph='complete')", 2),
        ("gossip", 3),  # a ring of five is two wide
        ("gossip(every=3)", 5),
        ("push_sum(graph='directed_ring')", 5),
    ],
)
def test_news_of_a_worker_that_stands_still_travel_with_the_messages_and_all_stop_at_once(text, told, on):
    assert run_ranks(poisoned, 5, on=on, args=(text, 2, 20)) == [[told, 2, 1, True]] * 5


def poisoned_where_one_knows_of_a_loss(comm, text, knows):
    """Before which step this rank was told that rank 1 stands still from step 2 on; all meet before step 8."""
    worker, _, batch = started(comm, text, lr=0.05)
    if comm.rank == knows:
        comm.lost = lambda: [comm.size - 1]
    for step in range(20):
        bad = comm.rank == 1 and step == 2
        try:
            if step == 8:
                worker.meet()
            worker.step(Batch(batch.inputs * math.nan if bad else batch.inputs, batch.target, batch.count))
        except NonFiniteLoss:
            return step
    return None


@pytest.mark.parametrize(
    ("text", "size"), [("gossip", 3), ("push_sum(graph='exponential')", 3), ("gossip(graph='complete')", 5)]
)
@pytest.mark.parametrize(("knows", "told"), [(1, 8), (2, 2)])
def test_whether_news_wait_for_the_meeting_is_decided_by_what_was_exchanged(text, size, knows, told):
    """A launcher's word that falls while they exchange is known to some and not to others, who decide alike.

    Promised where all are neighbours; in wider graphs the file's head names the gap that is left.
    """
    results = run_ranks(poisoned_where_one_knows_of_a_loss, size, on="simulated", args=(text, knows))
    assert results == [told] * size


# -- what is refused ---------------------------------------------------------------------------------------------------


def setting(workers):
    return Setting(workers=workers, transport="shared", shares_memory=True, elementwise=True, stateless=True)


@pytest.mark.parametrize(
    ("strategy", "workers", "rule"),
    [
        (Gossip("torus"), 5, "prime"),
        (Gossip("matching"), 3, "pairs"),
        (Gossip("random_regular", degree=4), 4, "3 others"),
        (Gossip("random_regular", degree=3), 7, "an edge has two"),
        (Gossip("random_regular", degree=1), 4, "never hear"),
        (PushSum("random_directed", degree=4), 3, "2 others"),
    ],
)
def test_a_graph_that_there_is_not_is_refused_when_the_plan_is_made(strategy, workers, rule):
    (found,) = strategy.problems(setting(workers))
    assert rule in found.rule
    assert str(strategy) in found.asked
    assert found.cure.startswith("Use ")
    assert not strategy.problems(setting(1))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"every": 0}, "a whole number from 1"),
        ({"every": 1.5}, "a whole number from 1"),
        ({"every": True}, "a whole number from 1"),
        ({"seed": -1}, "a whole number from 0"),
        ({"degree": 0, "graph": "random_regular"}, "a whole number from 1"),
        ({"degree": 2, "graph": "ring"}, "a degree of its own"),
        ({"graph": "star"}, "it is ring, torus, exponential, complete, random_regular, one_peer or matching"),
        ({"graph": "random_directed"}, "it is ring"),
    ],
)
def test_an_option_outside_its_range_is_refused_with_the_range(options, rule):
    with pytest.raises(ValueError, match=rule):
        Gossip(**options)


def test_what_prints_parses():
    for text in GOSSIPS + PUSHES:
        assert str(strategy_from(text)) == text
    with pytest.raises(BadInput):
        strategy_from("gossip(every=0)")
