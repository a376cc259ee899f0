"""The optimizer asked for by bounds: slices of updates are whole updates, and state survives another cut."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.transports.single import SingleCommunicator
from manyhands.contract import Batch
from manyhands.models.optimizers import ELEMENTWISE
from manyhands.partition.data import DataReplica
from manyhands.partition.update import strides_of

MAKERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "sgd, decay": functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.03),
    "sgd, momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sgd, dampened": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.03),
    "sgd, nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
    "sgd, maximize": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, maximize=True),
    "sgd, tensor lr": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.1), momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adam, amsgrad": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, initial_accumulator_value=0.3, lr_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "rmsprop, centered": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}
#: One of each class, with most in its state, and the rate that is a tensor: per commit where state is looked at. The
#: others are where updates in slices are, which these do too from the stop on.
OF_EACH_CLASS = (
    *("sgd, dampened", "sgd, tensor lr", "adam, amsgrad", "adamw", "adagrad", "rmsprop, centered"),
    *("adadelta", "adamax", "nadam", "radam", "rprop", "asgd"),
)
#: With and without decay and momentum, and rules that count steps.
MOVE_WITHOUT_GRADIENT = (
    "sgd, decay",
    "sgd, nesterov",
    "adam",
    "adamw",
    "adagrad",
    "rmsprop, centered",
    "radam",
    "asgd",
)
STEPS = 7  # RAdam changes its rule at the sixth


def makers(names):
    """All of `MAKERS`, slow but for those with these names."""
    marked = ((name, maker, [] if name in names else [pytest.mark.slow]) for name, maker in MAKERS.items())
    return pytest.mark.parametrize("maker", [pytest.param(m, marks=marks, id=name) for name, m, marks in marked])


class Model(nn.Module):
    """A matrix, a vector, a channels-last kernel, and a matrix that is used only when asked."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.rand(shape, generator=generator) - 0.5)

        self.matrix, self.vector = parameter(7, 9), parameter(13)
        self.kernel = nn.Parameter(parameter(4, 3, 2, 2).detach().contiguous(memory_format=torch.channels_last))
        self.spare = parameter(5, 4)


NUMEL = 7 * 9 + 13 + 48 + 20
SPARE = slice(NUMEL - 20, NUMEL)


def gradients(step: int, *, spare: bool) -> torch.Tensor:
    flat = torch.rand(NUMEL, generator=torch.Generator().manual_seed(100 + step)) - 0.5
    if not spare:
        flat[SPARE] = 0
    return flat


def groups(model: Model, grouped: bool) -> list:
    if not grouped:
        return list(model.parameters())
    return [{"params": [model.matrix, model.vector]}, {"params": [model.kernel, model.spare], "lr": 0.03}]


def whole(maker, steps: int = STEPS, *, grouped: bool = False, spare_from: int = 0) -> list[torch.Tensor]:
    """torch's own ``step()`` on whole parameters; flat values after every step."""
    model, result = Model(), []
    optimizer = maker(groups(model, grouped))
    for step in range(steps):
        at, flat = 0, gradients(step, spare=step >= spare_from)
        for p in model.parameters():
            if p is not model.spare or step >= spare_from:
                p.grad = torch.empty_like(p)
                p.grad.as_strided((p.numel(),), (1,)).copy_(flat[at : at + p.numel()])
            at += p.numel()
        vary(optimizer, step)
        optimizer.step()
        result.append(values(model))
    return result


