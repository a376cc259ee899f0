"""Runs without numbers: closed forms, and three ways to run that give the same times."""

import itertools

import numpy as np
import pytest
import torch

from manyhands.communication.topology import shares
from manyhands.consistency import strategies
from manyhands.errors import BadInput, PeerLost, WorkerFailed
from manyhands.simulation import sizes
from manyhands.simulation.ranks import SizedWorld
from manyhands.simulation.sizes import turns
from manyhands.training.sampler import Sampler
from tests.simulation.runs import COMPUTE_S, UPDATE_S, Flat, sized, threads

LATE = ("lognormal(sigma=0.4)", "slow(workers=1, factor=2)")
#: Some of them compute with what they exchange.
LOOKS = {"sandblaster"}


def test_steps_are_cut_as_training_cuts_them():
    mine = list(turns(10, 4, epochs=2, steps=None))
    theirs = Sampler(10, batch_size=4, seed=0).batches(epochs=2)
    assert mine == [(share.before.step, share.global_count) for share in theirs]


def test_one_worker_takes_the_sum_of_its_parts():
    found = sizes.run(sized("synchronous", 1, late=("lognormal",)), lambda: Flat(99.0)).clocks
    assert found.last == pytest.approx([found.compute_s + found.update_s])
    assert found.communicate_s == 0
    assert found.update_s == pytest.approx(12 * UPDATE_S)


def test_without_communication_and_stragglers_nobody_waits():
    found = sizes.run(sized("synchronous(update='replicated')", 16), Flat)
    assert found.how == "folded"
    assert found.clocks.last == pytest.approx([12 * (COMPUTE_S + UPDATE_S)] * 16)
    assert found.clocks.wait_s == [0.0] * 16


def test_lock_step_waits_for_the_largest_of_exponential_times():
    """E[max of P] = H_P · mean."""
    workers, steps = 8, 4000
    what = sized("synchronous(update='replicated')", workers, late=("exponential",), steps=steps, update_s=0.0)
    times = np.array(sizes.run(what, Flat).clocks.step_s)
    expected = COMPUTE_S * sum(1 / k for k in range(1, workers + 1))
    assert times.mean() == pytest.approx(expected, abs=4 * times.std() / steps**0.5)


def test_lock_step_is_the_max_plus_recurrence():
    what = sized("synchronous(update='replicated')", 5, late=LATE)
    rows = itertools.islice(what.delays.rows(), 12)
    expected = sum(max(COMPUTE_S * row) + 0.002 + UPDATE_S for row in rows)
    assert sizes.run(what, lambda: Flat(0.002)).clocks.last == pytest.approx([expected] * 5, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "synchronous(update='sharded')",
        "synchronous(update='replicated')",
        "local(every=4)",
        "slice_update",
        "diloco(inner=3)",
        "local(every=4, compress=int8)",
    ],
)
def test_one_rank_for_all_has_the_clocks_of_each_by_itself(text):
    what, price = sized(text, 4, late=LATE, batch=30), lambda: Flat(0.002)
    folded, each = sizes.run(what, price), sizes._by_rank(what, price(), None)
    assert (folded.how, each.how) == ("vectors", "ranks")
    assert folded.clocks.last == pytest.approx(each.clocks.last, rel=1e-12)
    assert folded.clocks.ends == pytest.approx(each.clocks.ends, rel=1e-12)
    assert folded.clocks.wait_s == pytest.approx(each.clocks.wait_s, rel=1e-9, abs=1e-12)
    assert folded.clocks.sent_B == each.clocks.sent_B


@pytest.mark.parametrize(
    "text", ["ssp(staleness=2, servers=2)", "asynchronous", "gossip", "hogwild(lock='round_robin')"]
)
def test_greenlets_keep_the_times_of_threads(text):
    what = sized(text, 5, late=LATE)
    last, ends = threads(what, Flat(0.002))
    found = sizes.run(what, lambda: Flat(0.002))
    assert found.how == "ranks"
    assert found.clocks.last == last
    assert found.clocks.ends == ends


def test_the_same_seed_gives_the_same_times():
    first, same, other = (
        sizes.run(sized("ssp", 6, late=LATE, seed=seed), lambda: Flat(0.001)).clocks for seed in (3, 3, 4)
    )
    assert first == same != other


