"""Lines over a number, or over names in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.studies.analysis import Chart, Point
from manyhands.studies.report import legend
from manyhands.studies.report.canvas import SIZE, Canvas
from manyhands.studies.report.lettering import number, shortened, text_width
from manyhands.studies.report.palette import Style, styles
from manyhands.studies.report.scale import Scale, positive, scale

#: More points than this get a band instead of whiskers, and a marker on some of them only.
_WHISKERS = 16
#: Of values that lie above zero, an axis begins at zero when the least is below this share of the largest.
_FROM_ZERO = 0.5
_LINE = 15.0
#: From the axis to the first point, so that its marker stands free.
_INSET = 8.0


@dataclass(frozen=True)
class Frame:
    """The rectangle of an axis each way, and from values to places on the sheet."""

    left: float
    top: float
    right: float
    bottom: float
    x: Scale
    y: Scale

    def px(self, value: float) -> float:
        """From the left of the sheet."""
        return self.left + _INSET + self.x.at(value) * (self.right - self.left - 2 * _INSET)

    def py(self, value: float) -> float:
        """From its top."""
        return self.bottom - self.y.at(value) * (self.bottom - self.top)


def draw_lines(chart: Chart, width: float) -> Canvas:
    """See the module's head."""
    names = list(dict.fromkeys(p.x for s in chart.series for p in s.points if isinstance(p.x, str)))
    series = [sorted((_at(p, names) for p in s.points), key=lambda p: float(p.x)) for s in chart.series]
    looks = styles(chart.series)
    log_x = chart.log_x and not names
    xs = sorted({float(p.x) for points in series for p in points})
    y_scale = _y_scale(series, chart.log_y)
    x_scale = scale([-0.4, len(names) - 0.6] if names else xs, log=log_x, outward=False)

    ticks_left = max((text_width(t, SIZE) for t in y_scale.labels()), default=0.0) + 10
    ends = chart.kind == "lines" and _ends_together(series, x_scale) and width > 500 and 2 <= len(series) <= 8
    right_room = min(max(text_width(s.label, SIZE) for s in looks), 0.26 * width) + 30 if ends else 10
    y_title = _wrapped(chart.y, width)
    entries, top = legend.placed([] if ends else looks, width, 4 + _LINE * len(y_title))
    top += 10 if ends or not entries else 6
    height = top + (300 if width > 500 else 230) + 48
    frame = Frame(ticks_left, top, width - right_room, height - 48, x_scale, y_scale)

    canvas = Canvas(width, height)
    for i, text in enumerate(y_title):
        canvas.text(0, SIZE + i * _LINE, text)
    for value, text in zip(y_scale.ticks, y_scale.labels(), strict=True):
        y = frame.py(value)
        canvas.line([frame.left, frame.right], [y, y], "grid")
        canvas.text(frame.left - 7, y + 4, text, anchor="end")
    canvas.line([frame.left, frame.right], [frame.bottom] * 2, "soft")
    for value, text in _x_ticks(xs, names, frame):
        canvas.line([frame.px(value)] * 2, [frame.bottom, frame.bottom + 4], "soft")
        canvas.text(frame.px(value), frame.bottom + 18, text, anchor="middle")
    canvas.text((frame.left + frame.right) / 2, height - 8, shortened(chart.x, SIZE, width), anchor="middle")
    for points, style in zip(series, looks, strict=True):
        _intervals(canvas, points, style, frame)
    for layer in (_unmeasured, _points if chart.kind == "points" else _measured):
        for nth, (points, style) in enumerate(zip(series, looks, strict=True)):
            layer(canvas, points, style, frame, nth)
    if ends:
        _end_labels(canvas, series, looks, frame, width)
    legend.draw_legend(canvas, entries)
    return canvas


def _at(point: Point, names: Sequence[str]) -> Point:
    x = float(names.index(point.x)) if isinstance(point.x, str) else float(point.x)
    return Point(x, point.y, point.low, point.high)


def _y_scale(series: Sequence[Sequence[Point]], log: bool) -> Scale:
    values = [v for points in series for p in points for v in (p.y, p.low, p.high) if v is not None]
    values = [positive(v) for v in values if v > 0] if log else values
    low, high = min(values), max(values)
    return scale(values, log=log, zero=not log and (high <= 0 or 0 <= low < _FROM_ZERO * high))


def _wrapped(text: str, width: float) -> list[str]:
    """On two lines at most."""
    words, found = text.split(), [""]
    for word in words:
        longer = f"{found[-1]} {word}".strip()
        if text_width(longer, SIZE) <= width or not found[-1] or len(found) == 2:
            found[-1] = longer
        else:
            found.append(word)
    return [shortened(line, SIZE, width) for line in found]


