"""How good predictions are: relative errors, bias, ranks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Of predictions against measurements; relative errors, signed ones positive where the prediction is too slow."""

    n: int
    failures: int
    mean: float
    median: float
    p90: float
    worst: float
    bias: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float | None, float]]) -> Score:
        """(predicted, measured); None where nothing was predicted."""
        signed = [p / m - 1 for p, m in pairs if p is not None]
        errors = sorted(map(abs, signed))
        if not errors:
            nan = float("nan")
            return cls(0, len(pairs), nan, nan, nan, nan, nan)
        p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
        mean, bias = statistics.fmean(errors), statistics.fmean(signed)
        return cls(len(errors), len(pairs) - len(errors), mean, statistics.median(errors), p90, errors[-1], bias)

    def cells(self) -> list[str]:
        """As columns: mean, median, p90, max, bias in percent; rows; failures."""
        percent = [f"{100 * x:.1f}" for x in (self.mean, self.median, self.p90, self.worst)]
        return [*percent, f"{100 * self.bias:+.1f}", str(self.n), str(self.failures)]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; nan where one side has a single rank."""
    a, b = _ranks(x), _ranks(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def within_groups(found: Sequence[tuple[Hashable, float, float]], least: int = 4) -> tuple[float, int]:
    """The median rank correlation within groups of at least so many rows, and how many groups; (group, x, y)."""
    groups: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for group, x, y in found:
        groups[group].append((x, y))
    ranks = [spearman(*zip(*g, strict=True)) for g in groups.values() if len(g) >= least]
    ranks = [r for r in ranks if r == r]
    return (statistics.median(ranks) if ranks else float("nan")), len(ranks)


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: np.ndarray = (ends - (counts - 1) / 2.0)[inverse]
    return middle


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, columns as wide as they need."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]
