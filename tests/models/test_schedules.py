"""Schedules by name do what torch's do, and know how long the run is."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from manyhands.errors import BadInput
from manyhands.models import schedule_classes
from manyhands.models.schedules import build


@pytest.fixture
def optimizer() -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)


NEEDED = {
    "step": "(step_size=3)",
    "multistep": "(milestones=[2, 4])",
    "exponential": "(gamma=0.9)",
    "cosine_restarts": "(T_0=4)",
    "cyclic": "(base_lr=0.1, max_lr=1.0)",
    "onecycle": "(max_lr=0.1)",
}


@pytest.mark.parametrize("name", schedule_classes)
def test_every_listed_name_builds(name: str, optimizer: Optimizer):
    assert type(build(name + NEEDED.get(name, ""), optimizer, steps=10)) is schedule_classes.load(name)


def rates(schedule: lrs.LRScheduler, optimizer: Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_is_torchs_and_falls_over_the_whole_run(optimizer: Optimizer):
    schedule = build("cosine", optimizer, steps=8)
    found = [*rates(schedule, optimizer, 8), optimizer.param_groups[0]["lr"]]
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert found[:8] == rates(lrs.CosineAnnealingLR(other, T_max=8), other, 8)
    assert found[-1] == 0


def test_a_stated_length_is_kept(optimizer: Optimizer):
    assert build("cosine(T_max=100)", optimizer, steps=8).T_max == 100
    assert build("onecycle(max_lr=1, epochs=2, steps_per_epoch=5)", optimizer, steps=8).total_steps == 10


def test_no_schedule_is_none(optimizer: Optimizer):
    assert build(None, optimizer) is None


def live(optimizer: Optimizer) -> lrs.LRScheduler:
    return lrs.StepLR(optimizer, 2)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cosin", "Did you mean 'cosine'"),
        ("step(size=3)", "no option of schedule step named 'size'"),
        ("step", "step(step_size=…)"),
        ("cosine", "cosine(T_max=…)"),
        ("linear(start_factor=2)", "schedule linear: Starting multiplicative factor"),
        (lambda o: 3, "returned a int; the rule is"),
        (functools.partial(lrs.ReduceLROnPlateau), "waits for a measured loss"),
        (5, "functools.partial(torch.optim.lr_scheduler.StepLR"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_in_words(spec: object, said: str, optimizer: Optimizer):
    with pytest.raises(BadInput) as e:
        build(spec, optimizer)  # type: ignore[arg-type]
    assert said in str(e.value)


def test_a_live_schedule_is_refused(optimizer: Optimizer):
    with pytest.raises(BadInput, match="is a StepLR"):
        build(live(optimizer), optimizer)  # type: ignore[arg-type]
