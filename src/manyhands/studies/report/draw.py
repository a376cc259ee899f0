"""From a chart to a drawing: lines over a number, bars and stacked bars over names.

Intervals are drawn as whiskers, or as a band where points are many. An ideal is dashed and grey; a fit is dotted, a
published line dash-dotted and a simulated one dashed with hollow points, in the colour of the series that they belong
to. No series differs by its colour alone.
"""

from __future__ import annotations

import dataclasses
import math

from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.report.bars import draw_bars
from manyhands.studies.report.canvas import Canvas, settings
from manyhands.studies.report.lettering import number
from manyhands.studies.report.lines import draw_lines

#: Width on paper and on a desktop, and on a phone.
WIDE, NARROW = 760.0, 350.0


def draw(chart: Chart, *, width: float = WIDE, prefix: str = "") -> str:
    """The chart as SVG. ``prefix`` keeps the ids of several drawings on one page apart."""
    drawable, left_out = drawn(chart)
    with settings():
        canvas = _DRAWERS[chart.kind](drawable, width) if drawable.series else _nothing(width)
        return canvas.svg(prefix or chart.name, title=chart.title, description=described(chart, left_out))


def drawn(chart: Chart) -> tuple[Chart, int]:
    """What of a chart can be drawn, and how many points cannot: no number, or none that a logarithm is made of."""
    series, left_out = [], 0
    for s in chart.series:
        points = tuple(_whole(p, chart) for p in s.points if _able(p, chart))
        left_out += len(s.points) - len(points)
        if points:
            series.append(Series(s.name, points, s.role))
    return dataclasses.replace(chart, series=tuple(series)), left_out


def described(chart: Chart, left_out: int = 0) -> str:
    """For those who do not see it; the numbers are in the table below it."""
    kind = {"lines": "Lines", "points": "Points", "bars": "Bars", "stack": "Stacked bars"}[chart.kind]
    names = ", ".join(s.name if s.role == "measured" else f"{s.name} ({s.role})" for s in chart.series)
    text = f"{kind}: {chart.y} over {chart.x}, for {names or 'nothing'}."
    return f"{text} {left_out_words(left_out)}".strip()


def left_out_words(count: int) -> str:
    """What a reader is told about points that are missing in the drawing."""
    if not count:
        return ""
    return f"{count} {'value has' if count == 1 else 'values have'} no place in the drawing; see the table."


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _able(point: Point, chart: Chart) -> bool:
    if not _finite(point.y) or (chart.log_y and point.y <= 0):
        return False
    if chart.kind not in ("lines", "points") or isinstance(point.x, str):
        return isinstance(point.x, str) or _finite(point.x)
    return _finite(point.x) and not (chart.log_x and point.x <= 0 and not _named(chart))


def _named(chart: Chart) -> bool:
    """Whether x is a name: one name makes all of them names."""
    return any(isinstance(p.x, str) for s in chart.series for p in s.points)


def _whole(point: Point, chart: Chart) -> Point:
    """With both ends of the interval or none, and with names as names."""
    ends = (point.low, point.high)
    able = all(_finite(end) for end in ends)
    named = chart.kind not in ("lines", "points") or _named(chart)
    x = number(point.x) if named and not isinstance(point.x, str) else point.x
    return Point(x, float(point.y), *(map(float, ends) if able else ()))  # type: ignore[arg-type]


def _nothing(width: float) -> Canvas:
    canvas = Canvas(width, 90)
    canvas.text(width / 2, 48, "There is nothing to draw here.", anchor="middle")
    return canvas


_DRAWERS = {"lines": draw_lines, "points": draw_lines, "bars": draw_bars, "stack": draw_bars}
