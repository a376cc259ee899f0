"""Graphs: what mathematics promises of their mixing matrices, against numpy and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.communication import graphs
from manyhands.communication.graphs import GRAPHS, Mixing, build, connected, metropolis, objection, reach, spectral_gap
from manyhands.errors import BadInput

ONE_WAY = ("random_directed",)
DOUBLY = tuple(name for name in GRAPHS if name not in ONE_WAY)
sizes = st.integers(1, 17)
FEW_EACH = settings(max_examples=30)  # of each graph
#: Sums of at most 17 shares that round at 1.1e-16.
ROUNDING = 1e-14


def exists(name, size, degree=None):
    return objection(name, size, degree) is None


def ones(size):
    return torch.ones(size, dtype=torch.float64)


# -- mixing matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@FEW_EACH
@given(size=sizes, seed=st.integers(0, 99))
def test_columns_add_up_to_1_so_that_the_sum_is_conserved(name, size, seed):
    if not exists(name, size):
        return
    for mixing in build(name, size, None, seed):
        w = mixing.matrix()
        assert (w >= 0).all()
        assert (w.sum(0) - ones(size)).abs().max() <= ROUNDING


@pytest.mark.parametrize("name", DOUBLY)
@FEW_EACH
@given(size=sizes, seed=st.integers(0, 99))
def test_rows_add_up_to_1_so_that_what_is_equal_stays_so(name, size, seed):
    if not exists(name, size):
        return
    for mixing in build(name, size, None, seed):
        assert (mixing.matrix().sum(1) - ones(size)).abs().max() <= ROUNDING


@pytest.mark.parametrize("name", ONE_WAY)
def test_one_way_graphs_have_rows_that_do_not(name):
    assert (build(name, 9)[0].matrix().sum(1) - ones(9)).abs().max() > 0.1


@given(size=st.integers(2, 12), data=st.data())
def test_metropolis_weights_are_doubly_stochastic_and_symmetric_on_any_graph(size, data):
    pairs = [(p, q) for p in range(size) for q in range(p)]
    edges = data.draw(st.sets(st.sampled_from(pairs)))
    near = [{q for q in range(size) if (p, q) in edges or (q, p) in edges} for p in range(size)]
    w = metropolis(near).matrix()
    assert torch.equal(w, w.T)
    assert (w.diagonal() > 0).all()
    assert (w.sum(0) - ones(size)).abs().max() <= ROUNDING


def test_metropolis_weights_of_a_path_are_those_of_the_paper():
    w = metropolis([{1}, {0, 2}, {1}]).matrix() * 3
    torch.testing.assert_close(w, torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64))


def test_metropolis_weights_of_edges_that_lead_one_way_are_refused():
    with pytest.raises(ValueError, match="rank 0"):
        metropolis([{1}, set()])


# -- who exchanges with whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@FEW_EACH
@given(size=st.integers(2, 17), seed=st.integers(0, 99))
def test_every_rank_sends_to_equally_many_in_every_round(name, size, seed):
    if exists(name, size):
        graph = build(name, size, None, seed)
        assert len({len(mixing.receivers(p)) for mixing in graph for p in range(size)}) == 1


@pytest.mark.parametrize("name", GRAPHS)
@FEW_EACH
@given(size=sizes, seed=st.integers(0, 99))
def test_every_graph_connects_its_ranks(name, size, seed):
    if exists(name, size):
        graph = build(name, size, None, seed)
        assert connected(graph)
        assert (spectral_gap(graph) > 1e-3) or size == 1


@given(size=st.integers(3, 17), degree=st.integers(2, 16), seed=st.integers(0, 999))
def test_a_random_regular_graph_is_simple_connected_and_of_its_degree(size, degree, seed):
    if not exists("random_regular", size, degree):
        return
    graph = graphs.random_regular(size, degree, seed)
    w = graph[0].matrix()
    assert ((w > 0).sum(0) == degree + 1).all()
    assert torch.equal(w, w.T)
    assert connected(graph)
    assert graph == graphs.random_regular(size, degree, seed)


@pytest.mark.parametrize("name", ["random_regular", "random_directed", "matching"])
def test_a_seed_draws_one_graph_and_another_seed_another(name):
    drawn = [build(name, 16, None, seed) for seed in range(4)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    graphs.build.cache_clear()
    assert drawn == [build(name, 16, None, seed) for seed in range(4)]


@pytest.mark.parametrize("size", range(2, 18, 2))
@pytest.mark.parametrize("seed", [0, 7])
def test_in_a_period_of_matchings_every_two_ranks_meet_exactly_once(size, seed):
    met = []
    for mixing in build("matching", size, None, seed):
        pairs = {(p, *mixing.receivers(p)) for p in range(size)}
        assert pairs == {(q, p) for p, q in pairs}
        met += [pair for pair in pairs if pair[0] < pair[1]]
    assert sorted(met) == [(p, q) for p in range(size) for q in range(p + 1, size)]


def test_graphs_look_as_they_are_drawn():
    assert [build("ring", 5)[0].receivers(p) for p in (0, 2)] == [(1, 4), (1, 3)]
    assert build("torus", 12)[0].receivers(5) == (1, 4, 6, 9)  # 3 × 4
    assert build("exponential", 6)[0].receivers(3) == (1, 4, 5)
    assert [mixing.receivers(3) for mixing in build("one_peer", 6)] == [(4,), (5,), (1,)]
    assert build("directed_ring", 4)[0].receivers(3) == (0,)
    assert build("complete", 3)[0].receivers(1) == (0, 2)
    assert build("directed_ring", 4)[0].taken(0) == {0: 0.5, 3: 0.5}


@pytest.mark.parametrize(("size", "expected"), [(4, (2, 2)), (6, (2, 3)), (12, (3, 4)), (16, (4, 4)), (7, (1, 7))])
def test_a_torus_is_as_square_as_can_be(size, expected):
    assert graphs.sides(size) == expected


# -- spectral gap ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("size", [2, 3, 4, 6, 9, 16])
def test_the_gap_is_that_of_numpys_eigenvalues(name, size):
    if not exists(name, size):
        return
    graph = build(name, size)
    product = np.eye(size)
    for mixing in graph:
        product = mixing.matrix().numpy() @ product
    moduli = sorted(abs(np.linalg.eigvals(product)))
    assert moduli[-1] == pytest.approx(1)
    assert spectral_gap(graph) == pytest.approx(1 - moduli[-2], abs=1e-7)  # eigenvalues that coincide lose half


@given(size=st.integers(3, 17))
def test_the_gap_of_a_ring_is_two_thirds_of_one_minus_cosine(size):
    assert spectral_gap(build("ring", size)) == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / size)))


@given(size=sizes)
def test_the_gap_of_the_complete_graph_is_1(size):
    assert spectral_gap(build("complete", size)) == pytest.approx(1)


@given(half=st.integers(1, 16))
def test_the_gap_of_the_exponential_graph_is_ying_et_als(half):
    expected = 2 / (1 + math.ceil(math.log2(2 * half)))
    assert spectral_gap(build("exponential", 2 * half)) == pytest.approx(expected)


@pytest.mark.parametrize("size", [9, 12, 16])
def test_the_gap_of_a_torus_is_that_of_its_longer_side(size):
    _, b = graphs.sides(size)
    assert spectral_gap(build("torus", size)) == pytest.approx(2 / 5 * (1 - math.cos(2 * math.pi / b)))


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_one_peer_reaches_the_exact_mean_in_log2_p_rounds(size):
    graph = build("one_peer", size)
    assert len(graph) == math.log2(size)
    x = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = x.mean(0)
    for mixing in graph:
        x = mixing.matrix() @ x
    assert (x - mean).abs().max() <= ROUNDING
    assert spectral_gap(graph) == pytest.approx(1)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_one_peer_over_other_numbers_of_ranks_tends_to_the_mean_but_does_not_reach_it(size):
    assert 0.2 < spectral_gap(build("one_peer", size)) < 1 - 1e-6


def test_two_pairs_that_never_hear_of_each_other_have_no_gap_and_are_not_connected():
    apart = (metropolis([{1}, {0}, {3}, {2}]),)
    assert spectral_gap(apart) == pytest.approx(0, abs=1e-12)
    assert reach(apart) is None


# -- news --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("ring", 7, 3),
        ("ring", 8, 4),
        ("complete", 8, 1),
        ("directed_ring", 8, 7),
        ("exponential", 8, 3),
        ("ring", 1, 0),
    ],
)
def test_news_have_reached_all_after_as_many_exchanges_as_the_graph_is_wide(name, size, expected):
    assert reach(build(name, size)) == expected


@pytest.mark.parametrize("name", GRAPHS)
@FEW_EACH
@given(size=st.integers(2, 12), seed=st.integers(0, 9))
def test_the_product_of_that_many_rounds_is_positive_from_wherever_it_starts(name, size, seed):
    if not exists(name, size):
        return
    graph = build(name, size, None, seed)
    smallest = []
    for rounds in (reach(graph), reach(graph) - 1):
        products = [torch.eye(size, dtype=torch.float64) for _ in graph]
        for start in range(len(graph)):
            for k in range(rounds):
                products[start] = graph[(start + k) % len(graph)].matrix() @ products[start]
        smallest.append(min(float(product.min()) for product in products))
    assert smallest[0] > 0
    assert smallest[1] == 0


# -- what there is not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "degree", "rule"),
    [
        ("random_regular", 4, 4, "3 others"),
        ("random_regular", 5, 3, "15 ends"),
        ("random_regular", 4, 1, "never hear"),
        ("random_directed", 3, 3, "2 others"),
        ("torus", 7, None, "prime"),
        ("matching", 5, None, "pairs"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_with_the_rule_and_what_would_work(name, size, degree, rule):
    why, cure = objection(name, size, degree)
    assert rule in why
    assert cure.startswith("Use ")
    with pytest.raises(BadInput, match=rule):
        build(name, size, degree)


@pytest.mark.parametrize("name", graphs.OF_A_DEGREE)
@FEW_EACH
@given(size=st.integers(2, 17))
def test_the_default_degree_is_one_that_there_is(name, size):
    assert exists(name, size, graphs.default_degree(name, size))


def test_one_rank_has_nobody_to_exchange_with():
    for name in GRAPHS:
        assert build(name, 1) == (Mixing(({0: 1.0},)),)