def vary(optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a schedule does: it sets the user's own optimizer."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(0.9)
        else:
            group["lr"] *= 0.9 + 0.01 * step


def values(model: Model) -> torch.Tensor:
    """In memory order."""
    return torch.cat([p.detach().as_strided((p.numel(),), (1,), p.storage_offset()) for p in model.parameters()])


def replica_of(model: Model, maker, *, grouped: bool = False) -> DataReplica:
    return DataReplica(model, maker(groups(model, grouped)), None, SingleCommunicator(), common=True)


def update(replica: DataReplica, step: int, cuts: list[int], *, spare_from: int = 0, varied: bool = True) -> None:
    """One step in slices: each piece is cut where ``cuts`` fall."""
    flat, at = gradients(step, spare=step >= spare_from), 0
    for span in (s for group in replica._spans for s in group):  # as the replica finds out in backward
        span.unused = span.parameter is replica.model.spare and step < spare_from
    if varied:
        vary(replica.optimizer, step)
    for piece in replica.pieces:
        n = piece.flat.numel()
        piece.grad.copy_(flat[at : at + n])
        bounds = sorted({0, n, *(c - at for c in cuts if 0 < c - at < n)})
        for lo, hi in itertools.pairwise(bounds):
            replica.apply(piece, lo, hi)
        at += n


cut_points = st.lists(st.integers(0, NUMEL), max_size=5)


def test_every_optimizer_that_works_element_by_element_is_tried_here():
    model = Model()
    assert {type(maker(list(model.parameters()))) for maker in MAKERS.values()} == ELEMENTWISE


@makers([*(name for name in MAKERS if name not in OF_EACH_CLASS), "adamw", "radam"])
@given(cuts=cut_points, grouped=st.booleans())
@settings(max_examples=15)
def test_slices_of_updates_are_the_whole_update_bit_for_bit(maker, cuts, grouped):
    model = Model()
    replica = replica_of(model, maker, grouped=grouped)
    for step, expected in enumerate(whole(maker, grouped=grouped)):
        update(replica, step, cuts)
        assert torch.equal(values(model), expected), f"after step {step}"


@makers(OF_EACH_CLASS)
@given(first=cut_points, second=cut_points, at=st.integers(1, STEPS - 1))
@settings(max_examples=15)
def test_state_goes_on_exactly_under_another_cut(maker, first, second, at):
    model = Model()
    before = replica_of(model, maker)
    for step in range(at):
        update(before, step, first)
    state = before.optimizer_state()
    again = Model()
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    after = replica_of(again, maker)
    for group, was in zip(after.optimizer.param_groups, before.optimizer.param_groups, strict=True):
        group["lr"] = was["lr"]
    after.load_optimizer_state(state)
    expected = whole(maker)
    for step in range(at, STEPS):
        update(after, step, second)
        assert torch.equal(values(again), expected[step]), f"after step {step}"


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@given(cuts=cut_points)
@settings(max_examples=5)
def test_the_slices_of_state_tile_each_parameter_once(maker, cuts):
    model = Model()
    replica = replica_of(model, maker)
    update(replica, 0, cuts)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    covered: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for s in replica.optimizer_state():
        if s.lo >= 0:
            assert s.values.numel() == s.hi - s.lo
            covered.setdefault((s.parameter, s.key), []).append((s.lo, s.hi))
    for (name, _), parts in covered.items():
        at = 0
        for lo, hi in sorted(parts):
            assert lo == at
            at = hi
        assert at == sizes[name]


@makers(MOVE_WITHOUT_GRADIENT)
@given(cuts=cut_points)
@settings(max_examples=5)
def test_a_parameter_without_a_gradient_so_far_is_skipped_as_torch_skips_none(maker, cuts):
    model = Model()
    replica = replica_of(model, maker)
    start = model.spare.detach().clone()
    for step, expected in enumerate(whole(maker, spare_from=3)):
        update(replica, step, cuts, spare_from=3)
        assert torch.equal(values(model), expected), f"after step {step}"
        assert torch.equal(model.spare, start) == (step < 3)


def test_adagrads_initial_accumulator_reaches_every_slice():
    maker = MAKERS["adagrad"]
    replica = replica_of(Model(), maker)
    update(replica, 0, [10, 70, 90])
    sums = [s for s in replica.optimizer_state() if s.key == "sum"]
    flat = gradients(0, spare=True)
    assert sum(s.values.numel() for s in sums) == NUMEL
    lowest = min(float(s.values.min()) for s in sums)
    assert lowest >= 0.3
    total = sum(float(s.values.double().sum()) for s in sums)
    assert total == pytest.approx(0.3 * NUMEL + float(flat.double().square().sum()), rel=1e-6)  # float32 sums


def test_a_subclass_keeps_its_own_attributes_in_a_slice():
    class Halved(torch.optim.SGD):
        elementwise = True

        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.factor = 0.5

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-group["lr"] * self.factor)

    maker = functools.partial(Halved, lr=0.1)
    model = Model()
    replica = replica_of(model, maker)
    before = values(model)
    update(replica, 0, [50], varied=False)
    assert torch.equal(values(model), before.add(gradients(0, spare=True), alpha=-0.05))


def test_a_whole_tensor_optimizer_sees_whole_tensors_in_their_own_shape():
    seen = []

    class Looks(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            seen.extend((tuple(p.shape), p.stride(), p.grad.stride()) for p in self.param_groups[0]["params"])

    model = Model()
    replica = replica_of(model, Looks)
    piece = replica.pieces[0]
    piece.grad.copy_(gradients(0, spare=True))
    replica.apply(piece, 0, NUMEL)
    assert seen == [(tuple(p.shape), p.stride(), p.stride()) for p in Model().parameters()]


@pytest.mark.parametrize(
    ("tensor", "kept"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.empty(3, 8)[:, ::2], False),
        (torch.empty(1, 4), True),
        (torch.empty(()), True),
        (torch.empty(4).expand(3, 4), False),
    ],
)
def test_strides_are_kept_where_they_fill_memory_densely(tensor, kept):
    strides = strides_of(tensor)
    assert (strides == tensor.stride()) == kept
    assert torch.empty(tensor.numel()).as_strided(tensor.shape, strides).numel() == tensor.numel()
    if not kept:
        assert strides == torch.empty(tensor.shape).stride()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resuming_does_not_forget_that_a_parameter_was_in_use(momentum):
    """In the first step after a resume no sample reaches ``spare``; weight decay must go on all the same."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.first(x) + (self.spare(x) if x[0, 0] > 0 else 0)

    def made():
        torch.manual_seed(0)
        model = Gate()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=momentum)
        loss = nn.functional.mse_loss
        return model, DataReplica(model, optimizer, loss, SingleCommunicator(), common=True)

    def step(replica, sign):
        x = torch.ones(4, 3) * sign
        replica.gradients(Batch(x, torch.zeros(4, 2), 4))
        for piece in replica.pieces:
            replica.apply(piece, 0, piece.flat.numel())

    straight, replica = made()
    for sign in (1, -1):
        step(replica, sign)
    stopped, replica = made()
    step(replica, 1)
    resumed, again = made()
    resumed.load_state_dict(stopped.state_dict())
    again.load_optimizer_state(replica.optimizer_state())
    step(again, -1)
    assert torch.equal(resumed.spare.weight, straight.spare.weight)
