"""Which run a checkpoint is of, and why another one may not go on with it.

A resume is exact or it is refused: state of one optimizer means nothing to another, a schedule stretched over another
length is another schedule, and in the middle of an epoch another order of samples would show some twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from manyhands.errors import BadInput
from manyhands.task import Task, described
from manyhands.training.sampler import Cursor

#: Options that decide which state an optimizer keeps (torch 2.13: Adam, AdamW, RMSprop). SGD's momentum is not among
#: them: it may come into use later.
_SHAPING = ("amsgrad", "centered", "momentum")
#: How torch's schedules that have a length call it.
_LENGTHS = ("T_max", "total_steps")


def origin(task: Task, optimizer: Optimizer, schedule: Any, *, n: int, data: str) -> dict[str, Any]:
    """What must not change between a run and its continuation; plain values."""
    return {
        "optimizer": optimizer_name(optimizer),
        "schedule": None if task.schedule is None else described(task.schedule),
        "length": None
        if schedule is None
        else next((getattr(schedule, k) for k in _LENGTHS if hasattr(schedule, k)), None),
        "rates": None if schedule is None else [float(group["initial_lr"]) for group in optimizer.param_groups],
        "seed": task.seed,
        "n": n,
        "data": data,
    }


def optimizer_name(optimizer: Optimizer) -> str:
    """Its class, and the options that decide which state it keeps."""
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    said = [k for k in _SHAPING if any(group.get(k) for group in optimizer.param_groups)]
    return f"{name} with {' and '.join(said)}" if said and kind.__name__ != "SGD" else name


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], cursor: Cursor, *, source: Path) -> None:
    """Raise `BadInput`, naming both values and what works, unless ``now`` can go on exactly where ``saved`` stood."""
    anew = f"or start a new run from its parameters, {source / 'model.safetensors'}, in another folder (--out)."

    def refuse(what: str, key: str, why: str, cure: str) -> None:
        raise BadInput(
            f"The checkpoint {source} was made with {what} {saved[key]}, this run asks for {now[key]}: {why} {cure}"
        )

    if saved["n"] != now["n"]:
        refuse("samples:", "n", "it is another data set.", f"Resume with the data set the run began with, {anew}")
    if saved["optimizer"] != now["optimizer"]:
        refuse(
            "optimizer", "optimizer", "the state of one means nothing to the other.", f"Resume with the old one, {anew}"
        )
    if saved["schedule"] != now["schedule"]:
        refuse(
            "schedule",
            "schedule",
            "in the middle of a run one schedule cannot take over from another.",
            f"Resume with the old one, {anew}",
        )
    if saved["length"] != now["length"]:
        refuse(
            f"schedule {saved['schedule']} over so many steps:",
            "length",
            "stretched or shortened, it would be another schedule from the first step on.",
            f"Resume with the old length, {anew}",
        )
    if saved["rates"] != now["rates"]:
        refuse(
            f"schedule {saved['schedule']} from learning rate",
            "rates",
            "a schedule goes on from the rate it began with.",
            f"Leave the learning rate (--lr) as it was, {anew}",
        )
    if cursor.position == 0:
        return
    for key, why in (
        ("seed", "the rest of an epoch would be of another order, with some samples twice and some never."),
        ("data", "it is another data set, in the middle of an epoch."),
    ):
        if saved[key] != now[key]:
            refuse(key, key, why, f"Resume with the old one, {anew}")
