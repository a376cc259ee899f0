"""Bars over names, side by side or stacked; lying where the names are long."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.studies.analysis import Chart, Series
from manyhands.studies.report import legend
from manyhands.studies.report.canvas import SIZE, Canvas
from manyhands.studies.report.lettering import number, shortened, text_width
from manyhands.studies.report.lines import whisker
from manyhands.studies.report.palette import Style, styles
from manyhands.studies.report.scale import Scale, scale

_LINE = 15.0
#: Of the sheet's width, at most this much for names at the left; longer ones stand above their bars.
_NAMES = 0.36


@dataclass(frozen=True)
class Bar:
    """From ``start`` to ``end`` on the axis of values."""

    group: int
    place: int  # among the bars of its group
    start: float
    end: float
    low: float | None
    high: float | None
    style: Style
    text: str = ""


@dataclass(frozen=True)
class Level:
    """An ideal, fit or published value: a line across the bars of a group."""

    group: int
    value: float
    style: Style


@dataclass(frozen=True)
class Bars:
    """A chart as bars, before it is decided how they lie."""

    groups: tuple[str, ...]
    places: int  # bars a group
    bars: tuple[Bar, ...]
    levels: tuple[Level, ...]
    values: Scale
    looks: tuple[Style, ...]


def draw_bars(chart: Chart, width: float) -> Canvas:
    """See the module's head."""
    bars = arranged(chart)
    slot = (width - 50) / len(bars.groups)
    longest = max(text_width(g, SIZE) for g in bars.groups)
    upright = longest <= slot - 8 and slot * 0.7 / bars.places >= 7 and len(bars.groups) <= 12
    return _upright(chart, bars, width) if upright else _lying(chart, bars, width)


def arranged(chart: Chart) -> Bars:
    """Which bars there are, and from where to where."""
    looks = [s if s.measured else dataclasses.replace(s, colour="ink") for s in styles(chart.series)]
    groups = tuple(dict.fromkeys(str(p.x) for s in chart.series for p in s.points))
    measured = [(s, style) for s, style in zip(chart.series, looks, strict=True) if style.measured]
    stacked = chart.kind == "stack"
    bars = _stacked(measured, groups) if stacked else _beside(measured, groups)
    levels = tuple(
        Level(groups.index(str(p.x)), p.y, style)
        for s, style in zip(chart.series, looks, strict=True)
        if not style.measured
        for p in s.points
    )
    ends = [v for b in bars for v in (b.start, b.end, b.low, b.high) if v is not None] + [x.value for x in levels]
    values = scale([v for v in ends if v > 0] if chart.log_y else ends, log=chart.log_y, zero=not chart.log_y)
    if chart.log_y and stacked:
        bars = [b for b in bars if b.end > 0]
    return Bars(groups, 1 if stacked else max(1, len(measured)), tuple(bars), levels, values, tuple(looks))


def _beside(measured: Sequence[tuple[Series, Style]], groups: Sequence[str]) -> list[Bar]:
    return [
        Bar(groups.index(str(p.x)), place, 0.0, p.y, p.low, p.high, style, number(p.y, 3))
        for place, (s, style) in enumerate(measured)
        for p in s.points
    ]


def _stacked(measured: Sequence[tuple[Series, Style]], groups: Sequence[str]) -> list[Bar]:
    """Each on those before it, values below zero downwards; whole stacks are labelled with their sum."""
    tops: dict[tuple[str, bool], float] = {}
    found = []
    for s, style in measured:
        for p in s.points:
            key = str(p.x), p.y < 0
            start = tops.get(key, 0.0)
            tops[key] = start + p.y
            low, high = (None if v is None else start + v for v in (p.low, p.high))
            found.append(Bar(groups.index(str(p.x)), 0, start, start + p.y, low, high, style))
    for name in groups:
        if (name, False) in tops and (name, True) not in tops:
            total, group = tops[name, False], groups.index(name)
            last = max(i for i, b in enumerate(found) if b.group == group)
            found[last] = dataclasses.replace(found[last], text=number(total, 3))
    return found


