"""Fits find what they are given, know how well they know it, and say so when the data cannot carry them."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.studies import fits
from manyhands.studies.fits import CannotFit, Estimate

WORKERS = (1, 2, 4, 8, 16)
BATCHES = (1, 8, 64, 512)
#: Rounding, through a few sums and one division.
EXACT = 1e-6


def amdahl(p, s):
    return 1 / (s + (1 - s) / p)


def gustafson(p, s):
    return p - s * (p - 1)


def usl(p, alone, contention, coherency):
    return alone * p / (1 + contention * (p - 1) + coherency * p * (p - 1))


def steps(batch, steps_min, samples_min):
    return steps_min + samples_min / batch


def trained(batch, steps_min, samples_min):
    return batch, steps(batch, steps_min, samples_min), batch * steps(batch, steps_min, samples_min)


def near(value):
    return pytest.approx(value, rel=EXACT, abs=EXACT)


def noisy(rng, points, share, repeats=5):
    """Each (x, y) several times, y with a relative error."""
    return [(x, y * (1 + share * rng.standard_normal())) for x, y in points for _ in range(repeats)]


def everything(answer):
    """The numbers of a fit, for comparing two."""
    return [
        v for each in vars(answer).values() for v in (vars(each).values() if isinstance(each, Estimate) else [each])
    ]


def covered(fit, truth, simulations=100):
    """How often the interval of a fit of new data contains the truth."""
    found = [fit(np.random.default_rng(i)) for i in range(simulations)]
    assert not any(isinstance(each, CannotFit) for each in found)
    return sum(each.contains(truth) for each in found)


# -- an estimate -------------------------------------------------------------------------------------------------------


def test_an_estimate_prints_with_its_interval():
    assert str(Estimate(0.93, 0.91, 0.96)) == "0.93 [0.91 … 0.96]"
    assert str(Estimate(-1.0, -1.25, math.inf)) == "−1 [−1.25 … ∞]"
    assert str(Estimate(12345.0, 12000.0, 13000.0)) == "12,300 [12,000 … 13,000]"
    assert str(Estimate(2.0)) == "2 [interval not known]"


def test_an_estimate_knows_what_it_contains_or_that_it_does_not_know():
    assert Estimate(1.0, 0.5, 2.0).contains(2.0) is True
    assert Estimate(1.0, 0.5, 2.0).contains(2.1) is False
    assert Estimate(1.0).contains(1.0) is None


# -- the bootstrap -----------------------------------------------------------------------------------------------------


def test_one_value_has_no_interval():
    assert fits.bootstrap([3.0]) == Estimate(3.0, None, None)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_a_median_lies_in_its_interval_whatever_the_order(values, chance):
    found = fits.bootstrap(values, draws=200)
    assert found.low <= found.value <= found.high
    assert min(values) <= found.low
    assert found.high <= max(values)
    chance.shuffle(values)
    assert fits.bootstrap(values, draws=200) == found


def test_the_same_seed_draws_the_same():
    values = list(np.random.default_rng(0).standard_normal(20))
    assert fits.bootstrap(values, np.mean) == fits.bootstrap(values, np.mean)
    assert fits.bootstrap(values, np.mean) != fits.bootstrap(values, np.mean, seed=1)


def test_many_repeats_are_drawn_in_portions():
    values = np.random.default_rng(0).standard_normal(3001)
    found = fits.bootstrap(values, np.mean)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(3001), rel=0.1)


@pytest.mark.parametrize("statistic", [np.median, np.mean])
def test_the_interval_of_a_statistic_covers_the_truth(statistic):
    assert covered(lambda rng: fits.bootstrap(7 + rng.standard_normal(15), statistic), 7.0) >= 85


def test_a_ratio_within_repeats_does_not_see_the_machine_drift():
    found = fits.bootstrap_ratio([(10.0, 5.0), (30.0, 15.0), (2.0, 1.0)])
    assert found == Estimate(2.0, 2.0, 2.0)


def test_a_bootstrap_of_nothing_says_so():
    assert "there is none" in fits.bootstrap([]).sentence()
    assert "there is none" in fits.bootstrap_ratio([]).sentence()
    assert "1 of 2 are not" in fits.bootstrap([1.0, math.nan]).sentence()
    assert "(1.0, 0.0)" in fits.bootstrap_ratio([(1.0, 0.0)]).sentence()


# -- exact data give the parameters back -------------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_amdahl_round_trip(s):
    found = fits.amdahl((p, amdahl(p, s)) for p in WORKERS)
    assert found.serial.value == near(s)
    assert found.predict(64) == near(amdahl(64, found.serial.value))
    assert found.predict(8) == near(amdahl(8, s))
    assert found.miss < EXACT


@given(st.floats(0, 1))
def test_gustafson_round_trip(s):
    found = fits.gustafson((p, gustafson(p, s)) for p in WORKERS)
    assert found.serial.value == near(s)
    assert found.predict(64) == near(gustafson(64, s)) or abs(found.serial.value - s) < EXACT
    assert found.miss < EXACT


@given(st.floats(1e-3, 1e6), st.floats(0, 0.9), st.floats(0, 0.1))
def test_usl_round_trip(alone, contention, coherency):
    found = fits.usl((p, usl(p, alone, contention, coherency)) for p in WORKERS)
    assert found.alone.value == pytest.approx(alone, rel=EXACT)
    assert found.contention.value == near(contention)
    assert found.coherency.value == near(coherency)
    assert found.predict(8) == pytest.approx(usl(8, alone, contention, coherency), rel=EXACT)
    if coherency > 1e-3:
        assert found.peak.value == pytest.approx(max(1, math.sqrt((1 - contention) / coherency)), rel=1e-4)


@given(st.floats(1e-3, 1e3), st.floats(0.5, 5000))
def test_noise_scale_round_trip(signal, scale):
    found = fits.noise_scale((b, signal * (1 + scale / b)) for b in BATCHES)
    assert found.signal.value == pytest.approx(signal, rel=EXACT)
    assert found.noise.value == pytest.approx(signal * scale, rel=EXACT)
    assert found.scale.value == pytest.approx(scale, rel=EXACT)
    assert found.predict(100) == pytest.approx(signal * (1 + scale / 100), rel=EXACT)


@given(st.floats(1e-3, 1e3), st.floats(0.5, 5000), st.booleans())
def test_noise_scale_of_two_round_trip(signal, scale, turned):
    pair = [(b, signal * (1 + scale / b)) for b in (16, 64)]
    found = fits.noise_scale_of_two(*(reversed(pair) if turned else pair))
    assert found.signal.value == pytest.approx(signal, rel=EXACT)
    assert found.noise.value == pytest.approx(signal * scale, rel=EXACT)
    assert found.scale == Estimate(pytest.approx(scale, rel=EXACT))


@given(st.floats(10, 1e4), st.floats(0.5, 5000))
def test_critical_batch_round_trip(steps_min, critical):
    found = fits.critical_batch(trained(b, steps_min, steps_min * critical) for b in BATCHES)
    assert found.steps.value == pytest.approx(steps_min, rel=EXACT)
    assert found.samples.value == pytest.approx(steps_min * critical, rel=EXACT)
    assert found.batch.value == pytest.approx(critical, rel=EXACT)
    needed = found.predict(30)  # the linear form is the published one
    assert (needed / steps_min - 1) * (30 * needed / (steps_min * critical) - 1) == pytest.approx(1, rel=1e-4)


@given(st.floats(1e-3, 1e3), st.floats(-3, 3))
def test_power_law_round_trip(factor, exponent):
    found = fits.power_law((x, factor * x**exponent) for x in WORKERS)
    assert found.exponent.value == near(exponent)
    assert found.factor == pytest.approx(factor, rel=EXACT)
    assert found.predict(3) == pytest.approx(factor * 3**exponent, rel=EXACT)


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_slope_round_trip(a, b):
    found = fits.slope((x, a + b * x) for x in (-2, 0, 1, 5))
    assert found.slope.value == near(b)
    assert found.predict(3) == near(a + 3 * b)


# -- published results -------------------------------------------------------------------------------------------------


def test_usl_gives_the_published_parameters_of_the_spec_sdm91_benchmark():
    """Gunther 2007's example; the parameters are those that the R package usl 3.0 prints in its README."""
    points = [(1, 64.9), (18, 995.9), (36, 1652.4), (72, 1853.2), (108, 1828.9), (144, 1775.0), (216, 1702.2)]
    found = fits.usl(points)
    assert found.contention.value == pytest.approx(0.0277285, abs=5e-8)
    assert found.coherency.value == pytest.approx(0.0001044, abs=5e-8)
    assert found.alone.value == pytest.approx(89.9952330, abs=5e-5)
    assert found.peak.value == pytest.approx(96.5, abs=0.05)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (100, 1.9840)],
)
def test_students_t_is_that_of_the_tables(freedom, quantile):
    assert fits.student_t(freedom) == pytest.approx(quantile, abs=1e-4)


