"""The time of a step that was never run, operator by operator from a table."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manyhands.cluster import Device
from manyhands.cluster.measured import OperatorTime
from manyhands.errors import BadInput
from manyhands.modelling import specification
from manyhands.modelling.operations import Operation, Operations
from manyhands.modelling.operators import overhead, updates
from manyhands.modelling.operators.stamping import accumulated, cleared
from manyhands.modelling.operators.table import UNKNOWN, Table, anonymous


@dataclass(frozen=True)
class OperatorEstimate:
    """Seconds of one step by phase: forward, backward, update, and what the host needs beside them."""

    seconds: dict[str, float]
    #: Of all seconds, what was read off, what lies between measured operators, and what a roofline says; sums to 1.
    #: What the host needs is fitted and counts as lying between.
    shares: dict[str, float]
    #: Seconds by which the sum may be off: errors of one operator's uses add up, of different ones as squares.
    error_s: float

    @property
    def total_s(self) -> float:
        """The step."""
        return math.fsum(self.seconds.values())

    @property
    def compute_s(self) -> float:
        """The step without the update."""
        return self.total_s - self.seconds["update"]


def price(
    operations: Operations,
    table: Sequence[OperatorTime],
    *,
    threads: int,
    co_runners: int,
    device: Device | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> OperatorEstimate:
    """What the step of `modelling.operations.count` takes here, with ``optimizer`` (any of its kind) if one is given.

    Rows of so many ``threads`` and ``co_runners`` are used and no others. Where there is none, or where no roofline can
    be had of them, ``device`` says how long an operator takes at least (`modelling.specification`); without one that is
    refused. Approximation: each operator takes what it took among others, whatever stands before and after it.
    """
    ready = _ready(tuple(table), threads, co_runners)
    step = _as_trained(operations, optimizer)
    seconds = dict.fromkeys(("forward", "backward", "update", "host"), 0.0)
    found = dict.fromkeys(("hit", "interpolation", "fallback"), 0.0)
    errors: Counter[str] = Counter()
    for x, times in Counter(step).items():
        how, each_s, error = _priced(x, ready, device, threads, co_runners)
        seconds[x.phase] += times * each_s
        found[how] += times * each_s
        errors[x.name] += times * each_s * error  # type: ignore[assignment]
    seconds["host"] = overhead.seconds(
        ready.host,
        operators=sum(x.phase != "update" for x in step),
        views=_views(operations),
        calls=operations.calls,
    )
    found["interpolation"] += seconds["host"]
    total_s = math.fsum(seconds.values())
    if ready.host:
        errors["host"] = total_s * ready.host["step"].spread  # type: ignore[assignment]
    shares = {how: s / total_s if total_s else 0.0 for how, s in found.items()}
    return OperatorEstimate(seconds, shares, math.hypot(*errors.values()))


@functools.lru_cache(maxsize=8)
def _ready(table: tuple[OperatorTime, ...], threads: int, co_runners: int) -> Table:
    return Table(x for x in table if (x.threads, x.co_runners) == (threads, co_runners))


def _priced(
    x: Operation, table: Table, device: Device | None, threads: int, co_runners: int
) -> tuple[str, float, float]:
    if (known := table.hit(x)) is not None:
        return "hit", *known
    if (known := table.between(x)) is not None:
        return "interpolation", *known
    if (known := table.roof(x)) is not None:
        return "fallback", *known
    if device is None:
        raise BadInput(
            f"the table has no operator measured with threads={threads} and co_runners={co_runners}, and there is no "
            "device to fall back on. Measure with these (`measure(threads=…, co_runners=…)`), or give a device."
        )
    return "fallback", specification.operator_s(x, device), UNKNOWN


def _as_trained(operations: Operations, optimizer: torch.optim.Optimizer | None) -> list[Operation]:
    """A traced step as the training loop runs it: gradients lie in one vector, which is cleared and added to."""
    # The loop hands autograd its one instead of having it made.
    step = [anonymous(x) for x in operations if not (x.name == "ones_like" and x.results == ((),))]
    dtypes = Counter(x.dtype for x in operations if x.parameters) or Counter(["float32"])
    dtype = dtypes.most_common(1)[0][0]
    itemsize = getattr(torch, dtype).itemsize
    numels = [size_B // itemsize for size_B in operations.parameter_B.values()]
    if numels:
        step.append(cleared(sum(numels), itemsize, dtype))
        step += [accumulated(n, itemsize, dtype) for n in numels]
    if optimizer is not None:
        step.append(updates.of(optimizer, numels, dtype))
    return step


def _views(operations: Operations) -> int:
    """A gradient that is added to its vector is not looked at once more, as the first of a parameter is in a trace."""
    return max(operations.views - len(operations.parameter_B), 0)
