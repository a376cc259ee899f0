"""Steps put together of operators: what was measured is read off, what lies between is bounded by it."""

import itertools
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.cluster import load
from manyhands.cluster.measured import OperatorTime
from manyhands.errors import BadInput
from manyhands.modelling import fetching, prediction
from manyhands.modelling.operations import count
from manyhands.modelling.operators import gauge, measure, measuring, overhead, price, updates
from manyhands.modelling.operators.fitting import inverse_distance, nonnegative
from manyhands.modelling.operators.measuring import Observed, observe, observed, table_of
from manyhands.modelling.operators.networks import NETWORKS, OPTIMIZERS, Network, cells
from manyhands.modelling.operators.table import Table, key, said
from manyhands.models import losses, optimizers
from manyhands.simulation.pace import StepCost
from manyhands.simulation.stragglers import Delays
from manyhands.training.team import team

LOSS = losses.build("cross_entropy")
SMALL = Network("perceptron(hidden=8)", (16,), 4, (5,))
GRID = Network("perceptron(hidden=8)", (16,), 4, (2, 5, 8, 16))

positive = st.floats(1e-3, 1e3)
points = st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique_by=lambda x: round(x, 2))


def traced(network=SMALL, batch=5):
    return count(network.build(), *network.samples(batch), LOSS)


def row(x, seconds, **changes):
    fields = {
        "name": x.name, "phase": x.phase, "operands": x.operands, "results": x.results, "options": said(x.options),
        "dtype": x.dtype, "layout": x.layout, "flops": x.flops, "moved_B": x.moved_B, "threads": 1, "co_runners": 1,
        "seconds": seconds, "spread": 0.1,
    }  # fmt: skip
    return OperatorTime(**fields | changes)


# -- fitting -----------------------------------------------------------------------------------------------------------


@given(points, st.data())
def test_interpolation_is_exact_at_every_point(x, data):
    values = np.array(data.draw(st.lists(st.floats(-3, 3), min_size=len(x), max_size=len(x))))
    apart = np.abs(np.subtract.outer(np.array(x), np.array(x)))
    assert inverse_distance(apart, values) == pytest.approx(values, abs=1e-12)


@given(points, st.floats(-9, 9), st.data())
def test_interpolation_stays_between_its_points(x, at, data):
    values = np.array(data.draw(st.lists(st.floats(-3, 3), min_size=len(x), max_size=len(x))))
    found = inverse_distance(np.abs(np.array([x]) - at), values)[0]
    assert values.min() - 1e-12 <= found <= values.max() + 1e-12


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(-3, 3), st.floats(-3, 3))
def test_between_two_points_interpolation_is_monotone(at, left, right):
    at = np.sort(at)
    found = inverse_distance(np.column_stack([at, 1 - at]), np.array([left, right]))
    assert (np.diff(found) * np.sign(right - left) >= -1e-9).all()


@given(st.lists(st.tuples(positive, positive), min_size=3, max_size=8), positive, positive)
def test_costs_that_add_up_are_found(quantities, a, b):
    q = np.array(quantities)
    found = nonnegative(q, q @ [a, b])
    assert (found >= 0).all()
    assert q @ found == pytest.approx(q @ [a, b], rel=1e-6)


@given(st.lists(st.tuples(positive, positive, positive), min_size=2, max_size=8))
def test_coefficients_are_never_negative(rows):
    q = np.array(rows)
    assert (nonnegative(q[:, :2], q[:, 2]) >= 0).all()


def test_the_host_is_what_the_operators_leave():
    steps = [
        (1e-3 + 5e-6 * n + 2e-6 * v, 1e-3, n, v, c) for n, v, c in ((10, 4, 3), (50, 9, 2), (7, 90, 8), (9, 1, 30))
    ]
    rows = {x.name: x for x in overhead.fit(steps, threads=1, co_runners=1)}
    assert rows["operator"].seconds == pytest.approx(5e-6)
    assert rows["view"].seconds == pytest.approx(2e-6)
    assert overhead.seconds(rows, operators=20, views=10, calls=5) == pytest.approx(20 * 5e-6 + 10 * 2e-6)


# -- pricing -----------------------------------------------------------------------------------------------------------


def test_a_step_of_measured_operators_is_their_sum():
    step = traced()
    table = [row(x, 1e-6 * (i + 1)) for i, x in enumerate({key(x): x for x in step}.values())]
    known = {key(x): x.seconds for x in table}
    found = price(replace(step, parameter_B={}), table, threads=1, co_runners=1)
    assert found.seconds["backward"] == pytest.approx(
        sum(known[key(x)] for x in step if x.phase == "backward" and x.name != "ones_like")
    )
    assert found.shares["hit"] == pytest.approx(1)
    assert 0 < found.error_s <= 0.1 * found.total_s * (1 + 1e-9)


