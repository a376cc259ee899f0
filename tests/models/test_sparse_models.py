"""The models of sparse samples: their outputs are the formulas, a sample touches its own rows only, and they learn."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import manyhands as mh
from manyhands.data import Splits, load
from manyhands.errors import BadInput
from manyhands.models import build, models
from manyhands.models.losses import SquaredError, accuracy

SPARSE = [name for name in models if getattr(models.load(name), "data", None) in ("sparse_logistic", "ratings")]


def matched(name: str, options: str = "") -> tuple[nn.Module, Splits]:
    """The model and the data that it says it takes."""
    splits = load(models.load(name).data)
    return build(name + options, inputs=splits.inputs, classes=splits.classes), splits


def test_there_is_one_for_each_sparse_problem():
    assert SPARSE == ["sparse_logistic", "factorisation"]


def test_sparse_logistic_is_the_dense_one_on_samples_written_out():
    model, splits = matched("sparse_logistic")
    (indices, values), target = splits.train.rows(torch.arange(40))
    (weight,) = model.parameters()
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(1))
    dense = torch.zeros(40, 2000).scatter_(1, indices, values)
    z = dense @ weight.detach()[:, 0]
    outputs = model((indices, values))
    # A sum of ten numbers of order 1 in float32.
    assert torch.allclose(outputs, torch.stack([torch.zeros(40), z], 1), atol=1e-5)
    y = 2.0 * target - 1
    assert F.cross_entropy(outputs, target).item() == pytest.approx(torch.log1p(torch.exp(-y * z)).mean().item(), 1e-5)


def test_factorisation_multiplies_a_users_row_by_an_items():
    model, splits = matched("factorisation", "(rank=3)")
    rows, _ = splits.train.rows(torch.arange(40))
    left, right = model.table.weight[:300], model.table.weight[300:]
    whole = left @ right.T
    assert torch.allclose(model(rows)[:, 0], whole[rows[:, 0], rows[:, 1] - 300], atol=1e-6)


@pytest.mark.parametrize("name", SPARSE)
def test_a_sample_touches_its_own_rows_and_no_others(name: str):
    model, splits = matched(name)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    inputs, _ = splits.train.rows(torch.tensor([7]))
    model(inputs).sum().backward()
    (gradient,) = (p.grad.to_dense() for p in model.parameters())
    touched = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == touched[0].sort().values.tolist()


def sgd(model: nn.Module, splits: Splits, loss, *, lr: float, epochs: int, batch: int = 20) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(epoch))
        for indices in order.split(batch):
            inputs, target = splits.train.rows(indices)
            optimizer.zero_grad()
            loss(model(inputs), target).backward()
            optimizer.step()


@pytest.mark.slow
def test_serial_sgd_learns_the_hyperplane():
    splits = load("sparse_logistic(samples=6000, features=300, support=6)")
    model = build("sparse_logistic", inputs=splits.inputs, classes=splits.classes)
    sgd(model, splits, F.cross_entropy, lr=10.0, epochs=3)
    inputs, target = splits.test.rows(torch.arange(len(splits.test)))
    assert float(accuracy(model(inputs), target)) / len(target) > 0.9


@pytest.mark.slow
def test_serial_sgd_completes_the_matrix():
    splits = load("ratings(users=120, items=100, rank=2, density=0.4)")
    torch.manual_seed(0)
    model = build("factorisation(rank=2)", inputs=splits.inputs)
    sgd(model, splits, lambda outputs, target: SquaredError()(outputs, target)[0], lr=0.05, epochs=8)
    rows, target = splits.test.rows(torch.arange(len(splits.test)))
    with torch.no_grad():
        off = (model(rows)[:, 0] - target).square().mean().sqrt().item()
    assert off < 0.2  # the noise is 0.1, and the entries vary by 1
    assert target.std().item() > 0.7


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_they_are_trained_by_the_verbs(workers: int):
    result = mh.train(
        mh.Task(
            data="sparse_logistic(samples=4000, features=200, support=5)",
            model="sparse_logistic",
            optimizer="sgd(lr=10.0)",
            batch_size=40,
            epochs=2,
        ),
        mh.Plan(workers=workers),
        progress=False,
    )
    assert result.history[-1]["test_accuracy"] > 0.85
    result = mh.train(
        mh.Task(
            data="ratings(users=100, items=80, rank=2, density=0.4)",
            model="factorisation(rank=2)",
            loss="squared_error",
            optimizer="sgd(lr=0.1)",
            batch_size=20,
            epochs=8,
        ),
        mh.Plan(workers=workers),
        progress=False,
    )
    assert result.history[-1]["test_accuracy"] is None  # there are no classes
    assert math.sqrt(2 * result.history[-1]["test_loss"]) < 0.2


@pytest.mark.parametrize(
    ("spec", "sizes", "said"),
    [
        ("sparse_logistic", {"inputs": (1, 8, 8), "classes": 2}, "takes sparse samples of two classes"),
        ("sparse_logistic", {"inputs": (64,), "classes": 10}, "in 10 classes"),
        ("factorisation", {"inputs": (1, 8, 8)}, "such as data=ratings"),
        ("factorisation(rank=0)", {"inputs": (70,)}, "rank=0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(spec: str, sizes: dict, said: str):
    with pytest.raises(BadInput) as e:
        build(spec, **sizes)
    assert said in str(e.value)
