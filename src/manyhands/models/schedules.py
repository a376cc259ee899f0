"""Learning-rate schedules: torch's, by name, counted in *steps*.

``cosine`` alone falls over the whole run: its length is filled in where a schedule needs it and was not told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manyhands.calling import call, label
from manyhands.errors import BadInput
from manyhands.grammar import parse_call
from manyhands.models import schedule_classes

ScheduleSpec = str | Callable[[Optimizer], LRScheduler]


def build(spec: ScheduleSpec | None, optimizer: Optimizer, *, steps: int | None = None) -> LRScheduler | None:
    """The schedule that ``spec`` describes, on ``optimizer``; None when there is none.

        build("cosine(T_max=100)", optimizer)
        build("onecycle(max_lr=0.1)", optimizer, steps=600)
        build(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step), optimizer)

    ``steps`` is the length of the run, offered as ``T_max`` and ``total_steps``.
    """
    if spec is None:
        return None
    if not (isinstance(spec, str) or callable(spec)):  # a live LRScheduler is not callable
        raise BadInput(
            f"schedule {spec!r} is a {type(spec).__name__}; a schedule is text such as 'cosine(T_max=100)' or a "
            "callable that takes the optimizer: functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
        )
    made: Any
    name = label(spec)
    try:
        if isinstance(spec, str):
            said = parse_call(spec, kind="schedule")
            name, factory = said.name, schedule_classes.load(said.name)
            told = {"epochs", "steps_per_epoch"} & set(said.kwargs)  # onecycle's other way to say its length
            offered = {"T_max": steps, "total_steps": None if told else steps}
            made = call("schedule", name, factory, [optimizer, *said.args], said.kwargs, offered=offered)
        else:
            made = call("schedule", name, spec, [optimizer])
    except (TypeError, ValueError) as e:
        raise BadInput(f"schedule {name}: {e}.") from e
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        waits = " ReduceLROnPlateau waits for a measured loss, which a step does not give." * isinstance(
            made, LRScheduler
        )
        raise BadInput(
            f"schedule {name} returned a {type(made).__name__}; the rule is: a schedule factory takes the optimizer "
            f"and returns a torch.optim.lr_scheduler.LRScheduler that is stepped without arguments.{waits}"
        )
    return made
