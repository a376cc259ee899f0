"""Failures, checkpoints and restarts, against the closed forms of Young and Daly."""

import numpy as np
import pytest

from manyhands.errors import BadInput
from manyhands.modelling.published import checkpoint_interval as published
from manyhands.simulation.failures import Failures, daly_s, failures_from, wall

M, DELTA, R = 1000.0, 20.0, 30.0  # of the whole job


def expected_s(work_s, every_s, checkpoint_s=DELTA):
    return published.wall_s(work_s, every_s, checkpoint_s, R, M)


def mean_wall(every_s, work_s=20_000.0, runs=300):
    """Over seeds, of four workers."""
    breaks = Failures(mtbf_s=4 * M, checkpoint_s=DELTA, restart_s=R, every_s=every_s)
    found = np.array([wall(work_s, breaks, 4, seed).wall_s[-1] for seed in range(runs)])
    return found.mean(), found.std() / runs**0.5


def test_the_mean_is_dalys_closed_form():
    every = daly_s(DELTA, M)
    work = 100 * every
    mean, error = mean_wall(every, work)
    last = expected_s(every, every) - expected_s(every, every, 0.0)  # no checkpoint follows the end
    assert mean == pytest.approx(expected_s(work, every) - last, abs=4 * error)


def test_dalys_interval_minimises_the_closed_form_better_than_youngs():
    best = min(np.arange(50.0, 600.0, 0.5), key=lambda every: expected_s(1.0, every))
    assert daly_s(DELTA, M) == published.daly_s(DELTA, M) == pytest.approx(best, rel=0.01)
    assert abs(daly_s(DELTA, M) - best) < abs(published.young_s(DELTA, M) - best)
    assert daly_s(3 * M, M) == published.daly_s(3 * M, M)


def test_a_third_and_the_triple_of_the_best_interval_take_longer():
    best, error = mean_wall(daly_s(DELTA, M))
    for factor in (1 / 3, 3):
        worse, other = mean_wall(factor * daly_s(DELTA, M))
        assert worse - best > 4 * (error + other)


def test_without_failures_only_checkpoints_cost():
    found = wall(95.0, Failures(mtbf_s=1e15, checkpoint_s=1.0, restart_s=5.0, every_s=10.0), 8, 0)
    assert (found.wall_s[-1], found.failures, found.lost_s) == (95.0 + 9 * 1.0, 0, 0.0)
    assert found.at(0.0) == 0.0
    assert found.at(25.0) == 27.0
    assert found.at(95.0) == found.wall_s[-1]


def test_the_time_on_the_wall_is_accounted_for():
    found = wall(50_000.0, Failures(mtbf_s=8 * M, checkpoint_s=DELTA, restart_s=R), 8, 3)
    parts = found.work_s[-1] + found.checkpoints_s + found.restarts_s + found.lost_s
    unsaved = found.wall_s[-1] - parts  # of checkpoints that a failure cut short
    assert found.failures > 10
    assert 0 <= unsaved <= found.failures * DELTA
    assert found.useful == pytest.approx(50_000.0 / found.wall_s[-1])
    times = [found.at(work) for work in np.linspace(0, 50_000, 999)]
    assert times == sorted(times)


def test_the_same_seed_breaks_down_at_the_same_times():
    breaks = failures_from("failures(mtbf_s=4000, checkpoint_s=20, restart_s=30)")
    assert wall(20_000.0, breaks, 4, 1) == wall(20_000.0, breaks, 4, 1) != wall(20_000.0, breaks, 4, 2)


def test_a_job_that_would_not_end_is_refused():
    with pytest.raises(BadInput, match="would not end"):
        wall(1e6, Failures(mtbf_s=100.0, checkpoint_s=1.0, every_s=1e4), 64, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("failures(mtbf_s=0)", "mtbf_s=0"),
        ("failures(checkpoint_s=-1)", "checkpoint_s=-1"),
        ("failures(checkpoint_s=0)", "give every_s"),
        ("failures(mtbf=3)", "Did you mean 'mtbf_s'"),
        ("faults", "the form is failures"),
    ],
)
def test_what_cannot_be_is_refused(text, says):
    with pytest.raises(BadInput, match=says):
        failures_from(text)
