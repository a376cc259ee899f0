"""What makes workers late: means of 1, one stream a worker, the same by vector and by rank."""

import itertools

import numpy as np
import pytest

from manyhands.errors import BadInput, UnknownName
from manyhands.simulation.stragglers import BLOCK, Delays, Exponential, Lognormal, Pareto, Slow, stragglers_from

TEXTS = ("lognormal(sigma=0.5)", "lognormal", "exponential", "pareto(alpha=3)", "slow(workers=2, factor=3)")


@pytest.mark.parametrize("text", TEXTS)
def test_what_prints_parses_to_an_equal_kind(text):
    kind = stragglers_from(text)
    assert stragglers_from(str(kind)) == kind


@pytest.mark.parametrize("kind", [Lognormal(0.5), Exponential(), Pareto(3.0)], ids=str)
def test_a_step_costs_the_mean_whatever_its_spread(kind):
    drawn = kind.draw(np.random.default_rng(1), 200_000, rank=0, workers=1)
    assert drawn.min() > 0
    assert drawn.mean() == pytest.approx(1.0, abs=5 * drawn.std() / len(drawn) ** 0.5)


def test_slow_workers_are_the_last_ones():
    factors = [next(Delays((Slow(workers=2, factor=3.0),), 5, 0).of(rank)) for rank in range(5)]
    assert factors == [1, 1, 1, 3, 3]


def test_kinds_multiply():
    both = Delays((Lognormal(0.3), Slow(factor=4.0)), 2, 7)
    alone = Delays((Lognormal(0.3),), 2, 7)
    assert next(both.of(1)) == 4 * next(alone.of(1))


def test_vectors_hold_what_each_rank_draws_by_itself():
    delays = Delays((Lognormal(0.3), Exponential()), 3, 7)
    steps = BLOCK + 5
    rows = np.stack(list(itertools.islice(delays.rows(), steps)))
    for rank in range(3):
        assert rows[:, rank].tolist() == list(itertools.islice(delays.of(rank), steps))


def test_workers_and_seeds_differ():
    draws = {next(Delays((Exponential(),), 2, seed).of(rank)) for seed in (0, 1) for rank in (0, 1)}
    assert len(draws) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lognormal(sigma=-1)", "sigma=-1"),
        ("pareto(alpha=1)", "there is no mean"),
        ("slow(workers=0)", "workers=0"),
        ("slow(factor=0)", "factor=0"),
        ("lognormal(sgima=1)", "Did you mean 'sigma'"),
        ("lognromal", "Did you mean 'lognormal'"),
    ],
)
def test_what_cannot_be_is_refused(text, says):
    with pytest.raises((BadInput, UnknownName), match=says):
        stragglers_from(text)
