"""What each plan of a study was predicted to take, before it was run, beside what it took.

A prediction is made once for each cell that trains, before the first round; it costs what `verbs.predict` costs. One
that cannot be made leaves its reason, and no study fails over it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manyhands import verbs
from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.planned import Planned
from manyhands.studies.row import Row
from manyhands.studies.summary import Line, counted


@dataclass(frozen=True)
class Predicted:
    """Of one cell: the median step with its relative error bar, or why there is none."""

    step_s: float | None = None
    error: float | None = None
    reason: str = ""


def predict_all(
    cells: Iterable[Planned], before: Iterable[Row], *, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, Predicted]:
    """By cell, on this machine; what an earlier row says stands."""
    found = {
        row.cell: Predicted(row.predicted_step_s, row.prediction_error)
        for row in before
        if row.predicted_step_s is not None
    }
    for each in cells:
        if each.cell.id in found:
            continue
        assert each.task is not None
        try:
            said = verbs.predict(each.task, each.plan, data_dir=data_dir)
            found[each.cell.id] = Predicted(said.summary.step_s.median, said.error)
        except Exception as e:
            found[each.cell.id] = Predicted(reason=str(e) or type(e).__name__)
    return found


def sentences(lines: Sequence[Line]) -> tuple[str, ...]:
    """How far predictions were off, and which could not be made."""
    known = [line for line in lines if line.prediction_off is not None]
    said = []
    if known:
        off = [abs(line.prediction_off or 0.0) for line in known]
        worst = max(known, key=lambda line: abs(line.prediction_off or 0.0))
        inside = sum(o <= (line.prediction_error or 0.0) for o, line in zip(off, known, strict=True))
        mean = _percent(sum(off) / len(off))
        text = f"Steps of {counted(len(known), 'plan')} were predicted with a mean error of {mean}"
        if len(known) > 1:
            text += f", median {_percent(statistics.median(off))}, {_percent(max(off))} at most ({worst.name})"
        said.append(f"{text}; {inside} of them within the error bar.")
    missing = [line for line in lines if line.unpredicted]
    if missing:
        first = missing[0].unpredicted.strip().splitlines()[0].rstrip(".")
        said.append(f"{counted(len(missing), 'plan')} could not be predicted ({missing[0].name}: {first}).")
    return tuple(said)


def charts(lines: Sequence[Line]) -> tuple[Chart, ...]:
    """Predicted against measured steps, a series a strategy, with the diagonal."""
    series: dict[str, list[Point]] = {}
    for line in lines:
        if line.prediction_off is None or line.step_s is None or line.predicted_step_s is None:
            continue
        x, y, bar = 1e3 * line.step_s.median, 1e3 * line.predicted_step_s, line.prediction_error or 0.0
        series.setdefault(line.strategy, []).append(
            Point(x, y, y * (1 - bar) if bar < 1 else y / (1 + bar), y * (1 + bar))
        )
    if sum(map(len, series.values())) < 2:
        return ()
    every = [value for points in series.values() for p in points for value in (float(p.x), p.y)]
    ends = (min(every), max(every))
    off = [abs(line.prediction_off) for line in lines if line.prediction_off is not None]
    return (
        Chart(
            "predicted-against-measured",
            f"Predictions are off by {_percent(sum(off) / len(off))} in the mean",
            "measured step, ms",
            "predicted step, ms",
            (
                *(Series(name, tuple(points)) for name, points in series.items()),
                Series("ideal: as measured", tuple(Point(end, end) for end in ends), "ideal"),
            ),
            kind="points",
            log_x=True,
            log_y=True,
            note=(
                "A plan a point, medians over its runs; predicted before it was run. Above the line a step was shorter "
                "than predicted. Bars are the predictions' own error bars. Both axes are logarithmic."
            ),
        ),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
