"""A plan's own exchanges, measured beside its profile: which patterns they are, and whose prices then hold."""

from __future__ import annotations

import dataclasses

import pytest

from manyhands.cluster import load
from manyhands.cluster.measured import COMMON_GATHER, REREAD, Curve, Measured
from manyhands.communication.transports.events import Operation
from manyhands.modelling.exchanges import MOST_SIZES, curves_here, patterns_for
from manyhands.simulation.prices import Prices
from manyhands.training.team import team

MEMORY = {"shares_memory": True, "one_sided": False}
MESSAGES = {"shares_memory": False, "one_sided": False}


def asked(name, n=400, *, size=2, common=False, purpose="step"):
    return Operation(name, n, size, tuple(range(size)), None, None, common, purpose)


def test_a_sharded_step_is_one_pattern_where_memory_is_shared_and_another_where_it_is_not():
    step = [asked("reduce_scatter"), asked("all_gather", common=True)]
    assert patterns_for(step, 2, **MEMORY) == {"sharded": [400]}
    step = [asked("reduce_scatter"), asked("all_gather")]
    assert patterns_for(step, 2, **MESSAGES) == {"scattered": [400]}


@pytest.mark.parametrize(
    ("operation", "kind", "pattern"),
    [
        (asked("all_reduce"), MESSAGES, {"all_reduce": [400]}),
        (asked("all_gather"), MESSAGES, {"all_gather": [400]}),
        (asked("send"), MEMORY, {"swap": [400]}),
        (asked("send", purpose="cut"), MEMORY, {"send": [400]}),
        (asked("pull"), MEMORY, {"handed": [0], "served": [400]}),
        (asked("push"), MESSAGES, {"send": [400]}),
        (asked("barrier", 0), MEMORY, {"barrier": [0]}),
        (asked("broadcast", common=True), MEMORY, {"barrier": [0]}),
        (asked("recv"), MEMORY, {}),
        (asked("all_reduce", purpose="consensus"), MEMORY, {}),
        (asked("all_reduce", size=4), MEMORY, {}),  # a part of the ranks, or more of them than there are
    ],
    ids=str,
)
def test_each_operation_has_its_pattern(operation, kind, pattern):
    assert patterns_for([operation], 2, **kind) == pattern


def test_what_a_server_takes_may_be_known_already_but_not_how_late_who_waits_is_woken():
    assert patterns_for([asked("push")], 2, **MEMORY, visited=True) == {"handed": [0]}


def test_of_many_sizes_the_ends_are_kept():
    (sizes,) = patterns_for([asked("all_reduce", 4 * n) for n in range(1, 100)], 2, **MEMORY).values()
    assert len(sizes) == MOST_SIZES
    assert (sizes[0], sizes[-1]) == (4, 396)


def test_knots_lie_at_the_sizes_that_were_asked_for():
    step = [asked("reduce_scatter"), asked("all_gather", common=True), asked("send", 64)]
    with team("threads", 2, threads=1) as crew:
        found = {curve.operation: curve for curve in curves_here(crew, "threads", 2, step, 1e-4)}
        assert curves_here(crew, "threads", 2, [asked("recv")], 1e-4) == ()
    assert found.keys() == {"reduce_scatter", COMMON_GATHER, REREAD, "send"}
    assert {name: curve.sizes_B for name, curve in found.items()} == {
        **dict.fromkeys(("reduce_scatter", COMMON_GATHER, REREAD), (400,)),
        "send": (64,),
    }
    assert all(curve.ranks == 2 and curve.transport == "threads" for curve in found.values())
    assert found["reduce_scatter"].seconds[0] > 0


def curve(operation, seconds):
    return Curve(transport="gloo", operation=operation, ranks=2, sizes_B=(400,), seconds=(seconds,), spread=(0.01,))


def test_what_was_measured_just_now_goes_before_the_clusters_curves():
    calibrated = Measured(when="2026-01-01", curves=(curve("all_reduce", 0.5), curve("broadcast", 0.125)))
    cluster = dataclasses.replace(load("laptop"), measured=calibrated)
    prices = Prices(cluster, 2, "gloo", [curve("all_reduce", 0.25)])
    prices.begin()
    assert prices(asked("all_reduce")) == 0.25
    assert prices(asked("broadcast")) == 0.125
