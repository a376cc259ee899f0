"""Gradients, and parameters too, shared out unit by unit: equal to one worker, what is sent, what is in memory."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from manyhands.communication.reduction import slices
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch, Block
from manyhands.errors import BadInput, NonFiniteLoss
from manyhands.partition.data import DataReplica
from manyhands.partition.sharded.replica import ShardedReplica
from manyhands.partition.sharded.units import exchanged_B, units_of
from manyhands.partition.sharded.vector import Vector
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem

#: Why 1e-12: as in the contract test.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
#: So small that every layer of the models here is a unit.
SMALL_B = 64


def trained(comm, stage, spec, one_copy=True):
    """The parameters after all batches, of which this rank fills in its own elements; losses; bytes counted, declared.

    ``stage`` 0: nothing is shared out. ``one_copy``: as where memory is shared, whatever the transport.
    """
    model, optimizer = jobs.build(spec)
    loss, batches = jobs.LOSSES[spec["loss"]], jobs.batches(spec)
    options = {"common": True, "clip": spec["clip"], "micro_batches": spec["micro_batches"]}
    was, comm.shares_memory = comm.shares_memory, one_copy
    try:
        if stage:
            sample = jobs.rows(batches[0][0], 0, 1), batches[0][1][:1]
            replica = ShardedReplica(
                model, optimizer, loss, comm, stage=stage, sample=sample, unit_B=SMALL_B, **options
            )
        else:
            replica = DataReplica(model, optimizer, loss, comm, **options)
        worker = Synchronous(update="sharded").start(replica, comm)
        before, losses = comm.counters.sent_B("cut"), []
        for step, (inputs, target) in enumerate(batches):
            comm.step = step
            lo, hi = jobs.cut(len(target), comm.size, spec["shares"])[comm.rank]
            share = Batch(jobs.rows(inputs, lo, hi), target[lo:hi], hi - lo, len(target))
            losses.append(float(worker.step(share)))
    finally:
        comm.shares_memory = was
    parts = []
    for name, p in model.named_parameters():
        whole = torch.zeros(replica.blocks[name].shape, dtype=p.dtype) if name in replica.blocks else p.detach().clone()
        if name in replica.blocks:
            replica.blocks[name].put(p.detach(), whole)
        elif comm.rank:
            whole.zero_()
        parts.append(whole)
    declared = replica.sent_B() * len(batches) if stage else 0
    return jobs.vector(parts), losses, comm.counters.sent_B("cut") - before, declared


def together(results):
    return torch.stack([parameters for parameters, *_ in results]).sum(0)


CASES = {
    "clip": problem(optimizer="adam", clip=0.05),
    "decay": problem(optimizer="adamw", shares="uneven"),
    "two groups": problem(optimizer="nesterov"),
    "state before the first step": problem("conv", "adagrad"),
    "micro-batches": problem(optimizer="momentum", micro_batches=3),
    "more of them than samples": problem(optimizer="adam", micro_batches=4, shares="uneven"),
    "tied": problem("tied", "momentum", clip=0.1),
    "frozen": problem("frozen", "adamw"),
    "unused": problem("unused", "decay", clip=0.1),
    "used later": problem("used_later", "momentum"),
    "used by one": problem("routed", "adamw"),
    "two precisions": problem("mixed", "sgd", dtype="float32"),
    "counts for itself": problem(optimizer="adam", loss="tokens", micro_batches=2),
    "a sum": problem("regression", "small_sgd", "sum_l2"),
    "its own loss": problem("own_loss", "adam", "own"),
}


#: Per commit stage 2 where it is about gradients and the update, stage 3 where it is about parameters too.
AT_2 = ("clip", "decay", "two groups", "micro-batches", "used later", "used by one", "two precisions", "a sum")
AT_3 = (
    *("clip", "state before the first step", "micro-batches", "more of them than samples", "tied", "frozen", "unused"),
    *("used later", "counts for itself", "its own loss"),
)


@pytest.mark.parametrize(
    ("case", "stage", "one_copy"),
    [
        pytest.param(case, *stage, marks=[] if case in quick else [pytest.mark.slow])
        for case in CASES
        for *stage, quick in ((2, True, AT_2), (3, False, AT_3))
    ],
)
def test_workers_equal_one_on_the_joined_batch(case, stage, one_copy):
    assert_equal_to_one(SimulatedWorld(3).run(trained, stage, CASES[case], one_copy), CASES[case])


@pytest.mark.parametrize(("stage", "one_copy"), [(2, False), (3, True)], ids=str)
@pytest.mark.parametrize("size", [2, 9])  # with nine some hold nothing
def test_also_where_each_has_memory_of_its_own_or_all_have_one(size, stage, one_copy):
    spec = CASES["more of them than samples"]
    assert_equal_to_one(SimulatedWorld(size).run(trained, stage, spec, one_copy), spec)


@pytest.mark.parametrize(
    ("on", "stage"),
    [
        ("shared", 3),
        ("gloo", 3),
        *(pytest.param(on, stage, marks=pytest.mark.slow) for on in ("threads", "mpi") for stage in (2, 3)),
        *(pytest.param(on, 2, marks=pytest.mark.slow) for on in ("shared", "gloo")),
    ],
)
def test_on_other_transports_too(on, stage):
    for spec in (CASES["clip"], CASES["used by one"]):
        one_copy = on in ("shared", "threads")
        assert_equal_to_one(run_ranks(trained, 2, on=on, args=(stage, spec, one_copy)), spec)


def assert_equal_to_one(results, spec):
    expected = jobs.plain({**spec, "micro_batches": 1, "shares": "even", "delays": None})
    tolerance = 1e-6 if spec["model"] == "mixed" else 1e-12  # which is partly float32
    torch.testing.assert_close(together(results), expected["parameters"][-1], rtol=tolerance, atol=tolerance)
    for _, losses, counted, declared in results:
        assert losses == pytest.approx(results[0][1], rel=1e-12), "every worker knows the loss of all"
        assert counted == declared


def test_batchnorm_normalises_within_a_share_as_in_data_parallelism():
    spec = problem("norm", "adam")
    plain = SimulatedWorld(2).run(trained, 0, spec)[0][0]
    for stage in (2, 3):
        torch.testing.assert_close(together(SimulatedWorld(2).run(trained, stage, spec, False)), plain, **EXACT)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_stops_every_worker_at_the_same_step(stage):
    def run(comm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        optimizer, sample = torch.optim.SGD(model.parameters(), lr=0.1), (torch.zeros(1, 4), torch.zeros(1, 2))
        replica = ShardedReplica(model, optimizer, F.mse_loss, comm, stage=stage, sample=sample, common=True)
        worker = Synchronous(update="sharded").start(replica, comm)
        x = torch.ones(2, 4) if comm.rank else torch.full((2, 4), torch.nan)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(NonFiniteLoss):
            worker.step(Batch(x, torch.zeros(2, 2), 2))
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert SimulatedWorld(2).run(run) == [True, True], "and nobody has applied anything"


# -- what is in memory -------------------------------------------------------------------------------------------------


def deep(layers=6):
    torch.manual_seed(1)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(32, 32), nn.Tanh())))


@pytest.mark.slow
def test_of_all_units_one_at_a_time_is_in_memory(monkeypatch):
    """Also while autograd has a graph that was made with all of them."""
    gathered, most = [], [0]
    make = Vector._empty

    def noted(self, numel):
        made = make(self, numel)
        if numel == self.numel:
            gathered.append(weakref.ref(made.untyped_storage()))
            gc.collect()
            most[0] = max(most[0], sum(storage() is not None for storage in gathered))
        return made

    monkeypatch.setattr(Vector, "_empty", noted)

    def run(comm):
        comm.shares_memory = False
        model = deep()
        sample = torch.zeros(1, 32), torch.zeros(1, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replica = ShardedReplica(
            model, optimizer, F.mse_loss, comm, stage=3, sample=sample, unit_B=SMALL_B, common=True
        )
        assert len(replica.units.units) == 6
        gathered.clear()
        most[0] = 0
        replica.gradients(Batch(torch.ones(4, 32), torch.zeros(4, 32), 4))
        return sum(p.numel() for p in model.parameters()), [p.flat.numel() for p in replica.pieces]

    ((held, pieces),) = SimulatedWorld(1).run(run)
    assert held == sum(pieces)
    assert len(gathered) == 2 * 6, "each before its forward and before its backward"
    assert most[0] == 1


@given(numel=st.integers(0, 400), size=st.integers(1, 7))
def test_parts_of_a_tensor_tile_it_in_whatever_order_it_lies(numel, size):
    columns = max(1, numel // 7)
    for whole in (torch.arange(7.0 * columns).view(7, columns), torch.arange(7.0 * columns).view(columns, 7).t()):
        found, places = torch.full((7, columns), -1.0), []
        for lo, hi in slices(whole.numel(), size):
            block = Block.run(whole, lo, hi, axis="data")
            part = block.take(whole)
            assert part.shape == (hi - lo,)
            assert block.numel == block.own == hi - lo
            assert block.places().tolist() == list(range(lo, hi)), "one run in memory"
            block.put(part, found)
            places += block.places().tolist()
        assert torch.equal(found, whole)
        assert len(places) == whole.numel()


def test_a_number_stays_one_where_it_is_held():
    number = torch.tensor(3.0)
    assert Block.run(number, 0, 1, axis="data").take(number).shape == ()
    assert Block.run(number, 0, 0, axis="data").take(number).shape == (0,)


# -- bytes -------------------------------------------------------------------------------------------------------------


@given(size=st.integers(2, 8), units=st.lists(st.integers(1, 50), min_size=1, max_size=6), passes=st.integers(1, 4))
def test_payload_is_that_of_data_parallelism_and_half_as_much_again(size, units, passes):
    units_B = [n * size for n in units]
    once = sum(units_B) * (size - 1) // size
    assert exchanged_B(2, units_B, [], size) == exchanged_B(2, [], units_B, size) == 2 * once
    assert exchanged_B(3, units_B, [], size) == 3 * once
    assert exchanged_B(3, units_B, [], size, passes) == passes * 3 * once
    assert exchanged_B(2, units_B, [], size, passes) == (1 + passes) * once


# -- units -------------------------------------------------------------------------------------------------------------


def found(model, *given, unit_B=SMALL_B, **options):
    division = units_of(model, given, unit_B=unit_B, **options)
    named = [name for unit in division.units for name in unit.parameters] + list(division.kept)
    assert sorted(named) == sorted(n for n, p in model.named_parameters() if p.requires_grad), "each exactly once"
    return [unit.modules for unit in division.units], set(division.kept)


@given(widths=st.lists(st.integers(1, 20), min_size=2, max_size=6), unit_B=st.integers(1, 4000))
def test_units_follow_each_other_and_are_no_larger_than_they_may_be(widths, unit_B):
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers)
    size = {str(k): 4 * (layer.in_features + 1) * layer.out_features for k, layer in enumerate(layers)}
    size[""] = sum(size.values())
    modules, kept = found(model, torch.zeros(1, widths[0]), unit_B=unit_B)
    assert not kept
    order = [path for unit in modules for path in unit]
    assert order in ([""], [str(k) for k in range(len(layers))])
    assert all(len(unit) == 1 or sum(size[path] for path in unit) <= max(unit_B, size[""] // 16) for unit in modules)


class Custom(nn.Module):
    """A table that is used again as the last layer, a layer called twice, a list of modules, and a parameter around."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.position = nn.Embedding(4, 8)
        self.twice = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.never = nn.Linear(8, 8)

    def forward(self, x):
        h = self.table(x) + self.position.weight[: x.shape[1]]
        h = self.twice(self.twice(h))
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.recurrent(h)[0] * self.scale, self.table.weight)


