"""The whole model as a replica: what it touches, what it refuses, and what it keeps to itself."""

import itertools
import logging

import pytest
import torch
from torch import nn

from manyhands.communication.topology import Mesh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.contract import Batch
from manyhands.errors import BadInput, ManyhandsError
from manyhands.partition.data import DataReplica

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
BATCH = Batch(X, X.flip(1), 6)
LOSS = nn.functional.mse_loss


def summed(outputs, target):
    return LOSS(outputs, target, reduction="sum"), None


summed.reduction = "sum"


class Model(nn.Module):
    """Two layers in the loss, one beside it, and whatever buffers a test wants."""

    def __init__(self, before=lambda model, x: None, **buffers):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.spare, self.last = (nn.Linear(2, 2) for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._before = before

    def forward(self, x):
        self._before(self, x)
        return self.last(torch.tanh(self.first(x)))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def replica(model, comm=None, optimizer=sgd, loss=LOSS, **options):
    return DataReplica(model, optimizer(model), loss, comm or SingleCommunicator(), common=False, **options)


def step(made, batch=BATCH):
    made.gradients(batch)
    for piece in made.pieces:
        made.apply(piece, 0, piece.flat.numel())


# -- gradients are local -----------------------------------------------------------------------------------------------


def test_gradients_waits_for_nobody():
    """A straggler's clock stays its own, and ranks may take unequal numbers of steps."""

    def run(comm):
        made = replica(Model(), comm)
        began = comm.now
        comm.elapse(100.0 * comm.rank)
        for _ in range(3 + 2 * comm.rank):
            comm.elapse(1.0)
            step(made)
        return comm.now - began

    assert SimulatedWorld(2).run(run) == [3.0, 105.0]


def test_a_parameter_nobody_reached_stays_and_the_watch_goes_on_until_all_are_settled():
    model = Model()
    made = replica(model, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.5))
    before = model.spare.weight.detach().clone()
    step(made)
    assert torch.equal(model.spare.weight, before)
    (seen,) = made.reached().values()
    assert seen.tolist() == [1, 1, 0, 0, 1, 1]
    made.settle({0: seen})
    assert made.watching
    made.settle({0: torch.ones(6)})  # another worker has used it
    assert not made.watching
    assert made.reached() == {}
    step(made)
    assert not torch.equal(model.spare.weight, before)


def test_a_forward_that_raises_leaves_no_hook_behind():
    def boom(model, x):
        raise RuntimeError("boom")

    model = Model(boom)
    made = replica(model)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="boom"):
            made.gradients(BATCH)
    assert not model.first.weight._post_accumulate_grad_hooks


# -- gradients stay where they are looked for --------------------------------------------------------------------------


def forget(model, x):
    model.zero_grad()


def test_zero_grad_in_a_forward_is_refused_by_the_parameters_name():
    with pytest.raises(BadInput, match=r"first\.weight .* zero_grad"):
        replica(Model(forget)).gradients(BATCH)


def test_a_hook_that_takes_the_gradient_away_is_refused():
    model = Model()
    model.last.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(BadInput, match=r"last\.bias"):
        replica(model).gradients(BATCH)


def test_a_gradient_replaced_later_is_found_within_as_many_steps_as_there_are_parameters():
    model = Model()
    made = replica(model)
    made.gradients(BATCH)
    made.settle({0: torch.ones(6)})
    for _ in range(9):
        made.gradients(BATCH)
    model.last.bias.grad = None

    def six_more():
        for _ in range(6):
            made.gradients(BATCH)

    with pytest.raises(BadInput, match=r"last\.bias"):
        six_more()


# -- parameters that the optimizer does not have -----------------------------------------------------------------------


def test_trainable_parameters_that_the_optimizer_leaves_out_are_alike_and_drop_their_gradients(caplog):
    def run(comm):
        model = Model()
        with torch.no_grad():
            model.first.weight.add_(comm.rank)
        made = replica(model, comm, optimizer=lambda m: torch.optim.SGD(m.last.parameters(), lr=0.1))
        norms = []
        for _ in range(3):
            step(made)
            norms.append(float(model.first.weight.grad.norm()))
        return model.first.weight.detach().clone(), norms

    with caplog.at_level(logging.WARNING):
        (a, norms), (b, _) = SimulatedWorld(2).run(run)
    assert torch.equal(a, b)
    assert max(norms) < 2 * norms[0]  # three steps' worth would be three times
    assert [r.message for r in caplog.records if "does not have" in r.message and "first.weight" in r.message]


