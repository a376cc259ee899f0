"""Real gradients in virtual time: the same numbers as training, whatever the clock."""

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.errors import BadInput, InvalidPlan, NonFiniteLoss, UnknownName
from manyhands.simulation import values
from manyhands.simulation.batched import FEWEST

LATE = "lognormal(sigma=0.5)"


def task(**changes):
    said = {"model": "perceptron(hidden=8)", "data": "digits(limit=300)", "batch_size": 48, "epochs": 1, "seed": 3}
    return mh.Task(**said | changes)


def simulate(strategy="synchronous", workers=3, said=None, **more):
    return mh.simulate(said or task(), mh.Plan(strategy=strategy, workers=workers), **{"compute_s": 0.01} | more)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("transport", ["threads", pytest.param("shared", marks=pytest.mark.slow)])
def test_two_virtual_workers_train_what_two_real_ones_do(transport):
    said = task(epochs=2, optimizer="sgd(lr=0.1, momentum=0.9)", schedule="cosine", clip=1.0)
    real = mh.train(said, mh.Plan(workers=2, transport=transport), progress=False)
    virtual = simulate(workers=2, said=said)
    assert same(real.state, virtual.state)
    for mine, theirs in zip(virtual.history, real.history, strict=True):
        for name in ("epoch", "step", "samples", "train_loss", "test_accuracy"):
            assert mine[name] == theirs[name]
        assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-6)  # a sum over shares there
    assert virtual.summary.sent_B_per_step == real.summary.sent_B_per_step


def test_one_virtual_worker_is_plain_training():
    real = mh.train(task(), mh.Plan(workers=1), progress=False)
    assert same(real.state, simulate(workers=1).state)


@pytest.mark.parametrize("strategy", ["synchronous", "local(every=3)"])
def test_who_is_late_changes_times_and_nothing_else_in_lock_step(strategy):
    calm, late = simulate(strategy), simulate(strategy, stragglers=LATE)
    assert same(calm.state, late.state)
    assert late.summary.wall_s > calm.summary.wall_s


@pytest.mark.parametrize("strategy", ["asynchronous", "ssp(staleness=2)", "hogwild", "gossip", "elastic"])
def test_races_are_replayed(strategy):
    first, again = (simulate(strategy, 4, stragglers=LATE) for _ in range(2))
    assert same(first.state, again.state)
    assert first.summary.as_dict() | {"peak_memory_B": 0} == again.summary.as_dict() | {"peak_memory_B": 0}
    assert first.summary.train_loss < 2.4


def test_asynchronous_gradients_are_as_stale_as_there_are_others():
    found = simulate("asynchronous", 6, said=task(batch_size=60, epochs=3))
    assert found.summary.staleness_mean == pytest.approx(5, abs=1.0)


def test_the_time_of_a_run_is_its_costs_and_prices():
    found = simulate(said=task(steps=4, epochs=None, batch_size=30), compute_s=0.5)
    parts = found.summary.step_parts_s
    assert parts.compute == pytest.approx(0.5)
    assert 0 < parts.communicate < 1e-3
    assert found.summary.wall_s == pytest.approx(4 * (parts.compute + parts.communicate + parts.wait))


# -- all at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["perceptron(hidden=8)", "cnn"])
def test_gradients_of_all_at_once_are_those_of_each(model, monkeypatch):
    said = task(model=model, batch_size=5 * FEWEST, steps=6, epochs=None)
    at_once = simulate(workers=FEWEST, said=said)
    monkeypatch.setattr(values, "FEWEST", 10**9)
    each = simulate(workers=FEWEST, said=said)
    assert at_once.notes == ()
    for name, value in each.state.items():
        assert torch.allclose(at_once.state[name], value, rtol=1e-4, atol=1e-6), name
    assert at_once.summary.train_loss == pytest.approx(each.summary.train_loss, rel=1e-5)
    assert at_once.summary.step_s == each.summary.step_s


def dropping(inputs, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, classes))


def normalising(inputs, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, classes))


@pytest.mark.parametrize("model", [dropping, normalising])
def test_what_cannot_be_batched_goes_one_by_one(model):
    found = simulate(workers=FEWEST, said=task(model=model, batch_size=5 * FEWEST, steps=4, epochs=None))
    assert "one after the other" in found.notes[0]
    assert found.summary.train_loss > 0


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_its_virtual_time_and_at_its_target():
    early = simulate(said=task(epochs=50, seconds=0.5), evaluate=10)
    assert 0.5 <= early.history[-1]["train_s"] < 1.0
    reached = simulate(said=task(epochs=50, target_accuracy=0.3), evaluate=5)
    assert reached.history[-1]["test_accuracy"] >= 0.3 > reached.history[-2]["test_accuracy"]


def test_a_loss_that_is_not_finite_stops_all():
    with pytest.raises(NonFiniteLoss):
        simulate(said=task(optimizer="sgd(lr=1e30)"))


def test_failures_move_the_records_on_the_wall():
    found = simulate(
        said=task(epochs=3), failures="failures(mtbf_s=0.1, checkpoint_s=0.002, restart_s=0.05, every_s=0.05)"
    )
    assert found.failures.failures > 0
    assert found.summary.wall_s == found.failures.wall_s[-1]
    assert all(record["wall_s"] >= record["train_s"] for record in found.history)


def test_a_cost_that_is_not_given_is_measured():
    found = simulate(compute_s=None, said=task(steps=2, epochs=None))
    assert found.cost.update_s > 0
    assert found.summary.step_parts_s.compute == pytest.approx(found.cost.compute_s, rel=0.1)


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compute_s": -1.0}, "compute_s=-1.0"),
        ({"compute_s": None, "update_s": 1.0}, "Give compute_s"),
        ({"evaluate": "end"}, "evaluate='end'"),
        ({"cluster": "ethernet_10"}, "Did you mean 'ethernet_10g'"),
        ({"cluster": "laptop"}, "no link 'between'"),
        ({"stragglers": "lognormal(sigma=0)"}, "sigma=0"),
        ({"failures": "failures(mtbf_s=1e-9)"}, "would not end"),
        ({"sizes": True, "said": task(seconds=1.0)}, "the length that it is given"),
    ],
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises((BadInput, InvalidPlan, UnknownName), match=says):
        simulate(**changes)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (mh.Plan(workers=32, strategy="hogwild"), "hogwild on transport=simulated"),
        (mh.Plan(workers=2, transport="gloo"), "choose a cluster"),
        (mh.Plan(workers=2, mesh="data=1,tensor=2"), "not simulated yet"),
    ],
)
def test_a_plan_that_is_not_simulated_is_refused(plan, says):
    with pytest.raises((BadInput, InvalidPlan), match=says):
        mh.simulate(task(), plan, compute_s=0.01)
