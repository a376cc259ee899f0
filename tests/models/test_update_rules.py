"""Update rules: torch's own optimizers, bit for bit, on vectors and state that somebody else holds."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.models.update_rules import rule_of, served
from tests.matrices import halved

RECIPES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize(("name", "dtype"), halved(RECIPES, [torch.float32, torch.float64]))
@given(seed=st.integers(0, 10_000), numel=st.sampled_from([1, 7, 64, 1000]), steps=st.integers(1, 5))
def test_a_rule_is_torchs_optimizer_bit_for_bit(name, dtype, seed, numel, steps):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(numel, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = RECIPES[name]([theirs])
    rule = rule_of(optimizer)
    mine, state = start.clone(), [torch.zeros_like(start) for _ in range(rule.slots)]
    for t in range(1, steps + 1):
        g = torch.randn(numel, generator=generator, dtype=dtype)
        theirs.grad = g.clone()
        optimizer.step()
        kept = g.clone()
        rule.apply(mine, g, state, t, optimizer.param_groups[0])
        assert torch.equal(g, kept)  # a gradient is read, not used up
        assert torch.equal(mine, theirs.detach())


@pytest.mark.parametrize("name", RECIPES)
def test_a_vector_may_be_cut_anywhere_at_multiples_of_64(name):
    start, g = torch.randn(1000), torch.randn(3, 1000)
    optimizer = RECIPES[name]([torch.nn.Parameter(start.clone())])
    rule, group = rule_of(optimizer), optimizer.param_groups[0]

    def updated(cuts):
        theta, state = start.clone(), [torch.zeros(1000) for _ in range(rule.slots)]
        for t in range(3):
            for lo, hi in cuts:
                rule.apply(theta[lo:hi], g[t, lo:hi], [s[lo:hi] for s in state], t + 1, group)
        return theta

    assert torch.equal(updated([(0, 1000)]), updated([(0, 64), (64, 640), (640, 1000)]))


def test_what_a_server_cannot_do_is_known_beforehand():
    parameter = [torch.nn.Parameter(torch.zeros(2, 2))]
    assert all(served(recipe(parameter)) for recipe in RECIPES.values())
    assert not served(torch.optim.RMSprop(parameter))
    assert not served(torch.optim.SGD(parameter, lr=0.1, maximize=True))
    assert not served(torch.optim.Adam(parameter, amsgrad=True))
    assert not served(torch.optim.SGD(parameter, lr=torch.tensor(0.1)))
    hooked = torch.optim.SGD(parameter, lr=0.1)
    hooked.register_step_pre_hook(lambda *_: None)
    assert not served(hooked)

    class Own(torch.optim.SGD):
        pass

    assert not served(Own(parameter, lr=0.1))
    groups = torch.optim.SGD([{"params": parameter}, {"params": [copy.deepcopy(parameter[0])], "maximize": True}], lr=1)
    assert not served(groups)