def _upright(chart: Chart, bars: Bars, width: float) -> Canvas:
    title = shortened(chart.y, SIZE, width)
    entries, top = legend.placed(bars.looks, width, 4 + _LINE)
    top += 14
    height = top + (260 if width > 500 else 210) + 48
    bottom = height - 48
    labels = bars.values.labels()
    left, right = max((text_width(t, SIZE) for t in labels), default=0.0) + 10, width - 4
    canvas = Canvas(width, height)
    canvas.text(0, SIZE, title)

    def y(value: float) -> float:
        return bottom - bars.values.at(value) * (bottom - top)

    for value, text in zip(bars.values.ticks, labels, strict=True):
        canvas.line([left, right], [y(value)] * 2, "grid")
        canvas.text(left - 7, y(value) + 4, text, anchor="end")
    slot = (right - left) / len(bars.groups)
    thick = min(0.72 * slot / bars.places, 64.0)
    for i, name in enumerate(bars.groups):
        canvas.text(left + (i + 0.5) * slot, bottom + 18, name, anchor="middle")

    def x(bar_or_level: Bar | Level, place: float) -> float:
        return left + (bar_or_level.group + 0.5) * slot + (place - bars.places / 2) * thick

    for b in bars.bars:
        top_y, bottom_y = sorted((y(b.start), y(b.end)))
        canvas.box(x(b, b.place), top_y, thick, max(bottom_y - top_y, 0.5), b.style)
    canvas.line([left, right], [y(0.0)] * 2, "soft")
    for b in bars.bars:
        middle = x(b, b.place) + thick / 2
        if b.low is not None and b.high is not None:
            whisker(canvas, middle, y(b.low), y(b.high), "ink")
        if b.text and b.end >= 0 and text_width(b.text, SIZE) <= thick:
            over = b.high if b.high is not None else b.end
            canvas.text(middle, y(max(over, b.end)) - 5, b.text, anchor="middle", colour="ink")
    for level in bars.levels:
        ends = [x(level, 0) - 5, x(level, bars.places) + 5]
        canvas.line(ends, [y(level.value)] * 2, level.style.colour, width=2, dash=level.style.dash)
    canvas.text((left + right) / 2, height - 8, shortened(chart.x, SIZE, width), anchor="middle")
    legend.draw_legend(canvas, entries, boxes=True)
    return canvas


def _lying(chart: Chart, bars: Bars, width: float) -> Canvas:
    longest = max(text_width(g, SIZE) for g in bars.groups)
    above = longest > _NAMES * width
    thick = 15.0 if bars.places == 1 else 11.0
    group = bars.places * thick + (30.0 if above else 11.0)
    first = 20.0 if above else 5.5
    entries, top = legend.placed(bars.looks, width, -2)
    top += _LINE + (4 if entries else 0)
    bottom = top + group * len(bars.groups) + (6 if above else 0)
    left = 1.0 if above else longest + 10
    numbers = max((text_width(b.text, SIZE) for b in bars.bars), default=0.0) + 10
    right = width - numbers
    canvas = Canvas(width, bottom + 46)

    def x(value: float) -> float:
        return left + bars.values.at(value) * (right - left)

    def y(bar_or_level: Bar | Level, place: float) -> float:
        return top + bar_or_level.group * group + first + place * thick

    canvas.text(0 if above else left - 10, top - 4, shortened(chart.x, SIZE, width), anchor="start" if above else "end")
    ticks = list(zip(bars.values.ticks, bars.values.labels(), strict=True))
    while len(ticks) > 2 and sum(text_width(t, SIZE) + 10 for _, t in ticks) > right - left:
        ticks = ticks[::2]
    for value, text in ticks:
        canvas.line([x(value)] * 2, [top, bottom], "grid")
        anchor = "start" if above and x(value) < 12 else "middle"
        canvas.text(x(value), bottom + 16, text, anchor=anchor)
    for i, name in enumerate(bars.groups):
        middle = top + i * group + first + bars.places * thick / 2
        if above:
            canvas.text(left + 4, top + i * group + 16, shortened(name, SIZE, width), colour="ink")
        else:
            canvas.text(left - 10, middle + 4, name, anchor="end", colour="ink")
    for b in bars.bars:
        from_x, to_x = sorted((x(b.start), x(b.end)))
        canvas.box(from_x, y(b, b.place), max(to_x - from_x, 0.5), thick, b.style)
    canvas.line([x(0.0)] * 2, [top, bottom], "soft")
    for b in bars.bars:
        middle, end = y(b, b.place) + thick / 2, x(b.end)
        if b.low is not None and b.high is not None:
            _lying_whisker(canvas, middle, x(b.low), x(b.high))
            end = max(end, x(b.high))
        if b.text and b.end >= 0:
            canvas.text(end + 6, middle + 4, b.text, colour="ink")
    for level in bars.levels:
        ends = [y(level, 0) - 3, y(level, bars.places) + 3]
        canvas.line([x(level.value)] * 2, ends, level.style.colour, width=2, dash=level.style.dash)
    canvas.text((left + right) / 2, bottom + 38, shortened(chart.y, SIZE, width), anchor="middle")
    legend.draw_legend(canvas, entries, boxes=True)
    return canvas


def _lying_whisker(canvas: Canvas, y: float, low: float, high: float) -> None:
    gap = math.nan
    ys = [y, y, gap, y - 3, y + 3, gap, y - 3, y + 3]
    canvas.line([low, high, gap, low, low, gap, high, high], ys, "ink", width=1.2)