def test_an_optimizer_of_frozen_parameters_only_is_refused():
    model = Model()
    model.requires_grad_(False)
    with pytest.raises(BadInput, match="no trainable parameter"):
        replica(model)


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_one_worker_touches_no_buffer():
    values = {
        "complex": torch.tensor([0.5 + 0.5j]),
        "sparse": torch.eye(3).to_sparse(),
        "small": torch.ones(2, dtype=torch.float8_e5m2),
    }
    model = Model(**values)
    replica(model)
    assert all(getattr(model, name) is value for name, value in values.items())


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.5 + 0.5j, 1 - 2j]),
        torch.tensor([1 + 2j], dtype=torch.complex128).conj(),
        torch.tensor([True, False]),
        torch.tensor([3, 250], dtype=torch.uint8),
        torch.tensor([2**40], dtype=torch.int64),
        torch.tensor([0.5, 2.0], dtype=torch.float8_e4m3fn),
        torch.ones(1).expand(4),
        torch.arange(6.0).view(2, 3).t(),
    ],
    ids=lambda v: f"{v.dtype}, strides {v.stride()}",
)
def test_every_worker_starts_with_rank_0s_buffers_of_any_dtype(value):
    def run(comm):
        model = Model(given=value.clone() if value.is_contiguous() else value)
        if comm.rank and value.is_contiguous():
            model.given.copy_(torch.zeros_like(value))
        replica(model, comm)
        return model.given.clone()

    for found in SimulatedWorld(3).run(run):
        assert found.dtype == value.dtype
        assert torch.equal(found.resolve_conj(), value.resolve_conj())


def test_a_buffer_that_cannot_be_shared_is_refused_by_name():
    def run(comm):
        replica(Model(table=torch.eye(3).to_sparse()), comm)

    with pytest.raises(ManyhandsError, match=r"Model's table is float32 in torch\.sparse_coo"):
        SimulatedWorld(2).run(run)


def test_a_buffer_put_in_another_ones_place_is_seen():
    def average(model, x):
        model.mean = 0.9 * model.mean + 0.1 * x.mean(0).detach()

    model = Model(average, mean=torch.zeros(2))
    made = replica(model)
    step(made)
    assert made.buffers[0] is model.mean
    assert torch.equal(made.buffers[0], 0.1 * X.mean(0))
    mine = model.mean
    with made.using([p.flat for p in made.pieces], [torch.ones(2)]) as other:
        assert torch.equal(other.mean, torch.ones(2))
        other(X)
    assert model.mean is mine
    assert torch.equal(mine, 0.1 * X.mean(0))


def test_buffers_come_in_the_order_of_named_buffers():
    shared = torch.zeros(1)
    model = nn.Sequential(nn.BatchNorm1d(2), Model(a=shared, b=None, c=torch.ones(2), d=shared))
    assert [id(b) for b in replica(model).buffers] == [id(b) for _, b in model.named_buffers()]
    assert replica(Model()).buffers == []


# -- bounds that change ------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.2),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.2),
}


@pytest.mark.parametrize("maker", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_follows_bounds_that_change(maker):
    model, theirs = Model(), Model()
    made, plain = replica(model, optimizer=lambda m: maker(m.parameters())), maker(theirs.parameters())
    numel = made.pieces[0].flat.numel()
    for cuts in ([0, numel], [0, 9, numel], [0, 3, 4, numel], [0, 9, numel], [0, numel], [0, 1, numel]):
        made.gradients(BATCH)
        for lo, hi in itertools.pairwise(cuts):
            made.apply(made.pieces[0], lo, hi)
        plain.zero_grad()
        LOSS(theirs(X), BATCH.target).backward()
        plain.step()
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    parts = {(s.parameter, s.key): 0 for s in made.optimizer_state() if s.lo >= 0}
    for s in made.optimizer_state():
        if s.lo >= 0:
            parts[s.parameter, s.key] += s.values.numel()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert all(sizes[name] == n for (name, _), n in parts.items())  # nothing forked, nothing lost


def test_elements_with_state_and_elements_without_are_not_joined():
    made = replica(Model(), optimizer=lambda m: OPTIMIZERS["momentum"](m.parameters()))
    made.gradients(BATCH)
    made.apply(made.pieces[0], 0, 2)
    with pytest.raises(AssertionError, match=r"first\.weight"):
        made.apply(made.pieces[0], 0, 4)


# -- state that is no tensor of a parameter's shape --------------------------------------------------------------------


def lbfgs(model):
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1, history_size=3)


