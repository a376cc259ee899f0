"""Prices of operations, against the formulas of Thakur et al. written out."""

import dataclasses

import pytest

from manyhands.cluster import Figure, load
from manyhands.communication.transports.events import Operation
from manyhands.errors import BadInput
from manyhands.modelling.published import thakur
from manyhands.simulation.prices import Prices

CLUSTER = load("ethernet_10g")
N = 1_000_000


def link(level, users=1):
    found = CLUSTER.link(level)
    return found.latency.si, 1 / found.bandwidth_Bps(users)


def price(name, workers, n=N, ranks=None, cluster=CLUSTER, **more):
    prices = Prices(cluster, workers)
    prices.begin()
    ranks = tuple(range(workers)) if ranks is None else ranks
    return prices(Operation(name, n, len(ranks), ranks, **more))


GAMMA = 3 / CLUSTER.device.memory_bandwidth.si


@pytest.mark.parametrize("n", [8, 4096, 1_000_000])
@pytest.mark.parametrize("workers", [2, 8, 16])
def test_within_a_node_they_are_the_published_formulas(workers, n):
    hop = thakur.Hop(*link("within"), GAMMA)
    assert price("all_reduce", workers, n) == pytest.approx(thakur.all_reduce_s(n, workers, hop))
    scattered = thakur.recursive_halving_reduce_scatter_s(n, workers, hop)
    assert price("reduce_scatter", workers, n) == pytest.approx(scattered)
    assert price("all_gather", workers, n) == pytest.approx(thakur.recursive_doubling_all_gather_s(n, workers, hop))
    assert price("all_to_all", workers, n) == pytest.approx(thakur.pairwise_all_to_all_s(n, workers, hop))
    assert price("broadcast", workers, n) <= thakur.binomial_broadcast_s(n, workers, hop) * (1 + 1e-12)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    assert price("reduce_scatter", 8) + price("all_gather", 8) == pytest.approx(price("all_reduce", 8))


def test_nodes_of_several_devices_are_two_levels():
    (aw, bw), (ab, bb) = link("within"), link("between", users=16)
    inside = 2 * 4 * aw + 15 / 16 * N * (2 * bw + GAMMA)
    part = N / 16
    across = min(2 * (ab + part * (bb + GAMMA)), 4 * ab + 3 / 4 * part * (2 * bb + GAMMA))
    assert price("all_reduce", 64) == pytest.approx(inside + across)


def test_one_rank_a_node_is_one_level():
    a, b = link("between")
    assert price("all_gather", 64, ranks=(0, 16, 32, 48)) == pytest.approx(2 * a + 3 / 4 * N * b)


def test_messages_go_by_the_link_between_their_ends():
    for ranks, level in (((0, 1), "within"), ((0, 16), "between")):
        a, b = link(level)
        assert price("send", 32, ranks=ranks) == pytest.approx(a + N * b)


def test_an_all_gather_of_one_copy_is_a_barrier():
    assert price("all_gather", 8, common=True) == price("barrier", 8, n=0) == pytest.approx(3 * link("within")[0])


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier"])
def test_prices_grow_with_bytes_and_ranks(name):
    more = [price(name, 2**k, n=10**6) for k in range(1, 8)]
    assert more == sorted(more)
    assert price(name, 32, n=10) <= price(name, 32, n=10**7)


def test_looking_is_free_and_so_is_one_worker_and_setting_up():
    prices = Prices(CLUSTER, 8)
    operation = Operation("all_reduce", N, 8, tuple(range(8)))
    assert prices(operation) == 0
    prices.begin()
    assert prices(operation) > 0
    assert prices(operation._replace(purpose="consensus")) == 0
    assert price("all_reduce", 1) == 0


def test_a_link_that_is_not_described_is_asked_for():
    laptop = load("laptop")
    assert price("all_reduce", 2, cluster=laptop) > 0
    with pytest.raises(BadInput, match="no link 'between'"):
        Prices(laptop, 3)


def test_more_workers_than_the_cluster_has_are_refused():
    small = dataclasses.replace(CLUSTER, nodes=Figure(2, "count", "by definition"))
    with pytest.raises(BadInput, match="32 workers at most"):
        Prices(small, 33)
