"""Learning as map and reduce: a statistic of the data that is a sum over samples can be computed in parts, and a part
that was lost can be computed again (survey §V-A).

    map       task i ↦ (i, S_i, n_i),   S_i = Σ_{z in part i} s(z)
    reduce    S / n = Σ_i S_i / Σ_i n_i,   each i once

s a statistic of one sample, n_i how many samples part i has: the *summation form* (Chu, Kim, Lin, Yu, Bradski, Ng &
Olukotun 2006, Map-reduce for machine learning on multicore, NeurIPS). With s the gradient at θ, θ ← θ − η S/n is a step
of gradient descent on all data. With one "sample" a part, which is SGD run over it from the same start, S/n is the
average of Zinkevich et al. (2010): see `parallel_sgd`.

A task that fails is run again, and one that dawdles may be run twice; whichever result comes, and however often, its
part counts once. Results are added in the order of their tasks.

Guarantee: equal bit for bit whatever the order in which results come and however many are repeated; equal up to
summation order however the data are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

#: A part of the data; what it is, only the statistic knows.
Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class Partial:
    """What one task found: the sum over its part, and of how many."""

    task: int
    total: Tensor
    count: float


def map_part(task: int, statistic: Callable[[Part], tuple[Tensor, float]], part: Part) -> Partial:
    """The map: ``statistic`` gives the sum over a part of the data and what it counts. Run it as often as you like."""
    total, count = statistic(part)
    return Partial(task, total, float(count))


def reduce_parts(partials: Iterable[Partial], tasks: int) -> tuple[Tensor, float]:
    """The reduce: ``(Σ S_i, Σ n_i)`` over tasks 0 … ``tasks`` − 1, in whatever order and however often they came."""
    found: dict[int, Partial] = {}
    for partial in partials:
        if not 0 <= partial.task < tasks:
            raise ValueError(f"task {partial.task}: there are tasks 0 to {tasks - 1}")
        found.setdefault(partial.task, partial)
    missing = [str(task) for task in range(tasks) if task not in found]
    if missing or not tasks:
        raise ValueError(f"no result of task {', '.join(missing) or '0'}: run it again, a sum wants every part")
    total = found[0].total.clone()
    for task in range(1, tasks):
        total += found[task].total
    return total, sum(found[task].count for task in range(tasks))


def mean_over(statistic: Callable[[Part], tuple[Tensor, float]], parts: Sequence[Part]) -> Tensor:
    """Both, one after the other: the mean of the statistic over all parts."""
    total, count = reduce_parts((map_part(i, statistic, part) for i, part in enumerate(parts)), len(parts))
    return total / count
