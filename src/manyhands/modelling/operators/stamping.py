"""Times stamped inside a training step: a dispatch mode sees each operator below autograd, backward too.

On a processor backward runs in the caller's thread, so that one mode sees all. It stretches a step, by 10 to 30 µs an
operator that nobody counts, since they pass between the stamps; what passes within them, the way through Python, is
`excess_s` and is taken off. Times stamped so add up to the step; those of operators run alone in a loop do not (11 %
less for recurrent layers, 6 % more for convolutions: another cache, another state of the memory).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manyhands.modelling.operations import Operation, Recorder, naming, storage

#: What a step does to the vector of gradients: cleared before the forward pass, added to at the end of a backward.
CLEAR, ACCUMULATE = "clear_gradients", "accumulate_gradient"
#: No operator takes less, whatever is taken off.
LEAST_S = 1e-7


@dataclass(frozen=True)
class Course:
    """The operators of a step in order, and which of all that pass the dispatcher they are."""

    operations: tuple[Operation, ...]
    #: For each operator that passes its place in ``operations``; −1: it moves nothing.
    places: tuple[int, ...]
    views: int
    calls: int


class Told:
    """A loss that says when it is known: what runs after it is backward."""

    reduction, l2 = "mean", 0.0

    def __init__(self, loss: Callable[..., Any]) -> None:
        self._loss = loss
        self.after: Callable[[], None] = lambda: None

    def __call__(self, outputs: Any, target: Any) -> Any:
        """As the loss itself."""
        returned = self._loss(outputs, target)
        self.after()
        return returned


def learn(step: Callable[[], Any], model: nn.Module, gradients: Collection[Tensor], loss: Told) -> Course:
    """Run ``step`` once and record what passes.

    ``gradients`` are the vectors into which gradients are added, so that this is told from other additions.
    """
    learner = _Learner({storage(x) for x in gradients})
    loss.after = learner.turn
    try:
        with learner, naming(model, learner):
            step()
    finally:
        loss.after = lambda: None
    return Course(tuple(learner.operations), tuple(learner.places), learner.views, learner.calls)


class _Learner(Recorder):  # type: ignore[no-untyped-call]
    def __init__(self, gradients: set[int]) -> None:
        super().__init__()
        self.places: list[int] = []
        self._gradients = gradients

    def turn(self) -> None:
        self.phase = "backward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.operations)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.places.append(before if len(self.operations) > before else -1)
        return out

    def record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        super().record(func, name, args, kwargs, out)
        if name in ("zero_", "add_") and storage(args[0]) in self._gradients:
            numel = args[0].numel()
            made = cleared if name == "zero_" else accumulated
            self.operations[-1] = made(numel, args[0].element_size(), self.operations[-1].dtype)


def cleared(numel: int, itemsize: int, dtype: str) -> Operation:
    """Setting a vector of gradients to zero."""
    return Operation(CLEAR, "forward", "", ((numel,),), ((numel,),), dtype, 0, 0, numel * itemsize)


def accumulated(numel: int, itemsize: int, dtype: str) -> Operation:
    """Adding a parameter's gradient into its place in the vector."""
    shapes, size_B = ((numel,), (numel,)), numel * itemsize
    return Operation(ACCUMULATE, "backward", "", shapes, ((numel,),), dtype, numel, 2 * size_B, size_B)


class Stamps(TorchDispatchMode):
    """While inside, how long each operator takes, in order; no more, so that little is done between them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        clock = time.perf_counter
        if kwargs is None:
            kwargs = {}
        t0 = clock()
        out = func(*args, **kwargs)
        self.seconds.append(clock() - t0)
        return out


def excess_s(times: int = 300) -> float:
    """What a stamp holds beside the operator: one on a single element in the mode, less the same without it.

    The operator called from Python without the mode is some 0.3 µs slower than called from backward; that is not seen.
    """
    x = torch.zeros(1)
    bare: list[float] = []
    for _ in range(times):
        t0 = time.perf_counter()
        x.zero_()
        bare.append(time.perf_counter() - t0)
    stamps = Stamps()
    with stamps:
        for _ in range(times):
            x.zero_()
    return max(statistics.median(stamps.seconds) - statistics.median(bare), 0.0)


def seconds_of(course: Course, stamps: Stamps, excess: float) -> list[float] | None:
    """Of each operator of ``course`` its time; None if another course was run."""
    if len(stamps.seconds) != len(course.places):
        return None
    return [max(s - excess, LEAST_S) for s, at in zip(stamps.seconds, course.places, strict=True) if at >= 0]