def through_a_checkpoint(state):
    """As `training.state` hands it over: whole tensors, and only their dims tell what they are."""
    from manyhands.contract import StateSlice
    from manyhands.training.state import assemble

    return [
        StateSlice(name, key, *((0, v.numel()) if v.dim() else (-1, -1)), v.clone())
        for name, key, v in assemble([(s, {}) for s in state])
    ]


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_lbfgs_taken_up_equals_the_uninterrupted_run_bit_for_bit(at):
    going = replica(Model(), optimizer=lbfgs)
    for _ in range(at):
        step(going)
    again = replica(Model(), optimizer=lbfgs)
    again.pieces[0].flat.copy_(going.pieces[0].flat)
    again.load_optimizer_state(through_a_checkpoint(going.optimizer_state()))
    for _ in range(4):
        step(going)
        step(again)
        assert torch.equal(again.pieces[0].flat, going.pieces[0].flat)


class Keeps(torch.optim.SGD):
    """Keeps whatever it is given."""

    def __init__(self, params, what):
        super().__init__(params, lr=0.1)
        self.what = what

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("kept", self.what)


@pytest.mark.parametrize(
    "what",
    [3, True, 0.1, float("inf"), None, "text", [], [1, [2.0, None]], (1, "a"), {"a": {1: (2,)}}, {"tensor": 0}],
    ids=str,
)
def test_optimizer_state_comes_back_with_its_types(what):
    made = replica(Model(), optimizer=lambda m: Keeps(m.parameters(), what))
    step(made)
    state = through_a_checkpoint(made.optimizer_state())
    again = replica(Model(), optimizer=lambda m: Keeps(m.parameters(), "other"))
    again.load_optimizer_state(state)
    step(again)
    for kept in again._updates.slices[0, 0, 18]._clone.state.values():
        assert kept["kept"] == what
        assert type(kept["kept"]) is type(what)


def test_a_number_of_an_older_checkpoint_is_read():
    from manyhands.contract import StateSlice

    made = replica(Model(), optimizer=lambda m: Keeps(m.parameters(), "other"))
    made.load_optimizer_state([StateSlice("first.weight", "kept:number", -1, -1, torch.tensor(2.0).double())])
    step(made)
    assert next(iter(made._updates.slices[0, 0, 18]._clone.state.values()))["kept"] == 2.0


def test_state_that_cannot_be_stored_is_named_once_and_refused_at_resume(caplog):
    made = replica(Model(), optimizer=lambda m: Keeps(m.parameters(), object()))
    step(made)
    with caplog.at_level(logging.WARNING):
        state = made.optimizer_state()
        made.optimizer_state()
    assert sum("kept of first.weight" in r.message for r in caplog.records) == 1
    again = replica(Model(), optimizer=lambda m: Keeps(m.parameters(), 1))
    again.load_optimizer_state(through_a_checkpoint(state))
    with pytest.raises(BadInput, match=r"kept of parameter first\.weight could not be stored"):
        step(again)


# -- norms -------------------------------------------------------------------------------------------------------------


def test_the_norm_leaves_out_the_l2_term_of_what_no_update_touches():
    class Loss:
        l2 = 0.1

        def __call__(self, outputs, target):
            return LOSS(outputs, target)

    model, small = Model(), Model()
    with torch.no_grad():
        model.spare.weight.fill_(100.0)
    norms = []
    for m in (model, small):
        made = replica(m, loss=Loss(), clip=1.0)
        made.gradients(BATCH)
        bounds = [(0, 18)]
        made.add_l2(bounds)
        norms.append(made.norm(bounds))
    assert torch.equal(*norms)


def test_a_query_for_the_norm_changes_no_gradient():
    made = replica(Model())
    made._l2 = 0.1
    made.gradients(BATCH)
    before = made.pieces[0].grad.clone()
    made.norm([(0, 18)])
    assert torch.equal(made.pieces[0].grad, before)


def test_a_sum_is_scaled_by_the_data_axis_alone():
    def run(comm):
        comm.mesh = Mesh(data=2, tensor=2)
        made = replica(Model(), comm, loss=summed)
        made.gradients(BATCH)
        return made.pieces[0].grad.clone()

    alone = replica(Model(), loss=summed)
    alone.gradients(BATCH)
    for grad in SimulatedWorld(4).run(run):
        torch.testing.assert_close(grad, 2 * alone.pieces[0].grad)


# -- devices -----------------------------------------------------------------------------------------------------------


def test_one_worker_lays_a_model_out_on_the_models_own_device():
    made = replica(Model().to("meta"))  # in place of a GPU: the transport's memory is the host's
    assert {t.device.type for p in made.pieces for t in (p.flat, p.grad, *made.model.parameters())} == {"meta"}


def test_a_device_whose_memory_the_transport_does_not_move_is_refused():
    def run(comm):
        replica(Model().to("meta"), comm)

    with pytest.raises(ManyhandsError, match="model on meta with transport=simulated"):
        SimulatedWorld(2).run(run)
