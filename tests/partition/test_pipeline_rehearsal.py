"""A traced stage that would train another model is refused by name, what is asked of the model leaves no trace."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import manyhands as mh
from manyhands.errors import BadInput
from manyhands.partition.pipeline import schedules
from manyhands.partition.pipeline.cut import cut, cut_points
from manyhands.partition.pipeline.rehearsal import rehearse


class Four(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.times = 0


class Plain(Four):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(x)
        y += self.c(x)
        return self.head(F.relu(F.dropout(x.detach(), 0.5) + y, inplace=True))


class Overwriting(Four):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(x * 2)
        x.add_(y)
        return self.head(x)


class NoGrad(Four):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.b(x))


class Counting(Four):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.head(self.b(self.stem(x)))


class RunningMean(Four):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.seen.mul_(0.9).add_(x.detach().mean())
        return self.head(self.b(x))


class Renamed(Four):
    def forward(self, x: Tensor) -> Tensor:
        r = x = self.stem(x)
        x += self.b(x * 2)
        return self.head(x.tanh() + r)


class OfPythons(Four):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.b(x) if random.random() < 2 else x)


class Numbered(Four):
    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return self.head(self.b(self.stem(x)) * self.times)


class Frozen(nn.Module):
    """What is not an operation, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


class Cured(Four):
    def __init__(self) -> None:
        super().__init__()
        self.c = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.c(self.stem(x))))


def two(model: nn.Module, at: str) -> None:
    rehearse(model, cut(model, at), schedules.load("gpipe")(2, 4), torch.randn(4, 8))


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (NoGrad, r"stem\.weight would be trained"),
        (Counting, "buffer seen is another"),
        (RunningMean, "buffer seen is another"),
        (Renamed, "its outputs are others"),
        (OfPythons, "other random numbers"),
        (Numbered, "its outputs are others"),
    ],
)
def test_a_cut_that_would_train_another_model_is_refused_by_name(made, what):
    torch.manual_seed(0)
    model = made()
    before, times = copy.deepcopy(model.state_dict()), model.times
    drawn, of_python = torch.get_rng_state(), random.getstate()
    with pytest.raises(BadInput, match=rf"cut before b would train another model.*{what}.*a module of its own"):
        rehearse(model, cut(model, "b"), schedules.load("gpipe")(2, 4), torch.ones(4, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.times, model.training, random.getstate()) == (times, True, of_python)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at", ["b", "c", "head"])
def test_stages_that_do_what_the_model_does_pass(at):
    for made in (
        Plain,
        Cured,
        lambda: nn.Sequential(*[nn.Linear(8, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 2)]),
    ):
        model = made()
        two(model, at if isinstance(model, Four) else "2")


def test_only_forwards_around_a_cut_are_taken_apart():
    model = nn.Sequential(nn.Linear(8, 8), Frozen(), nn.Linear(8, 8), nn.Linear(8, 3))
    assert [type(stage) for stage in cut(model, "2").stages] == [nn.Sequential] * 2
    assert "1.inner" not in cut_points(model, 2, torch.ones(2, 8))
    assert isinstance(cut(Cured(), "b").stages[0].get_submodule("c"), Frozen)
    with pytest.raises(BadInput, match=r"0\.weight would be trained"):
        two(model, "1.inner")


def test_a_stage_without_anything_to_train_is_never_chosen_and_refused_when_named():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3)
    )
    assert cut_points(model, 2, torch.ones(2, 8)) in (["2"], ["3"], ["4"])
    with pytest.raises(BadInput, match=r"has 5 parts .* 2 of them with trainable.* Ask for 2 stages or fewer"):
        cut_points(model, 3, torch.ones(2, 8))
    with pytest.raises(BadInput, match="stage 0 has no trainable parameters"):
        two(model, "1")


class Long(Four):
    """Asks for lengths, of a tensor and of its shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.stem(x))
        return self.head(y / len(x) * len(x.shape)).view(len(y), 3)


def test_len_is_an_operation():
    model = Long()
    first, second = cut(model, "head").stages
    for n in (2, 5):
        x = torch.randn(n, 8)
        assert torch.equal(second(first(x)), model(x))
    two(model, "head")


class Changing(nn.Module):
    """One buffer, used on both sides of a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


def test_a_changing_buffer_belongs_to_one_stage():
    with pytest.raises(BadInput, match=r"changes buffer norm\.running_mean, which stages 0 and 1 use"):
        two(Changing(), "b")


# -- trained -----------------------------------------------------------------------------------------------------------


class OnDigits(Overwriting):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def _trained(mesh: str, **how: object) -> mh.Result:
    torch.manual_seed(3)
    task = mh.Task(model=OnDigits(), data="digits", steps=3, batch_size=24)
    return mh.train(task, mh.Plan(mesh=mesh, transport="threads", **how), progress=False, evaluate="never")


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_received_may_be_overwritten(recompute):
    """The operation lies behind the cut, on what came over it."""
    part = _trained("pipeline=2", pipeline="gpipe(cut='b')", recompute=recompute).model.state_dict()
    for name, value in _trained("data=1").model.state_dict().items():
        torch.testing.assert_close(part[name], value, rtol=1e-5, atol=1e-6)  # float32: sums in another order


def test_too_few_micro_batches_and_a_pipedream_of_one_stage_are_noted():
    few = mh.verbs.outlined(
        mh.Task(model="perceptron", data="digits"), mh.Plan(mesh="pipeline=2", micro_batches=1, transport="threads")
    )
    assert any("micro_batches=1 on 2 workers never keeps all of them busy" in note for note in few.notes)
    alone = mh.verbs.outlined(
        mh.Task(model="perceptron", data="digits"), mh.Plan(strategy="pipedream", workers=1, transport="threads")
    )
    assert any("plain synchronous training" in note for note in alone.notes)