def test_students_t_has_other_quantiles_and_becomes_normal():
    assert fits.student_t(5, 0.95) == pytest.approx(2.0150, abs=1e-4)
    assert fits.student_t(12, 0.995) == pytest.approx(3.0545, abs=1e-4)
    assert fits.student_t(3, 0.5) == pytest.approx(0, abs=1e-9)
    assert fits.student_t(100_001) == pytest.approx(1.95999, abs=1e-4)


def test_a_slope_has_the_interval_of_the_textbook():
    """By hand: x = 1 … 4, residuals −0.1, 0.2, −0.1, 0 about 1 + 2x after fitting; the formula written out."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.9, 5.2, 6.9, 9.0])
    found = fits.slope(zip(x, y, strict=True))
    b, a = np.polyfit(x, y, 1)
    error = math.sqrt(((y - a - b * x) ** 2).sum() / 2 / ((x - 2.5) ** 2).sum())
    assert found.slope.value == pytest.approx(b)
    assert found.slope.high - found.slope.value == pytest.approx(4.30265 * error, rel=1e-5)


# -- least squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [(10.0, 0.1, 0.01), (10.0, 0.0, 0.02), (10.0, 0.3, 0.0), (10.0, 0.0, 0.0)])
def test_no_neighbour_fits_usl_better(truth):
    points = noisy(np.random.default_rng(3), [(p, usl(p, *truth)) for p in WORKERS], 0.05)
    found = fits.usl(points)
    best = np.array([found.alone.value, found.contention.value, found.coherency.value])

    def cost(parameters):
        return sum((x - usl(p, *parameters)) ** 2 for p, x in points)

    chance = np.random.default_rng(4)
    for size in (1e-4, 1e-2, 0.3):
        for _ in range(200):
            other = best * (1 + size * chance.standard_normal(3)) + size * np.array([0, 1, 0.1]) * chance.random(3)
            assert cost(np.abs(other)) >= cost(best) * (1 - 1e-9)


def test_a_parameter_that_would_be_negative_is_zero():
    assert fits.amdahl([(2, 2.02), (4, 4.1)]).serial.value == 0
    found = fits.usl([(p, p**1.02) for p in WORKERS])
    assert (found.contention.value, found.coherency.value, found.peak.value) == (0, 0, math.inf)


def test_throughput_that_falls_from_the_start_peaks_at_one_worker():
    assert fits.usl((p, usl(p, 10, 1.3, 0.01)) for p in WORKERS).peak.value == 1


# -- intervals ---------------------------------------------------------------------------------------------------------

COVERAGE = {
    "amdahl": (lambda rng: fits.amdahl(noisy(rng, [(p, amdahl(p, 0.1)) for p in WORKERS], 0.05)).serial, 0.1),
    "amdahl of two repeats": (
        lambda rng: fits.amdahl(noisy(rng, [(p, amdahl(p, 0.1)) for p in WORKERS], 0.05, 2)).serial,
        0.1,
    ),
    "gustafson": (lambda rng: fits.gustafson(noisy(rng, [(p, gustafson(p, 0.1)) for p in WORKERS], 0.05)).serial, 0.1),
    "contention": (
        lambda rng: fits.usl(noisy(rng, [(p, usl(p, 9, 0.2, 0.01)) for p in WORKERS], 0.03), draws=500).contention,
        0.2,
    ),
    "coherency": (
        lambda rng: fits.usl(noisy(rng, [(p, usl(p, 9, 0.2, 0.01)) for p in WORKERS], 0.03), draws=500).coherency,
        0.01,
    ),
    "noise scale": (
        lambda rng: fits.noise_scale(noisy(rng, [(b, 2 + 100 / b) for b in BATCHES], 0.1, 10), draws=500).scale,
        50,
    ),
    "critical batch": (
        lambda rng: (
            fits.critical_batch(
                [(b, n, b * n) for b, n in noisy(rng, [(b, steps(b, 200, 8000)) for b in BATCHES], 0.05)], draws=500
            ).batch
        ),
        40,
    ),
    "slope": (lambda rng: fits.slope([(x, 3 - 2 * x + rng.standard_normal()) for x in range(6)]).slope, -2),
    "power law": (lambda rng: fits.power_law(noisy(rng, [(p, 5 / p) for p in WORKERS], 0.2)).exponent, -1),
}


#: One of each way to an interval, the bootstrap of a law, of a power and a straight line's own; the rest is slow.
COVERED_PER_COMMIT = ("amdahl", "power law", "slope")


@pytest.mark.parametrize(
    "name", [n if n in COVERED_PER_COMMIT else pytest.param(n, marks=pytest.mark.slow) for n in COVERAGE]
)
def test_an_interval_covers_the_truth_in_at_least_85_of_100(name):
    """95 are promised; a percentile bootstrap of few repeats is somewhat too narrow, and 100 is a small sample."""
    assert covered(*COVERAGE[name]) >= 85


def test_without_repeats_there_is_no_interval_of_a_law():
    assert fits.amdahl([(2, 1.8), (4, 3.0), (4, 3.1)]).serial.low is None
    assert "interval not known" in fits.usl([(p, usl(p, 9, 0.2, 0.01)) for p in WORKERS]).sentence()


def test_an_interval_without_signal_in_some_draws_reaches_infinity():
    rng = np.random.default_rng(0)
    found = fits.noise_scale(noisy(rng, [(b, 1 + 1000 / b) for b in (1, 8, 64)], 0.05))
    assert found.scale.high == math.inf
    assert "∞" in found.sentence()


# -- what must not matter ----------------------------------------------------------------------------------------------

FITS = {
    "amdahl": (fits.amdahl, lambda p: amdahl(p, 0.1)),
    "gustafson": (fits.gustafson, lambda p: gustafson(p, 0.1)),
    "usl": (fits.usl, lambda p: usl(p, 9, 0.2, 0.01)),
    "noise_scale": (fits.noise_scale, lambda b: 2 + 10 / b),
    "power_law": (fits.power_law, lambda x: 5 / x),
    "slope": (fits.slope, lambda x: 3 + 2 * x),
}


@pytest.mark.parametrize("name", FITS)
def test_the_order_of_points_does_not_matter(name):
    fit, law = FITS[name]
    points = noisy(np.random.default_rng(1), [(x, law(x)) for x in WORKERS], 0.03)
    turned = random.Random(2).sample(points, len(points))
    assert fit(turned) == fit(points)


def test_the_order_of_trainings_does_not_matter():
    points = [trained(b, 100, 5000) for b in BATCHES for _ in range(2)]
    assert fits.critical_batch(points[::-1]) == fits.critical_batch(points)


@pytest.mark.parametrize("unit", [1e-3, 60.0, 1e9])
def test_the_unit_of_throughput_changes_only_that_of_one_worker(unit):
    points = noisy(np.random.default_rng(1), [(p, usl(p, 9, 0.2, 0.01)) for p in WORKERS], 0.03)
    found, other = fits.usl(points), fits.usl((p, unit * x) for p, x in points)
    assert other.alone.value == pytest.approx(unit * found.alone.value, rel=EXACT)
    for name in ("contention", "coherency", "peak"):
        assert everything(getattr(other, name)) == pytest.approx(everything(getattr(found, name)), rel=1e-4)


@pytest.mark.parametrize("unit", [1e-3, 60.0, 1e9])
def test_the_unit_of_a_gradient_does_not_change_the_noise_scale(unit):
    points = noisy(np.random.default_rng(1), [(b, 2 + 10 / b) for b in BATCHES], 0.1)
    found, other = fits.noise_scale(points), fits.noise_scale((b, unit * y) for b, y in points)
    assert everything(other.scale) == pytest.approx(everything(found.scale))


@pytest.mark.parametrize("unit", [1e-3, 60.0])
def test_the_units_of_a_power_law_do_not_change_its_exponent(unit):
    points = noisy(np.random.default_rng(1), [(x, 5 / x) for x in WORKERS], 0.1)
    found, other = fits.power_law(points), fits.power_law((unit * x, y / unit) for x, y in points)
    assert everything(other.exponent) == pytest.approx(everything(found.exponent))


# -- refusals ----------------------------------------------------------------------------------------------------------

BAD_PAIRS = [(2, 0.0), (2, -1.0), (2, math.nan), (2, math.inf), (0, 1.0), (math.nan, 1.0)]


@pytest.mark.parametrize("bad", BAD_PAIRS)
@pytest.mark.parametrize("name", sorted(FITS.keys() - {"slope"}))
def test_what_is_not_a_number_above_zero_is_refused(name, bad):
    fit, law = FITS[name]
    found = fit([*((x, law(x)) for x in WORKERS), bad])
    assert isinstance(found, CannotFit)
    assert "finite and above 0" in found.reason


@pytest.mark.parametrize(
    ("name", "needed"),
    [("amdahl", 2), ("gustafson", 2), ("usl", 4), ("noise_scale", 3), ("power_law", 3)],
)
def test_one_more_distinct_point_than_unknowns_is_needed(name, needed):
    fit, law = FITS[name]
    points = [(x, law(x)) for x in WORKERS[1:] for _ in range(3)]
    assert not isinstance(fit(points[: 3 * needed]), CannotFit)
    found = fit(points[: 3 * needed - 3])
    assert isinstance(found, CannotFit)
    assert found.reason.startswith(f"{needed} distinct ")
    assert "there is none" in fit([]).reason


REFUSALS = {
    "one worker is no scaling": (
        fits.amdahl([(1, 1.0), (1, 1.1), (2, 1.9)]),
        "Amdahl's law cannot be fitted: 2 distinct worker counts above 1 are needed for 1 unknown, and there is 1 (2).",
    ),
    "half a worker": (fits.amdahl([(0.5, 1.0), (2, 1.9), (4, 3.0)]), "each worker count must be at least 1, and 0.5"),
    "a base that is not one": (fits.amdahl([(1, 2.0), (2, 3.6), (4, 6.0)]), "here it is 2"),
    "far more than linear": (fits.amdahl([(2, 4.0), (4, 16.0)]), "do not follow it; the nearest curve misses by 199 %"),
    "a factor of": (fits.amdahl([(2, 4.0), (4, 16.0)]), "by a factor of 4 at worker count 4"),
    "slower with more workers": (fits.amdahl([(2, 0.5), (4, 0.4)]), "do not follow it"),
    "worse than the mean": (fits.amdahl([(2, 1.3), (4, 1.2), (8, 1.1)]), "do not follow it"),
    "weak scaling that falls": (fits.gustafson([(2, 0.5), (4, 0.4)]), "do not follow it"),
    "a zigzag": (fits.usl([(1, 1), (2, 9), (4, 1), (8, 9), (16, 1)]), "do not follow it"),
    "a zigzag of powers": (fits.power_law([(1, 1), (2, 99), (4, 1), (8, 99)]), "do not follow it"),
    "a zigzag of norms": (fits.noise_scale([(1, 90), (2, 9), (4, 80), (8, 7)]), "do not follow it"),
    "no noise": (fits.noise_scale([(b, 2.0) for b in BATCHES]), "no noise is seen"),
    "noise that grows": (fits.noise_scale([(b, 2.0 + b) for b in BATCHES]), "no noise is seen"),
    "no signal": (fits.noise_scale([(b, 2.0 / b) for b in BATCHES]), "no signal is seen"),
    "no noise in two": (fits.noise_scale_of_two((8, 2.0), (64, 2.0)), "no noise is seen"),
    "no signal in two": (fits.noise_scale_of_two((8, 8.0), (64, 1.0)), "no signal is seen"),
    "one batch twice": (fits.noise_scale_of_two((8, 8.0), (8, 1.0)), "2 distinct batches are needed for 1 unknown"),
    "batches too few": (fits.critical_batch([trained(1, 9, 9), trained(2, 9, 9)]), "3 distinct batches are needed"),
    "batches too small": (fits.critical_batch([(b, 512 / b, 512) for b in BATCHES]), "larger batches are needed"),
    "batches too large": (fits.critical_batch([(b, 50, 50 * b) for b in BATCHES]), "smaller batches are needed"),
    "other samples": (fits.critical_batch([(b, 512 / b, 99) for b in BATCHES]), "samples must be batch × steps"),
    "trainings at random": (
        fits.critical_batch([(b, n, b * n) for b, n in [(1, 900), (2, 90), (4, 800), (8, 70)]]),
        "do not follow it",
    ),
    "two points": (fits.slope([(1, 1), (2, 2)]), "3 points are needed for 2 unknowns, and there are 2."),
    "one point": (fits.slope([(1, 1)]), "and there is 1."),
    "one x": (fits.slope([(2, 1), (2, 2), (2, 3)]), "all 3 points have x = 2"),
    "no number": (fits.slope([(2, 1), (3, math.nan), (4, 3)]), "each point must be finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_data_cannot_carry_is_refused_in_a_sentence(name):
    found, words = REFUSALS[name]
    assert isinstance(found, CannotFit)
    assert words in found.sentence()
    assert found.sentence().endswith(".")


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16, 1024]), st.floats(1e-9, 1e9)), max_size=9))
def test_no_points_raise_or_warn(points):
    for fit, _ in FITS.values():
        assert fit(points).sentence().endswith(".")
    assert fits.critical_batch([(b, n, b * n) for b, n in points], draws=50).sentence().endswith(".")


def test_the_examples_of_the_docstrings_hold():
    assert fits.bootstrap([0.020, 0.022, 0.021]).value == 0.021
    assert fits.amdahl([(2, 1.6), (4, 2.3)]).predict(8) == pytest.approx(2.9, abs=0.05)
    assert fits.gustafson([(2, 1.9), (4, 3.7)]).predict(8) == pytest.approx(7.3)
    assert fits.power_law([(1, 8.0), (2, 4.0), (4, 2.0)]).exponent.value == pytest.approx(-1)
    assert fits.slope([(1, 2.0), (2, 3.1), (3, 3.9)]).slope.value == pytest.approx(0.95)
    assert fits.student_t(10) == pytest.approx(2.228, abs=1e-3)


def test_a_law_that_nothing_contradicts_is_not_refused_for_its_noise():
    """Nothing is gained by any count, s = 1; R² is below 0 and means nothing."""
    found = fits.amdahl([(2, 0.98), (4, 1.01), (8, 0.99)])
    assert found.serial.value == pytest.approx(1, abs=0.02)


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_each_fit_has_a_sentence_with_its_numbers():
    assert fits.amdahl((p, amdahl(p, 0.1)) for p in WORKERS for _ in range(2)).sentence() == (
        "By Amdahl's law a serial fraction of 0.1 [0.1 … 0.1] explains the speed-ups with 2 to 16 workers, off by less "
        "than 0.1 % typically; however many workers there are, at most 10× is gained."
    )
    assert "no limit is in sight" in fits.amdahl([(2, 2), (4, 4)]).sentence()
    assert "each further worker adds 0.90 of one" in fits.gustafson([(2, 1.9), (4, 3.7)]).sentence()
    assert "peaks at 8.94 " in fits.usl((p, usl(p, 9, 0.2, 0.01)) for p in WORKERS).sentence()
    assert "beyond the 16 that" in fits.usl((p, usl(p, 9, 0.2, 0.001)) for p in WORKERS).sentence()
    assert "throughput never falls" in fits.usl((p, usl(p, 9, 0.2, 0.0)) for p in WORKERS).sentence()
    assert "scale is 5 [" in fits.noise_scale((b, 2 + 10 / b) for b in BATCHES).sentence()
    assert "twice the 100 steps and twice the 5,000 samples" in (
        fits.critical_batch(trained(b, 100, 5000) for b in BATCHES).sentence()
    )
    assert "to the power of −1 [−1 … −1] over 5 points." in fits.power_law((x, 5 / x) for x in WORKERS).sentence()
    assert fits.slope([(1, 1.0), (2, 1.0), (3, 1.0)]).sentence().endswith("which may be nothing.")