def test_what_several_modules_use_is_kept_through_a_step():
    modules, kept = found(Custom(), torch.zeros(1, 4, dtype=torch.int64), unit_B=2400)
    assert modules == [("layers.0",), ("layers.1",), ("recurrent",)]
    assert kept == {
        *("table.weight", "position.weight", "twice.weight", "twice.bias", "scale"),
        *("never.weight", "never.bias"),
    }


def test_a_model_is_watched_without_being_touched():
    model = Custom().train()
    buffers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    state, before = {n: value.clone() for n, value in buffers.state_dict().items()}, torch.get_rng_state()
    found(model, torch.zeros(1, 4, dtype=torch.int64))
    found(buffers, torch.ones(1, 3))
    assert torch.equal(before, torch.get_rng_state()), "dropout has drawn, from numbers that were put back"
    assert all(torch.equal(value, buffers.state_dict()[name]) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *buffers.modules()))


class Turned(nn.Module):
    """The order of its layers depends on the data."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.one(self.other(x)) if x.sum() > 5 else self.other(self.one(x))


def test_a_model_whose_order_depends_on_the_data_is_refused_where_it_shows():
    def run(comm):
        model = Turned()
        optimizer, sample = torch.optim.SGD(model.parameters(), lr=0.1), (torch.zeros(1, 8), torch.zeros(1, 8))
        replica = ShardedReplica(
            model, optimizer, F.mse_loss, comm, stage=3, sample=sample, unit_B=SMALL_B, common=True
        )
        with pytest.raises(BadInput, match="one is called again after other"):
            replica.gradients(Batch(torch.ones(1, 8), torch.zeros(1, 8), 1))
        assert [tuple(p.shape) for p in model.parameters()] == [(64,), (8,), (64,), (8,)], "as between steps"

    SimulatedWorld(1).run(run)


def test_a_layer_that_computes_anew_in_backward_is_gathered_for_it():
    """torch's checkpointing calls modules again in the middle of a backward."""

    class Anew(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = deep(3)

        def forward(self, x):
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    def run(comm, stage):
        comm.shares_memory = False
        model = Anew()
        sample, x = (torch.zeros(1, 32), torch.zeros(1, 32)), torch.linspace(-1, 1, 64).view(2, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replica = ShardedReplica(
            model, optimizer, F.mse_loss, comm, stage=stage, sample=sample, unit_B=SMALL_B, common=True
        )
        replica.gradients(Batch(x, torch.zeros(2, 32), 2))
        return [p.grad.clone() for p in model.parameters()]

    plain, x = Anew(), torch.linspace(-1, 1, 64).view(2, 32)
    F.mse_loss(plain(x), torch.zeros(2, 32)).backward()
    for stage in (2, 3):
        (grads,) = SimulatedWorld(1).run(run, stage)
        for grad, p in zip(grads, plain.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad.view(-1))
