"""Optimizers: from text or a callable to a live one, and what a plan must know of it.

Three questions decide where an optimizer may stand. Does it update *element by element*? Then any slice of the
parameters can be updated alone, on the worker that owns it (ZeRO-1, shared memory). Is it *stateless*? Then averaging
gradients and averaging parameters is the same thing. Does it compute *one gradient a step*? It has to.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from manyhands.calling import call, label
from manyhands.errors import BadInput, Problem
from manyhands.grammar import parse_call
from manyhands.models import optimizer_classes

OptimizerSpec = str | Callable[..., Optimizer]

#: Every element of the update depends on that element of parameter, gradient and state only, and on scalars that are
#: the same for all (step count, learning rate): read off torch 2.13's sources and tested by updating in slices. The
#: default and ``foreach`` forms are bit-identical under any cut; ``fused`` ones when cuts are multiples of `SLICE`.
#: Left out: Adafactor (row and column means), Muon (orthogonalises a matrix), LBFGS (inner products), SparseAdam
#: (sparse gradients). A subclass may do anything and is judged by its own ``elementwise`` attribute.
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)

#: Elements after which a fused CPU kernel repeats itself: beyond the last whole vector it rounds differently (no fused
#: multiply-add), so a cut elsewhere changes last bits. Covers AVX-512 unrolled; tested.
SLICE = 64


def build(spec: OptimizerSpec, params: Iterable[Any], *, lr: float | None = None) -> Optimizer:
    """A live optimizer of ``params`` (tensors, named tensors or groups, as torch takes them).

        build("sgd(lr=0.05, momentum=0.9)", model.parameters())
        build(functools.partial(torch.optim.AdamW, lr=1e-3), model.parameters())

    ``lr`` overrides what the description says. A factory or optimizer that carries ``elementwise=True`` vouches for it.
    """
    spec = with_lr(spec, lr)
    params = list(params)
    made: Any
    try:
        if isinstance(spec, str):
            said = parse_call(spec, kind="optimizer")
            name, factory = said.name, optimizer_classes.load(said.name)
            _refuse_live(factory, name)
            made = call("optimizer", name, factory, [params, *said.args], said.kwargs)
        else:
            name, factory = label(spec), spec
            made = call("optimizer", name, factory, [params])
    except (TypeError, ValueError) as e:  # how torch refuses a bad value: "Invalid learning rate: -1"
        raise BadInput(f"optimizer {spec if isinstance(spec, str) else label(spec)}: {e}.") from e
    if not isinstance(made, Optimizer):
        raise BadInput(
            f"optimizer {name} returned a {type(made).__name__}; the rule is: an optimizer factory takes parameters "
            "and returns a torch.optim.Optimizer, e.g. functools.partial(torch.optim.AdamW, lr=1e-3)."
        )
    if _vouches(factory):
        vars(made)["elementwise"] = True
    return made


def with_lr(spec: OptimizerSpec, lr: float | None) -> OptimizerSpec:
    """``spec`` with its learning rate replaced; as it was when ``lr`` is None."""
    _refuse_live(spec, "optimizer")
    if lr is None:
        return spec
    if isinstance(spec, str):
        said = parse_call(spec, kind="optimizer")
        if said.args and said.name in optimizer_classes:  # lr is the first thing torch's optimizers take
            return str(dataclasses.replace(said, args=(lr, *said.args[1:])))
        return str(dataclasses.replace(said, kwargs=said.kwargs | {"lr": lr}))
    parameters = inspect.signature(spec).parameters
    if "lr" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise BadInput(
            f"lr={lr} cannot be given to optimizer {label(spec)}, which has no parameter lr; set it in the factory, or "
            "take functools.partial(torch.optim.SGD) and the like."
        )
    return functools.partial(spec, lr=lr)


def _refuse_live(spec: Any, name: str) -> None:
    if isinstance(spec, str) or (callable(spec) and not isinstance(spec, Optimizer)):
        return
    kind, rate = type(spec).__name__, "1e-3"
    if isinstance(spec, Optimizer):
        rate = str(float(spec.param_groups[0].get("lr", 1e-3)))
        where = "torch.optim." if type(spec).__module__.startswith("torch.optim") else ""
        raise BadInput(
            f"{name}: this is a live {kind}, bound to the parameters of one process; each worker makes its own. "
            f"Give the recipe instead: functools.partial({where}{kind}, lr={rate})"
        )
    raise BadInput(
        f"{name}: {spec!r} is a {kind}; an optimizer is text such as 'sgd(lr=0.05)' or a callable that takes "
        f"parameters: functools.partial(torch.optim.AdamW, lr={rate})"
    )


def _vouches(factory: Any) -> bool:
    if getattr(factory, "elementwise", False) is True:
        return True
    return isinstance(factory, functools.partial) and _vouches(factory.func)


def trial(spec: OptimizerSpec) -> Optimizer:
    """An optimizer of this description on one throw-away 2×2 matrix: what a plan asks before there is a model."""
    return build(spec, [nn.Parameter(torch.zeros(2, 2))])


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a slice of the parameters can be updated alone: one of `ELEMENTWISE` exactly, or vouched for."""
    return type(optimizer) in ELEMENTWISE or getattr(optimizer, "elementwise", False) is True


def is_stateless(optimizer: Optimizer) -> bool:
    """Whether an update depends on nothing but parameter and gradient: plain SGD without momentum."""
    return type(optimizer) is torch.optim.SGD and all(g["momentum"] == 0 for g in optimizer.param_groups)


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether it scales each step by past gradients, value by value, as Adam, RMSprop and Adagrad do.

    Of what is not torch's it is taken that it does.
    """
    return not isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))


def gradients_problem(optimizer: Optimizer) -> Problem | None:
    """What is wrong with an optimizer that evaluates the loss several times a step, or None."""
    if not isinstance(optimizer, torch.optim.LBFGS):
        return None
    group = optimizer.param_groups[0]
    if group["max_iter"] <= 1 and group["line_search_fn"] is None:
        return None
    searched = f", line_search_fn={group['line_search_fn']!r}" if group["line_search_fn"] else ""
    return Problem(
        f"optimizer lbfgs(max_iter={group['max_iter']}{searched})",
        "it evaluates the loss several times a step, and a step computes one gradient, which the workers then share.",
        "lbfgs(max_iter=1) without a line search works.",
    )
