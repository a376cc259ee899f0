"""Prices from measured curves: read where they were measured, carried by the closed form where they were not."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.cluster import load
from manyhands.communication.transports.events import Operation
from manyhands.simulation.curves import CURVE, EXTRAPOLATED, FORMULA, UNKNOWN, UNSURE
from manyhands.simulation.prices import Prices
from tests.cluster.measured_tables import calibrated, curve

CORES = load("ethernet_10g").devices_per_node
N = 4096


def priced(cluster, name, workers, n=N, transport="shared", ranks=None, **more):
    prices = Prices(cluster, workers, transport)
    prices.begin()
    ranks = tuple(range(workers)) if ranks is None else ranks
    return prices(Operation(name, n, len(ranks), ranks, **more)), prices


def formula(name, workers, n=N):
    return priced(load("ethernet_10g"), name, workers, n)[0]


def test_what_was_measured_is_read_off_the_curve():
    seconds, prices = priced(calibrated(curve(spread=0.03)), "all_reduce", 2)
    assert seconds == 2e-5
    assert prices.sources == {CURVE: 2e-5, EXTRAPOLATED: 0.0, FORMULA: 0.0}
    assert prices.spread_s == pytest.approx(0.03 * 2e-5)


def test_what_was_not_is_a_formula_and_unsure():
    for cluster, transport in ((calibrated(curve()), "gloo"), (load("ethernet_10g"), "shared")):
        seconds, prices = priced(cluster, "all_reduce", 2, transport=transport)
        assert seconds == formula("all_reduce", 2)
        assert prices.sources[FORMULA] == seconds
        assert prices.spread_s == pytest.approx(UNKNOWN * seconds)
    assert priced(calibrated(curve()), "broadcast", 2)[1].sources[FORMULA] > 0


def test_another_number_of_ranks_goes_by_the_closed_form():
    seconds, prices = priced(calibrated(curve(ranks=2)), "all_reduce", 3)
    assert seconds == pytest.approx(2e-5 * formula("all_reduce", 3) / formula("all_reduce", 2))
    assert prices.sources[EXTRAPOLATED] == seconds
    assert prices.spread_s >= UNSURE * seconds


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.sampled_from(["all_reduce", "all_to_all", "broadcast"]))
def test_between_two_numbers_of_ranks_the_quotient_lies_between_theirs(low, high, name):
    at = {q: formula(name, q) for q in (2, 3, 4)}
    cluster = calibrated(
        curve(operation=name, ranks=2, seconds=(at[2] * low,), sizes_B=(N,)),
        curve(operation=name, ranks=4, seconds=(at[4] * high,), sizes_B=(N,)),
    )
    quotient = priced(cluster, name, 3)[0] / at[3]
    assert min(low, high) * (1 - 1e-9) <= quotient <= max(low, high) * (1 + 1e-9)
    part = math.log(3 / 2) / math.log(2)
    assert quotient == pytest.approx(low ** (1 - part) * high**part)


def test_far_beyond_the_last_knot_a_curve_is_not_believed():
    _, prices = priced(calibrated(curve()), "all_reduce", 2, n=2**20)
    assert prices.sources[EXTRAPOLATED] == 0
    _, prices = priced(calibrated(curve()), "all_reduce", 2, n=2**22)
    assert prices.sources[CURVE] == 0


def test_gathering_one_copy_is_its_own_curve_and_reading_it_again():
    gather, again = (
        curve(operation="all_gather_common", seconds=(3e-6,)),
        curve(operation="reread", seconds=(0.0, 5e-6)),
    )
    own = curve(operation="all_gather", seconds=(9e-5,))
    assert priced(calibrated(gather, again, own), "all_gather", 2, common=True)[0] == pytest.approx(8e-6)
    assert priced(calibrated(gather, again, own), "all_gather", 2)[0] == 9e-5
    assert priced(calibrated(gather, again, own), "all_gather", 2, n=64, common=True)[0] == pytest.approx(3e-6)


def test_a_broadcast_of_one_copy_is_a_barrier():
    barrier = curve(operation="barrier", seconds=(4e-6,), sizes_B=(0,))
    assert priced(calibrated(barrier, curve()), "broadcast", 2, common=True)[0] == 4e-6
    assert priced(calibrated(barrier, curve()), "all_gather", 2, common=True)[0] == 4e-6


def test_servers_that_are_reached_by_messages_are_priced_as_messages():
    sent = curve(operation="send")
    assert priced(calibrated(sent), "pull", 2)[0] == 2e-5
    pulled = curve(operation="pull", seconds=(1e-6, 2e-6))
    assert priced(calibrated(sent, pulled), "pull", 2)[0] == 2e-6
    assert priced(calibrated(sent, pulled), "send", 2)[0] == 2e-5


def test_more_workers_than_cores_are_a_regime_of_their_own():
    workers = 2 * CORES
    few = curve(ranks=2)
    many = curve(ranks=workers, seconds=(1e-3, 1e-3), oversubscribed=True)
    assert priced(calibrated(few, many), "all_reduce", workers)[0] == 1e-3
    pair, prices = priced(calibrated(few, many), "all_reduce", workers, ranks=(0, 1))
    assert prices.sources[EXTRAPOLATED] == pair != 2e-5
    assert priced(calibrated(few, many), "all_reduce", 2)[0] == 2e-5


def test_a_measured_machine_takes_more_workers_than_cores_and_needs_no_other_node():
    cluster = dataclasses.replace(calibrated(curve()), nodes=None)
    assert priced(cluster, "all_reduce", 4 * CORES)[0] > 0


def test_looking_and_setting_up_stay_free():
    prices = Prices(calibrated(curve()), 2, "shared")
    operation = Operation("all_reduce", N, 2, (0, 1))
    assert prices(operation) == 0
    prices.begin()
    assert prices(operation._replace(purpose="consensus")) == 0
    assert sum(prices.sources.values()) == prices.spread_s == 0
