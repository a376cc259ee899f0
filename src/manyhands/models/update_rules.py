"""Update rules as functions of flat vectors: what a parameter server applies, and outer optimizers (survey §VI-A).

    sgd      v ← μv + (1−d)g, at first v ← g;          θ ← θ − ηv, Nesterov: θ ← θ − η(g + μv)
    adagrad  s ← s + g²;                               θ ← θ − η′ g / (√s + ε)
    adam     m ← β₁m + (1−β₁)g;  s ← β₂s + (1−β₂)g²;   θ ← θ − η m̂ / (√ŝ + ε)

(Polyak 1964; Nesterov 1983; Duchi, Hazan & Singer 2011; Kingma & Ba 2015, with Loshchilov & Hutter's decay 2019.)

η learning rate, η′ = η / (1 + (t−1)·decay), t how often these elements have been updated. Each works element by element
and in place, with torch's operations in torch's order: the numbers are those of `torch.optim`, bit for bit. State is
given from outside, so that it may lie in memory that several processes share, and θ, g and state may be rows of a
table as well as a whole vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: ``rule(θ, g, state, t, group)``: ``group`` is the optimizer's parameter group, read at every update.
Apply = Callable[[Tensor, Tensor, Sequence[Tensor], int, Mapping[str, Any]], None]


def sgd_(theta: Tensor, g: Tensor, state: Sequence[Tensor], t: int, group: Mapping[str, Any]) -> None:
    """Plain, with momentum, or Nesterov's; one vector of state where there is momentum."""
    if group["weight_decay"] != 0:
        g = g.add(theta, alpha=group["weight_decay"])
    momentum = group["momentum"]
    if momentum != 0:
        (v,) = state
        if t == 1:
            v.copy_(g)
        else:
            v.mul_(momentum).add_(g, alpha=1 - group["dampening"])
        g = g.add(v, alpha=momentum) if group["nesterov"] else v
    theta.add_(g, alpha=-group["lr"])


def adagrad_(theta: Tensor, g: Tensor, state: Sequence[Tensor], t: int, group: Mapping[str, Any]) -> None:
    """One vector of state, the sum of squares."""
    if group["weight_decay"] != 0:
        g = g.add(theta, alpha=group["weight_decay"])
    (squares,) = state
    if t == 1 and group["initial_accumulator_value"]:
        squares.fill_(group["initial_accumulator_value"])
    rate = group["lr"] / (1 + (float(t) - 1) * group["lr_decay"])
    squares.addcmul_(g, g, value=1)
    theta.addcdiv_(g, squares.sqrt().add_(group["eps"]), value=-rate)


def adam_(theta: Tensor, g: Tensor, state: Sequence[Tensor], t: int, group: Mapping[str, Any]) -> None:
    """Adam, or AdamW where the group says that decay is decoupled; two vectors of state."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    if group["weight_decay"] != 0:
        if group["decoupled_weight_decay"]:
            theta.mul_(1 - lr * group["weight_decay"])
        else:
            g = g.add(theta, alpha=group["weight_decay"])
    first, second = state
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1, correction2 = 1 - beta1 ** float(t), 1 - beta2 ** float(t)
    theta.addcdiv_(first, (second.sqrt() / correction2**0.5).add_(group["eps"]), value=-(lr / correction1))


@dataclass(frozen=True)
class Rule:
    """One of the functions above, and how many vectors of state it wants."""

    apply: Apply
    slots: int


def rule_of(optimizer: torch.optim.Optimizer, group: int = 0) -> Rule | None:
    """What a server does in the place of ``optimizer``; None: no server does that.

    The optimizer's own class, unchanged: a subclass may do anything.
    """
    g = optimizer.param_groups[group]
    if g.get("maximize") or g.get("amsgrad") or g.get("differentiable") or g.get("fused"):
        return None
    if isinstance(g.get("lr"), Tensor) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return Rule(sgd_, 1 if g["momentum"] else 0)
    if kind is torch.optim.Adagrad:
        return Rule(adagrad_, 1)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return Rule(adam_, 2)
    return None


def served(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a server can apply it."""
    return all(rule_of(optimizer, i) is not None for i in range(len(optimizer.param_groups)))
