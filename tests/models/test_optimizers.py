"""What is said of an optimizer is so: a listed one updates in slices to the same bits, and descriptions build it."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from manyhands.errors import BadInput
from manyhands.models import optimizer_classes
from manyhands.models.optimizers import (
    ELEMENTWISE,
    SLICE,
    build,
    gradients_problem,
    is_elementwise,
    is_stateless,
    trial,
    with_lr,
)

OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    torch.optim.SGD: [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    torch.optim.Adam: [{}, {"amsgrad": True, "weight_decay": 0.1}],
    torch.optim.AdamW: [{}, {"amsgrad": True}],
    torch.optim.Adagrad: [{}, {"lr_decay": 0.1, "weight_decay": 0.1}],
    torch.optim.RMSprop: [{}, {"centered": True, "momentum": 0.9}],
    torch.optim.Adadelta: [{}, {"weight_decay": 0.1}],
    torch.optim.Adamax: [{}, {"weight_decay": 0.1}],
    torch.optim.NAdam: [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    torch.optim.RAdam: [{}, {"weight_decay": 0.1}],
    torch.optim.Rprop: [{}],
    torch.optim.ASGD: [{}, {"weight_decay": 0.1, "t0": 2}],
}
#: Per commit each form of a class, with options in turn.
CASES = [
    pytest.param(cls, {**kwargs, **form}, marks=[pytest.mark.slow] if (i + j) % 2 and len(all_) > 1 else [])
    for cls, all_ in OPTIONS.items()
    for i, kwargs in enumerate(all_)
    for j, form in enumerate(({}, {"foreach": True}))
]
FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]


def updated(make: Callable[..., Optimizer], start: Tensor, gradients: Sequence[Tensor], cuts: Sequence[int]) -> Tensor:
    """``start`` after a step for each gradient, every slice between ``cuts`` with an optimizer of its own."""
    flat = start.clone()
    slices = [nn.Parameter(flat[lo:hi]) for lo, hi in pairwise(cuts)]
    optimizers = [make([p]) for p in slices]
    for gradient in gradients:
        for p, (lo, hi), optimizer in zip(slices, pairwise(cuts), optimizers, strict=True):
            p.grad = gradient[lo:hi].clone()
            optimizer.step()
    return flat


def numbers(n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=dtype), [torch.randn(n, generator=g, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
@settings(max_examples=8)
@given(st.data(), st.integers(2, 300), st.integers(0, 2**30), st.sampled_from([torch.float32, torch.float64]))
def test_a_listed_optimizer_updates_in_slices_to_the_same_bits(
    cls: type[Optimizer], kwargs: dict[str, Any], data: st.DataObject, n: int, seed: int, dtype: torch.dtype
):
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=3))), n]
    make = functools.partial(cls, **kwargs)
    start, gradients = numbers(n, seed, dtype)
    assert torch.equal(updated(make, start, gradients, cuts), updated(make, start, gradients, [0, n]))


@pytest.mark.parametrize("cls", FUSED, ids=lambda c: c.__name__)
@settings(max_examples=8)
@given(st.data(), st.integers(2, 12), st.integers(0, SLICE - 1), st.integers(0, 2**30))
def test_a_fused_optimizer_does_when_cuts_are_multiples_of_slice(
    cls: type[Optimizer], data: st.DataObject, whole: int, rest: int, seed: int
):
    n = whole * SLICE + rest
    cuts = [0, *(SLICE * i for i in sorted(data.draw(st.sets(st.integers(1, whole - 1), min_size=1)))), n]
    make = functools.partial(cls, fused=True, **({"momentum": 0.9, "lr": 0.1} if cls is torch.optim.SGD else {}))
    start, gradients = numbers(n, seed, torch.float32)
    assert torch.equal(updated(make, start, gradients, cuts), updated(make, start, gradients, [0, n]))


def test_the_slice_test_covers_the_whole_list():
    assert set(OPTIONS) == ELEMENTWISE


def test_adafactor_is_caught_by_that_test_and_is_not_listed():
    start, gradients = numbers(200, 0, torch.float32)
    make = torch.optim.Adafactor
    assert not torch.equal(updated(make, start, gradients, [0, 70, 200]), updated(make, start, gradients, [0, 200]))
    assert not is_elementwise(trial("adafactor"))


class Subclass(torch.optim.SGD):
    """May do anything."""


class Vouched(torch.optim.SGD):
    """Says that it does not."""

    elementwise = True


def whole_tensor(params: Any, lr: float = 0.1) -> Optimizer:
    return Subclass(params, lr=lr)


def not_an_optimizer(params: Any) -> int:
    return len(params)


def no_lr(params: Any) -> Optimizer:
    return torch.optim.SGD(params)


def test_only_exact_types_count_unless_somebody_vouches():
    assert is_elementwise(trial("sgd"))
    assert not is_elementwise(trial(Subclass))
    assert not is_elementwise(trial(whole_tensor))
    assert is_elementwise(trial(Vouched))
    vouching = functools.partial(whole_tensor, lr=0.5)
    vouching.elementwise = True  # type: ignore[attr-defined]
    assert is_elementwise(trial(vouching))
    assert is_elementwise(trial(functools.partial(vouching, lr=0.6)))
    assert not any(is_elementwise(trial(name)) for name in ("lbfgs", "muon", "adafactor", "sparse_adam"))


def test_only_sgd_without_momentum_is_stateless():
    assert is_stateless(trial("sgd(lr=0.1, weight_decay=0.1)"))
    assert not any(is_stateless(trial(spec)) for spec in ("sgd(momentum=0.9)", "adam", Subclass))


@pytest.mark.parametrize("name", optimizer_classes)
def test_every_listed_name_builds(name: str):
    assert isinstance(trial(name), optimizer_classes.load(name))


def test_lr_given_apart_overrides_the_text():
    for spec in ("sgd(lr=0.1, momentum=0.9)", "sgd(0.1, 0.9)"):
        group = build(spec, [nn.Parameter(torch.zeros(1))], lr=0.5).param_groups[0]
        assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert trial(with_lr(functools.partial(torch.optim.Adam, lr=0.1), 0.5)).param_groups[0]["lr"] == 0.5
    assert with_lr("adam", None) == "adam"
    with pytest.raises(BadInput, match="has no parameter lr"):
        with_lr(no_lr, 0.5)


def test_a_live_optimizer_is_refused_with_the_line_to_write():
    live = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(BadInput) as e:
        build(live, [])  # type: ignore[arg-type]
    assert "functools.partial(torch.optim.AdamW, lr=0.001)" in str(e.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sdg", "Did you mean 'sgd'"),
        ("sgd(momentun=0.9)", "Did you mean 'momentum'"),
        ("sgd(params=3)", "no option of optimizer sgd named 'params'"),
        ("sgd(lr=-1)", "Invalid learning rate"),
        ("sgd(lr='fast')", "optimizer sgd(lr='fast')"),
        ("tests.models.test_optimizers:not_an_optimizer", "returned a int; the rule is"),
        (0.1, "functools.partial(torch.optim.AdamW, lr=1e-3)"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_in_words(spec: object, said: str):
    with pytest.raises(BadInput) as e:
        trial(spec)  # type: ignore[arg-type]
    assert said in str(e.value)


@pytest.mark.parametrize("spec", ["lbfgs", "lbfgs(max_iter=1, line_search_fn='strong_wolfe')"])
def test_an_optimizer_of_several_gradients_a_step_is_a_problem(spec: str):
    problem = gradients_problem(trial(spec))
    assert problem is not None
    assert "lbfgs(max_iter=1)" in problem.cure


def test_what_the_problem_offers_as_cure_computes_one_gradient_a_step():
    p = nn.Parameter(torch.ones(2))
    optimizer = build("lbfgs(max_iter=1)", [p])
    evaluated = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        evaluated.append(loss.item())
        return loss.detach()

    for step in range(1, 4):
        optimizer.step(closure)
        assert len(evaluated) == step
    assert gradients_problem(optimizer) is None
    assert gradients_problem(trial("adam")) is None