@given(st.integers(1, 4096), st.sampled_from(["forward", "backward"]))
def test_between_measured_batches_a_time_is_positive_and_in_the_range_of_their_corrections(batch, phase):
    linear = [x for n in (4, 64, 1024) for x in LINEAR[n]]
    table = Table(row(x, 1e-6 + x.flops / 1e9) for x in linear)
    x = replace(linear[0], operands=((16,), (batch, 8), (8, 16)), results=((batch, 16),), phase=phase,
                flops=2 * batch * 8 * 16, written_B=64 * batch)  # fmt: skip
    seconds, error = table.between(x)
    assert seconds == pytest.approx(1e-6 + x.flops / 1e9, rel=0.05)  # what the roofline gives exactly, stays
    assert error < 0.05


LINEAR = {
    n: [x for x in count(torch.nn.Linear(8, 16), torch.zeros(n, 8), None, lambda y, t: y.sum()) if x.name == "addmm"]
    for n in (4, 64, 1024)
}


def test_an_operator_that_nobody_has_measured_has_the_roofline_of_all():
    step = traced()
    table = [row(x, 1e-5) for x in step if x.name != "relu"]
    found = price(replace(step, parameter_B={}), table, threads=1, co_runners=1)
    assert found.shares["fallback"] > 0
    assert found.total_s > 0


def test_rows_of_other_threads_are_not_used():
    step, device = traced(), load("laptop").device
    table = [row(x, 1.0) for x in step]
    found = price(step, table, threads=2, co_runners=1, device=device)
    assert found.shares == {"hit": 0, "interpolation": 0, "fallback": pytest.approx(1)}
    assert found.total_s < 1.0
    with pytest.raises(BadInput, match=r"threads=2 and co_runners=1.*device"):
        price(step, table, threads=2, co_runners=1)


def test_an_update_is_known_by_what_it_does():
    adam, momentum = optimizers.trial("adam"), optimizers.trial("sgd(lr=0.1, momentum=0.9)")
    assert updates.of(adam, [8, 4]).name == "update:adam"
    assert updates.of(momentum, [8, 4]).name == "update:sgd+momentum"
    assert updates.of(adam, [8, 4]).moved_B == 4 * 12 * (4 + 3)  # parameter, gradient and two of state


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_networks_of_every_kind_come_before_a_second_batch_of_any():
    todo = cells()
    assert len({x.network for x in todo[: len(NETWORKS)]}) == len(NETWORKS)
    assert len(set(todo)) == len(todo) == sum(len(x.batches) for x in NETWORKS)
    assert {x.optimizer for x in todo} == set(OPTIMIZERS)