def _x_ticks(xs: Sequence[float], names: Sequence[str], frame: Frame) -> list[tuple[float, str]]:
    """The measured places themselves where they are few and far enough apart, else round numbers."""
    if names:
        slot = (frame.right - frame.left) / len(names)
        every = max(1, -(-30 // max(1, int(slot))))
        return [(i, shortened(x, SIZE, max(24.0, every * slot - 8))) for i, x in enumerate(names) if i % every == 0]
    own = [(x, number(x)) for x in xs]
    if len(own) <= 10 and len({text for _, text in own}) == len(own) and _apart(own, frame):
        return own
    ticks = list(zip(frame.x.ticks, frame.x.labels(), strict=True))
    while len(ticks) > 2 and not _apart(ticks, frame):
        ticks = ticks[::2]
    return ticks or own[:1]


def _apart(ticks: Sequence[tuple[float, str]], frame: Frame) -> bool:
    half = [text_width(text, SIZE) / 2 for _, text in ticks]
    places = [frame.px(x) for x, _ in ticks]
    return all(b - a >= left + right + 6 for a, b, left, right in zip(places, places[1:], half, half[1:], strict=False))


def _intervals(canvas: Canvas, points: Sequence[Point], style: Style, frame: Frame) -> None:
    said = [p for p in points if p.low is not None and p.high is not None]
    if len(said) > _WHISKERS or (said and not style.measured):
        canvas.area(*_columns(said, frame), style.colour)
        return
    for x, low, high in zip(*_columns(said, frame), strict=True):
        whisker(canvas, x, low, high, style.colour)


def _columns(points: Sequence[Point], frame: Frame) -> tuple[list[float], list[float], list[float]]:
    return (
        [frame.px(float(p.x)) for p in points],
        [frame.py(p.low) for p in points if p.low is not None],
        [frame.py(p.high) for p in points if p.high is not None],
    )


def whisker(canvas: Canvas, x: float, low: float, high: float, colour: str) -> None:
    """From the lower to the upper end of an interval."""
    gap = math.nan
    xs = [x, x, gap, x - 3, x + 3, gap, x - 3, x + 3]
    canvas.line(xs, [low, high, gap, low, low, gap, high, high], colour, width=1.2)


def _unmeasured(canvas: Canvas, points: Sequence[Point], style: Style, frame: Frame, _: int) -> None:
    if style.measured:
        return
    xs, ys = [frame.px(float(p.x)) for p in points], [frame.py(p.y) for p in points]
    if len(points) == 1:
        xs, ys = [xs[0] - 12, xs[0] + 12], [ys[0], ys[0]]
    canvas.line(xs, ys, style.colour, width=1.6, dash=style.dash)
    if style.marked:
        canvas.markers(xs, ys, style)


def _measured(canvas: Canvas, points: Sequence[Point], style: Style, frame: Frame, nth: int) -> None:
    if not style.measured:
        return
    xs, ys = [frame.px(float(p.x)) for p in points], [frame.py(p.y) for p in points]
    canvas.line(xs, ys, style.colour, width=1.8)
    every = max(1, len(points) // 8) if len(points) > _WHISKERS else 1
    first = nth % every
    canvas.markers(xs[first::every] or xs[-1:], ys[first::every] or ys[-1:], style)


def _points(canvas: Canvas, points: Sequence[Point], style: Style, frame: Frame, _: int) -> None:
    if style.measured:
        canvas.markers([frame.px(float(p.x)) for p in points], [frame.py(p.y) for p in points], style)


def _ends_together(series: Sequence[Sequence[Point]], x: Scale) -> bool:
    """Whether all lines reach the right end, so that a name can stand beside it."""
    return all(x.at(float(points[-1].x)) > 0.97 for points in series) and x.low < x.high


def _end_labels(
    canvas: Canvas, series: Sequence[Sequence[Point]], looks: Sequence[Style], frame: Frame, width: float
) -> None:
    """Names beside the lines' ends, pushed apart where they would overlap."""
    wanted = [frame.py(points[-1].y) for points in series]
    x = frame.right + 8
    for y, nth in zip(spread(wanted, _LINE, frame.top - 4, frame.bottom + 4), _by_place(wanted), strict=True):
        end = frame.px(float(series[nth][-1].x))
        canvas.line([end + 5, x], [wanted[nth], y], "ideal", width=0.6)
        text = shortened(looks[nth].label, SIZE, width - x - 4)
        canvas.text(x + 4, y + 4, text, colour="ink")


def _by_place(wanted: Sequence[float]) -> list[int]:
    return sorted(range(len(wanted)), key=lambda i: wanted[i])


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places from the top down, ``gap`` apart, each near where it is wanted.

    >>> spread([10, 11, 50], 10, 0, 60)
    [5.5, 15.5, 50.0]
    """
    clusters: list[tuple[float, int]] = []  # middle, count
    for y in sorted(wanted):
        clusters.append((float(y), 1))
        while len(clusters) > 1 and _overlap(clusters[-2], clusters[-1], gap):
            (b, m), (a, n) = clusters.pop(), clusters.pop()
            clusters.append(((a * n + b * m) / (n + m), n + m))
    found = [middle + (i - (n - 1) / 2) * gap for middle, n in clusters for i in range(n)]
    last = len(found) - 1
    found = [min(y, bottom - (last - i) * gap) for i, y in enumerate(found)]
    return [max(y, top + i * gap) for i, y in enumerate(found)]


def _overlap(a: tuple[float, int], b: tuple[float, int], gap: float) -> bool:
    return b[0] - a[0] < gap * (a[1] + b[1]) / 2
