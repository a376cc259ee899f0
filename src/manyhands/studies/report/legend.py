"""Which line is whose: a row of signs and names above a drawing."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.studies.report.canvas import SIZE, Canvas
from manyhands.studies.report.lettering import shortened, text_width
from manyhands.studies.report.palette import Style

_SIGN, _GAP, _ROW = 22.0, 18.0, 19.0
Entry = tuple[Style, float, float, str]


def placed(styles: Sequence[Style], width: float, top: float) -> tuple[list[Entry], float]:
    """(style, x, base line, text) of each entry, and where the rows end."""
    if len(styles) < 2 and all(s.measured for s in styles):
        return [], top
    entries: list[Entry] = []
    x, y = 0.0, top + SIZE
    for style in styles:
        text = shortened(style.label, SIZE, width - _SIGN - 6)
        need = _SIGN + 6 + text_width(text, SIZE)
        if x and x + need > width:
            x, y = 0.0, y + _ROW
        entries.append((style, x, y, text))
        x += need + _GAP
    return entries, y + 8


def draw_legend(canvas: Canvas, entries: Sequence[Entry], *, boxes: bool = False) -> None:
    """Each series' line and marker, or its box."""
    for style, x, y, text in entries:
        if boxes and style.measured:
            canvas.box(x + 2, y - 10, 18, 11, style)
        else:
            sign(canvas, style, x, y - 4.2)
        canvas.text(x + _SIGN + 6, y, text, colour="ink")


def sign(canvas: Canvas, style: Style, x: float, y: float) -> None:
    """A piece of a series' line."""
    canvas.line([x, x + _SIGN], [y, y], style.colour, width=1.8, dash=style.dash)
    if style.marked:
        canvas.markers([x + _SIGN / 2], [y], style)