@pytest.mark.timeout(60)
def test_what_was_measured_is_all_hits():
    with team("single", 1, threads=1, allocator="plain") as here:
        found = here.run(f"{measuring.__name__}:work", 0.2, 2, [asdict(SMALL)])
    table = table_of(observed(found, [SMALL], 1, 1))
    found = price(traced(), table, threads=1, co_runners=1, optimizer=optimizers.trial(OPTIMIZERS[0]))
    host = found.seconds["host"] / found.total_s
    assert found.shares["hit"] == pytest.approx(1 - host)
    assert found.shares["fallback"] == 0
    assert all(s > 0 for k, s in found.seconds.items() if k != "host")
    assert {x.phase for x in table} == {"forward", "backward", "update", "host"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_traced_steps_of_every_network_are_what_runs():
    """Each operator of the trace is among those that passed the dispatcher of the real step."""
    first = [replace(x, batches=x.batches[:1]) for x in NETWORKS]
    seen = observe(12.0, 1, 1, first, rounds=1)
    for one in seen:
        found = price(
            count(one.cell.network.build(), *one.cell.network.samples(one.cell.batch), LOSS),
            table_of([one]), threads=1, co_runners=1, optimizer=optimizers.trial(one.cell.optimizer),
        )  # fmt: skip
        # A recurrent layer's two biases have one gradient, of which a trace makes a copy.
        assert found.shares["fallback"] < 0.01, one.cell
        assert found.shares["hit"] + found.seconds["host"] / found.total_s > 0.98, one.cell


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_co_runners_fill_one_table():
    table = measure(2.0, threads=1, co_runners=2, networks=[GRID])
    assert {(x.threads, x.co_runners) for x in table} == {(1, 2)}
    keys = [key(x) for x in table]
    assert len(set(keys)) == len(keys)


def test_nonsense_is_refused():
    with pytest.raises(BadInput, match="budget_s=0"):
        measure(0)


# -- how quick the machine is now --------------------------------------------------------------------------------------


class Steady:
    """A gauge that takes as many milliseconds as samples."""

    def __init__(self, cell):
        self.compute = lambda: 1e-3 * cell.batch


def gauges(then, threads=1):
    return [gauge.row(cell, then(cell.batch), 0.1, threads=threads, co_runners=1) for cell in gauge.GAUGES]


def test_how_quick_the_machine_is_is_the_geometric_mean_over_the_gauges(monkeypatch):
    monkeypatch.setattr(gauge, "Training", Steady)
    first, second, third = (cell.batch for cell in gauge.GAUGES)
    then = {first: 2e-3 * first, second: 1e-3 * second, third: 0.25e-3 * third}
    assert gauge.Gauge(gauge.then(gauges(then.get), 1, 1)).slower(0.0) == pytest.approx((0.5 * 1 * 4) ** (1 / 3))
    assert gauge.Gauge(gauge.then(gauges(then.get, threads=2), 1, 1)).slower(0.0) == 1.0


def test_a_table_without_gauges_changes_nothing():
    assert gauge.slower((row(next(iter(traced())), 1e-6),), 1, 1) == 1.0


def test_a_table_has_the_gauges_that_were_trained_and_prices_steps_as_without_them():
    rows = tuple(row(x, 1e-6) for x in {key(x): x for x in traced()}.values())
    step = (2e-3, 1e-3, 10, 4, 3)
    seen = [Observed(gauge.GAUGES[1], rows, step, (), (k * 1e-3,)) for k in (2, 3, 4)]
    seen.append(Observed(cells()[7], rows, step, ()))
    table = table_of(seen)
    (found,) = (x for x in table if x.phase == "gauge")
    assert (found.name, found.seconds) == (gauge.GAUGES[1].network.model, 3e-3)
    others = [x for x in table if x.phase != "gauge"]
    assert price(traced(), table, threads=1, co_runners=1) == price(traced(), others, threads=1, co_runners=1)


def test_a_step_on_a_slower_machine_takes_so_many_times_as_long():
    cost = StepCost(2.0, 0.5, 10, 100, 0.25, ((5.0, 1.5), (10.0, 2.0)))
    slow = cost.times(3)
    assert (slow.compute(7.5), slow.update(50), slow.rest_s) == (3 * cost.compute(7.5), 3 * cost.update(50), 0.75)
    assert slow.compute(5.0) == 4.5


def test_a_slot_is_as_slow_as_its_neighbours_together_and_a_stray_pulse_counts_for_nothing():
    slow = [2.0] * 10 + [3.0] * 11
    assert measuring.smoothed(slow) == pytest.approx([2 / 3] * 10 + [1.0] * 11)
    assert measuring.smoothed([1.0, 1.0, 1.0, 9.0, 1.0, 1.0]) == [1.0] * 6
    assert measuring.smoothed([4.0]) == [1.0]


def test_what_a_slot_of_a_slow_machine_took_is_told_as_it_would_have_been():
    running = measuring._Running(cells([SMALL])[0], 0.0)
    for slot in (0, 1):
        running.run_for(0.0, slot)
    as_taken, slow, second = (running.seen(slower) for slower in ([1.0, 1.0], [2.0, 2.0], [1.0, 4.0]))
    for a, b in zip(as_taken["rows"], slow["rows"], strict=True):
        assert b["seconds"] == pytest.approx(a["seconds"] / 2)
    assert slow["step"][:2] == pytest.approx([s / 2 for s in as_taken["step"][:2]])
    assert second["rounds"][0] == as_taken["rounds"][0]
    assert second["rounds"][1] == pytest.approx([s / 4 for s in as_taken["rounds"][1]])


class Counted:
    """A thousand samples; how many were asked for at a time, and in which threads."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 1000

    def rows(self, indices):
        assert indices.min() >= 0
        assert indices.max() < 1000
        self.asked.append((len(indices), torch.get_num_threads()))


def test_fetching_is_of_whole_batches_on_the_plans_threads(monkeypatch):
    ticks = itertools.accumulate(itertools.count())  # of four fetches the first takes 2 s, the others 4, 6 and 8
    monkeypatch.setattr(fetching, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    data, before = Counted(), torch.get_num_threads()
    found = fetching.fetch_s(data, 30, threads=3, seconds=0.0)
    assert data.asked == [(30, 3)] * fetching.FEWEST
    assert torch.get_num_threads() == before
    assert found == 6.0


def test_only_computing_is_slower_on_a_slower_machine_and_fetching_is_as_measured():
    cost = StepCost(2.0, 0.5, 10, 100)
    found = prediction.brought_up(prediction.Computed(cost, Delays((), 1, 0), "operators"), 3.0, 0.25).cost
    assert (found.compute_s, found.update_s, found.rest_s) == (6.0, 1.5, 0.25)


@pytest.mark.slow
def test_two_workers_gauge_this_machine():
    found = gauge.slower(tuple(replace(x, co_runners=2) for x in gauges(lambda n: 1.0)), 1, 2)
    assert 0 < found < 1  # nothing here takes a second
