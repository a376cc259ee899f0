"""How a run learned, from the records of its evaluations: what it took to reach a target, and the mean of several runs.

    at the first record that reaches the target y*, between (x₀, y₀) before it and (x₁, y₁):
    x* = x₀ + (x₁ − x₀) (y* − y₀)/(y₁ − y₀)

x: samples, or seconds of training (evaluation is not counted). Linear between records, an approximation that is off by
less than a record's distance. A run that has reached its target at its first record began somewhere unknown: x* = x₁
is an upper bound then, and so it is taken. What never reaches the target has no x*, which is not a long one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from manyhands.studies.row import Row

#: What is learned: shares of right answers, higher being better, or a loss, lower being better.
Scale = Literal["test_accuracy", "test_loss"]
#: What it is learned from.
Cost = Literal["samples", "train_s"]

History = Sequence[Mapping[str, Any]]


def better(scale: Scale, a: float, b: float) -> bool:
    """Whether ``a`` is at least as good as ``b``."""
    return a >= b if scale == "test_accuracy" else a <= b


def points(history: History, scale: Scale, cost: Cost) -> list[tuple[float, float]]:
    """(cost, value) of each record that has both."""
    found = ((record.get(cost), record.get(scale)) for record in history)
    return [(float(x), float(y)) for x, y in found if x is not None and y is not None]


def reached_at(history: History, target: float, scale: Scale, cost: Cost) -> float | None:
    """The cost at which the target was reached for the first time; None if it was not."""
    return crossing(points(history, scale, cost), target, scale)


def crossing(curve: Iterable[tuple[float, float]], target: float, scale: Scale) -> float | None:
    """The same of points (cost, value)."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if better(scale, y, target):
            if before is None:
                return x
            x0, y0 = before
            return x0 + (x - x0) * (target - y0) / (y - y0)
        before = x, y
    return None


def last(history: History, scale: Scale) -> float | None:
    """The value of the last record."""
    values = [y for _, y in points(history, scale, "samples")]
    return values[-1] if values else None


def scale_of(rows: Iterable[Row]) -> Scale | None:
    """Accuracy where every run that was evaluated has one, else the test loss; None where no run says either."""
    histories = [row.history for row in rows if row.history]
    scales: tuple[Scale, ...] = ("test_accuracy", "test_loss")
    for scale in scales:
        if histories and all(points(history, scale, "samples") for history in histories):
            return scale
    return None


@dataclass(frozen=True)
class Learned:
    """The mean over runs at one step: where all of them were evaluated."""

    samples: float
    train_s: float
    value: float
    low: float  # of the runs, the lowest and the highest
    high: float
    runs: int


def mean_curve(histories: Sequence[History], scale: Scale) -> tuple[Learned, ...]:
    """At each step that every run has a record of, in ascending order."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for history in histories:
        for record in {r["step"]: r for r in history if r.get(scale) is not None}.values():
            by_step.setdefault(record["step"], []).append(record)
    return tuple(
        Learned(
            statistics.fmean(r["samples"] for r in records),
            statistics.fmean(r["train_s"] for r in records),
            statistics.fmean(r[scale] for r in records),
            min(r[scale] for r in records),
            max(r[scale] for r in records),
            len(records),
        )
        for _, records in sorted(by_step.items())
        if len(records) == len(histories)
    )
