"""The simulated asynchronous server has the means, and where they apply the distributions, of Oyama et al. (2016)."""

import pytest

from validation import asynchronous
from validation.asynchronous import Case, Setup, distance, of_arrivals, of_formulas, simulated_case


@pytest.mark.parametrize(
    "case",
    [
        Case("equal", 4, 0.010),
        Case("saturated", 16, 0.0005),
        Case("one slow", 4, 0.010, 1, 1.7),
        pytest.param(Case("late", 8, 0.010, late="lognormal(sigma=0.3)"), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_the_simulated_server_has_the_means_of_the_formulas(case):
    found, said = simulated_case(case, steps=120)
    epoch_s, batch, staleness = found.means
    assert epoch_s == pytest.approx(said.means[0], rel=0.02)
    assert batch == pytest.approx(said.means[1], rel=0.02)
    assert staleness == pytest.approx(said.means[2], rel=0.05)
    if not case.slow and not case.late:
        assert distance(found.staleness, said.staleness) == 0  # each of the others once
    if case.late:
        assert distance(found.batch, said.batch) < 0.15  # chance has made the phases independent


def test_staleness_is_what_comes_between_two_of_ones_own():
    found = of_arrivals([[0.0, 1.0, 2.0, 3.0], [0.0, 0.6, 1.2, 1.8, 2.4, 3.0]], 10, 100, 1.0)
    assert found.staleness == pytest.approx({0: 2 / 8, 1: 4 / 8, 2: 2 / 8})
    assert found.epoch_s == pytest.approx(100 / (10 * 8 / 3))


def test_formulas_of_equal_workers_are_one_distribution():
    said = of_formulas(32, 1000, [0.01] * 4, 0.025)
    assert said.staleness == pytest.approx({3: 1.0})
    assert said.means == pytest.approx((1000 * 0.01 / 128, 4 * 32 * 2.5, 3.0))
    assert sum(said.batch.values()) == pytest.approx(1.0)


def test_a_distance_is_between_none_and_all():
    assert distance({1: 1.0}, {1: 1.0}) == 0
    assert distance({1: 1.0}, {2: 1.0}) == 1
    assert distance({1: 0.5, 2: 0.5}, {1: 1.0}) == 0.5


@pytest.mark.slow
def test_real_turns_and_what_is_predicted_of_them_tell_arrivals():
    pairs = asynchronous.measured_and_predicted(Setup("logistic", 20, "adam(lr=0.001)", "digits"), 2)
    assert len(pairs) == 2
    for found, said in pairs:
        assert found.epoch_s > 0
        assert said.epoch_s > 0
        assert sum(found.staleness.values()) == pytest.approx(1.0)
        assert said.means[2] == pytest.approx(1.0, abs=0.3)  # two workers that keep pace