def test_ssp_without_staleness_keeps_lock_step():
    """Updates of a step are read by nobody before all have read for it, and by all before the next one."""
    what = sized("ssp(staleness=0, servers=1)", 4, late=LATE)
    last = sizes.run(what, Flat).clocks.last
    synchronous = sizes.run(sized("synchronous(update='replicated')", 4, late=LATE), Flat).clocks.last
    assert max(last) == pytest.approx(max(synchronous), rel=1e-12)


def test_ssp_with_endless_staleness_waits_for_nobody():
    late = ("lognormal(sigma=1.0)",)
    found = sizes.run(sized("ssp(staleness=1000, servers=1)", 4, late=late), Flat).clocks
    alone = sizes.run(sized("hogwild", 4, late=late), Flat).clocks
    assert found.wait_s == pytest.approx([0.0] * 4, abs=1e-12)
    assert sorted(found.last) == pytest.approx(sorted(alone.last))


def test_staleness_lies_within_its_bound_and_a_looser_one_is_faster():
    found = [sizes.run(sized(f"ssp(staleness={s}, servers=1)", 8, late=LATE, steps=40), Flat).clocks for s in (0, 2, 5)]
    for bound, clocks in zip((0, 2, 5), found, strict=True):
        assert max(clocks.staleness) <= bound
    assert [max(c.last) for c in found] == sorted((max(c.last) for c in found), reverse=True)


def test_a_server_is_a_queue():
    """Poisson arrivals, one service time: Lindley's recursion exactly, and M/D/1's mean wait ρS/2(1−ρ) within 10 %."""
    ranks, service, load = 3000, 0.01, 0.6
    gaps = np.random.default_rng(5).exponential(service / load, ranks)
    arrivals = np.cumsum(gaps)
    price = Flat(service)
    price.begin()

    def rank(comm):
        comm.elapse(float(arrivals[comm.rank]))
        comm.access("push", torch.zeros(1))
        return comm.counters.wait_s

    waits = SizedWorld(ranks, price, queue=price.queue).run(rank)
    expected, wait = [], 0.0
    for gap in gaps:
        wait = max(0.0, wait + (service if expected else 0.0) - gap)
        expected.append(wait)
    assert waits == pytest.approx(expected, abs=1e-9)
    assert np.mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)


def test_a_rank_that_fails_ends_those_that_have_asked():
    price = Flat(0.01)
    price.begin()
    ended = []

    def rank(comm):
        comm.elapse(1.0 + comm.rank)
        try:
            comm.access("push", torch.zeros(1))
            if comm.rank == 1:
                raise ValueError("of its own")
            comm.access("pull", torch.zeros(1))
            comm.barrier()
        except PeerLost:
            ended.append(comm.rank)
            raise

    with pytest.raises(WorkerFailed, match="worker 1 failed: ValueError: of its own"):
        SizedWorld(4, price, queue=price.queue).run(rank)
    assert ended == [0, 2, 3]


@pytest.mark.parametrize("name", [name for name in strategies if name not in LOOKS])
def test_every_strategy_runs_without_numbers(name):
    what = sized(name, 6, late=("lognormal",), steps=20)
    found = sizes.run(what, lambda: Flat(0.001))
    assert len(found.clocks.ends) == found.steps == 20
    assert found.clocks.ends == sorted(found.clocks.ends)
    assert max(found.clocks.last) >= found.clocks.compute_s
    if not what.strategy.sends_at_most and what.strategy.parameters != "common":
        assert found.clocks.sent_B == what.strategy.traffic(what.pieces[0].numel, 6).sent_B_in(20)


@pytest.mark.parametrize("name", sorted(LOOKS))
def test_one_that_looks_at_numbers_says_so(name):
    with pytest.raises(BadInput, match="depends on numbers"):
        sizes.run(sized(name, 2), Flat)


def test_uneven_shares_take_their_time():
    what = sized("synchronous(update='replicated')", 3, late=("slow(workers=3, factor=1)",), batch=10, update_s=0.0)
    found = sizes.run(what, Flat).clocks
    most = shares(10, 3)[0][1]
    assert found.step_s == pytest.approx([COMPUTE_S * most / (10 / 3)] * 12)
    assert found.wait_s == pytest.approx([0.0, *([12 * COMPUTE_S * 3 / 10] * 2)])
