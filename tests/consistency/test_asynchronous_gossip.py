"""Asynchronous gossip: what it conserves while workers race, and that it is the naive loop where they take turns."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.consistency.asynchronous_gossip import AsynchronousGossip, average_pair_, partner
from manyhands.contract import Setting
from manyhands.plan import strategy_from
from manyhands.testing import run_ranks
from tests.consistency.test_gossip import started

ON = ("threads", "shared", pytest.param("mpi", marks=pytest.mark.slow))
TEXTS = (
    "asynchronous_gossip",
    "asynchronous_gossip(graph='ring')",
    "asynchronous_gossip(graph='random_regular', degree=2, every=2, seed=3)",
)
ROUNDING = 1e-12  # float64, numbers of order 1, some hundred sums


# -- pure functions ----------------------------------------------------------------------------------------------------


@given(own=st.floats(-9, 9), other=st.floats(-9, 9), delta=st.floats(-9, 9))
def test_a_pair_conserves_its_sum_but_for_the_update(own, other, delta):
    x, y, d = (torch.tensor([v], dtype=torch.float64) for v in (own, other, delta))
    average_pair_(x, y, d)
    assert float(y) == pytest.approx((own + other) / 2, abs=1e-14)
    assert float(x + y) == pytest.approx(own + other + delta, abs=1e-14)


def test_partners_are_drawn_alike_on_every_run_and_from_all_neighbours_equally_often():
    drawn = [partner((1, 4, 7), 2, exchange, seed=0) for exchange in range(3000)]
    assert drawn == [partner((1, 4, 7), 2, exchange, seed=0) for exchange in range(3000)]
    assert drawn != [partner((1, 4, 7), 2, exchange, seed=1) for exchange in range(3000)]
    assert all(900 < count < 1100 for count in Counter(drawn).values())  # four standard deviations


# -- taking turns ------------------------------------------------------------------------------------------------------


def in_turns(comm, text, rounds, lr=0.05):
    """Each worker does a whole step while the others wait."""
    worker, flat, batch = started(comm, text, lr=lr)
    start = flat.clone()
    worker._publish()
    for _ in range(rounds):
        for rank in range(comm.size):
            if rank == comm.rank:
                worker.step(batch)
            comm.barrier()
    consensus = worker.consensus()[0]
    return {"start": start, "end": flat.clone(), "x": batch.inputs, "y": batch.target, "consensus": consensus}


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("text", TEXTS)
def test_workers_that_take_turns_are_the_naive_loop(text, on):
    results = run_ranks(in_turns, 4, on=on, args=(text, 5))
    strategy = strategy_from(text)
    graph = strategy.rounds(4)[0]
    thetas = [r["start"].clone() for r in results]
    model = nn.Linear(8, 3).double()
    for step in range(1, 6):
        for p, result in enumerate(results):
            nn.utils.vector_to_parameters(thetas[p].clone(), model.parameters())
            model.zero_grad()
            nn.functional.mse_loss(model(result["x"]), result["y"]).backward()
            delta = -0.05 * nn.utils.parameters_to_vector([q.grad for q in model.parameters()])
            if step % strategy.every == 0:
                q = partner(graph.receivers(p), p, step // strategy.every, strategy.seed)
                mean = (thetas[p] + thetas[q]) / 2
                thetas[p], thetas[q] = mean.clone(), mean
            thetas[p] = thetas[p] + delta
    for result, theta in zip(results, thetas, strict=True):
        assert (result["end"] - theta).abs().max() <= ROUNDING
        assert (result["consensus"] - torch.stack(thetas).mean(0)).abs().max() <= ROUNDING


# -- racing ------------------------------------------------------------------------------------------------------------


def racing(comm, text, steps, lr):
    worker, flat, batch = started(comm, text, lr=lr)
    start = flat.clone()
    sent_B = comm.counters.sent_B("step")
    for _ in range(steps):
        worker.step(batch)
    worker.meet()
    sent_B = comm.counters.sent_B("step") - sent_B
    consensus = worker.consensus()[0]
    own = flat.clone()
    saved = worker.state_dict()
    worker.finish()
    return {
        "start": start,
        "own": own,
        "saved": saved["parameters"][0],
        "consensus": consensus,
        "final": flat.clone(),
        "sent_B": sent_B,
        "numel": flat.numel(),
    }


def disagreement(results, which):
    rows = torch.stack([r[which] for r in results])
    return float((rows - rows.mean(0)).norm())


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("text", TEXTS[:2])
def test_without_gradients_no_exchange_is_lost_and_disagreement_shrinks_however_they_race(text, size, on):
    results = run_ranks(racing, size, on=on, args=(text, 100, 0.0))
    mean = torch.stack([r["start"] for r in results]).mean(0)
    for r in results:
        assert (r["consensus"] - mean).abs().max() <= ROUNDING
        assert torch.equal(r["final"], r["consensus"])
    assert disagreement(results, "own") < disagreement(results, "start")


@pytest.mark.parametrize("text", TEXTS)
def test_without_gradients_workers_that_take_turns_tend_to_the_mean(text):
    results = run_ranks(in_turns, 4, on="threads", args=(text, 60, 0.0))
    assert disagreement(results, "end") <= 1e-6 * disagreement(results, "start")


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("text", TEXTS)
def test_an_exchange_costs_two_vectors_and_what_is_saved_is_what_neighbours_left(text, on):
    every = 2 if "every=2" in text else 1
    for r in run_ranks(racing, 4, on=on, args=(text, 20, 0.05)):
        assert r["sent_B"] == 20 // every * 2 * 8 * r["numel"]
        assert torch.equal(r["saved"], r["own"])


# -- what is refused ---------------------------------------------------------------------------------------------------


def setting(workers, *, shared):
    return Setting(
        workers=workers,
        transport="shared" if shared else "gloo",
        shares_memory=shared,
        elementwise=True,
        stateless=True,
    )


def test_without_common_memory_it_is_refused_with_what_would_work():
    (found,) = AsynchronousGossip().problems(setting(2, shared=False))
    assert "gossip(graph='matching')" in found.cure
    assert not AsynchronousGossip().problems(setting(1, shared=False))
    assert not AsynchronousGossip().problems(setting(2, shared=True))


def test_one_way_graphs_and_bad_options_are_refused():
    with pytest.raises(ValueError, match="complete, ring, torus or random_regular"):
        AsynchronousGossip(graph="one_peer")
    with pytest.raises(ValueError, match="whole number from 1"):
        AsynchronousGossip(every=0)
    (found,) = AsynchronousGossip("random_regular", degree=3).problems(setting(5, shared=True))
    assert "an edge has two" in found.rule
