"""A drawing: marks by matplotlib, text by us, in units of a CSS pixel with the origin at the top left.

Matplotlib gets no text, so it needs no font and lays out nothing; the reader's own font letters the drawing. What it
writes is cleaned for a page under a strict content-security policy: no ``style`` attributes, no metadata, no ids but
those that are referred to, and these with a prefix, as a page has many drawings. Equal calls give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

from manyhands.studies.report.lettering import shortened, text_width
from manyhands.studies.report.palette import COLOURS, Style

SIZE = 12.0  # of letters
FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_NAMES = {colour: name for name, colour in COLOURS.items()}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DECIMALS = re.compile(r"-?\d+\.\d+")
_ROUNDED = ("d", "x", "y", "width", "height")
#: What a browser takes for granted.
_DEFAULTS = {("fill-opacity", "1"), ("stroke-opacity", "1"), ("stroke-linecap", "butt"), ("opacity", "1")}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Matplotlib as it comes, whatever its user configured; ids by what they stand for and not by chance."""
    import matplotlib.style

    with matplotlib.style.context(["default", {"svg.hashsalt": "manyhands"}]):
        yield


class Canvas:
    """Lines, areas, boxes, markers and words on a sheet."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=COLOURS["paper"], linewidth=0)
        self._order = 0
        self._texts: list[ElementTree.Element] = []

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: str, *, width: float = 1.0, dash: Sequence[float] = ()
    ) -> None:
        """Through these points."""
        from matplotlib.lines import Line2D

        style: Any = (0, tuple(d / width for d in dash)) if dash else "-"
        self._add(
            Line2D(
                list(xs),
                [self.height - y for y in ys],
                color=COLOURS[colour],
                linewidth=width,
                linestyle=style,
                solid_joinstyle="round",
                solid_capstyle="butt",
            )
        )

    def markers(self, xs: Sequence[float], ys: Sequence[float], style: Style, *, size: float = 6.5) -> None:
        """A series' marker at each of these points, with a rim that parts it from what it lies on."""
        from matplotlib.lines import Line2D

        colour, paper = COLOURS[style.colour], COLOURS["paper"]
        self._add(
            Line2D(
                list(xs),
                [self.height - y for y in ys],
                linestyle="none",
                marker=style.marker,
                markersize=size + (0.8 if style.marker in "^vPX" else 0.0),
                markerfacecolor=paper if style.hollow else colour,
                markeredgecolor=colour if style.hollow else paper,
                markeredgewidth=1.4 if style.hollow else 0.9,
            )
        )

    def area(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: str) -> None:
        """A band between two lines."""
        from matplotlib.patches import Polygon

        points = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
        self._add(
            Polygon(
                [(x, self.height - y) for x, y in points],
                closed=True,
                facecolor=COLOURS[colour],
                alpha=0.16,
                linewidth=0,
                edgecolor="none",
            )
        )

    def box(self, x: float, y: float, width: float, height: float, style: Style) -> None:
        """A bar in the colour and the pattern of a series; ``x`` and ``y`` are its top left corner."""
        from matplotlib.patches import Rectangle

        bar = Rectangle(
            (x, self.height - y - height),
            width,
            height,
            facecolor=COLOURS[style.colour],
            edgecolor=COLOURS["paper"],
            linewidth=0.8,
            hatch=style.hatch or None,
            hatchcolor=COLOURS["paper"],
        )
        bar.set_hatch_linewidth(0.7)
        self._add(bar)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", colour: str = "soft") -> None:
        """``y`` is the base line; ``anchor``: start, middle or end. What would leave the sheet is moved onto it."""
        text = shortened(_printable(text), SIZE, self.width)
        need = text_width(text, SIZE)
        before = {"start": 0.0, "middle": need / 2, "end": need}[anchor]
        x = max(before, min(x, self.width - need + before))
        made = ElementTree.Element("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", **_painted("fill", COLOURS[colour])})
        if anchor != "start":
            made.set("text-anchor", anchor)
        made.text = text
        self._texts.append(made)

    def svg(self, prefix: str, *, title: str, description: str) -> str:
        """The whole drawing; ids in it begin with ``prefix``."""
        written = io.StringIO()
        self._figure.savefig(written, format="svg", metadata={"Date": None})
        root = ElementTree.fromstring(written.getvalue().encode())
        _clean(root, prefix)
        root.attrib.clear()
        root.attrib.update(
            {
                "xmlns": _SVG[1:-1],
                "viewBox": f"0 0 {self.width:g} {self.height:g}",
                "width": f"{self.width:g}",
                "height": f"{self.height:g}",
                "role": "img",
                "aria-label": _printable(f"{title}. {description}"),
                "font-family": FAMILY,
                "font-size": f"{SIZE:g}",
            }
        )
        named = ElementTree.Element("title")
        named.text = _printable(title)
        root.insert(0, named)
        root.extend(self._texts)
        return ElementTree.tostring(root, encoding="unicode")

    def _add(self, artist: Any) -> None:
        """In pixels, over all that was drawn before."""
        from matplotlib.transforms import IdentityTransform

        self._order += 1
        artist.set_transform(IdentityTransform())
        artist.set_zorder(self._order)
        self._figure.add_artist(artist)


def _printable(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(x if x.isprintable() else " " for x in text)


def _painted(attribute: str, colour: str) -> dict[str, str]:
    """The colour itself, and its name as a class: ``f-c1`` for a fill, ``s-c1`` for a stroke."""
    name = _NAMES.get(colour)
    return {attribute: colour} | ({"class": f"{attribute[0]}-{name}"} if name else {})


def _clean(root: ElementTree.Element, prefix: str) -> None:
    used = {m for node in root.iter() for value in node.attrib.values() for m in _references(value)}
    names = {name: f"{prefix}-{i}" for i, name in enumerate(sorted(used))}
    for parent in list(root.iter()):
        for child in list(parent):
            tag = child.tag.removeprefix(_SVG)
            if tag in ("metadata", "style") or (tag == "defs" and all(c.tag == f"{_SVG}style" for c in child)):
                parent.remove(child)
    for parent in root.iter():
        parent[:] = [x for child in parent for x in _unwrapped(child, names)]
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        node.text = node.tail = None
        node.attrib = dict(_attributes(node.attrib, names))


def _unwrapped(node: ElementTree.Element, names: dict[str, str]) -> list[ElementTree.Element]:
    """What a group holds that says nothing itself."""
    if node.tag != f"{_SVG}g" or node.attrib.keys() - {"id"} or node.get("id") in names:
        return [node]
    return [x for child in node for x in _unwrapped(child, names)]


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") and value.lower() not in _NAMES else _REFERENCE.findall(value)


def _attributes(found: dict[str, str], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    styled = dict(part.split(":", 1) for part in found.get("style", "").split(";") if ":" in part)
    said = {**found, **{k.strip(): v.strip() for k, v in styled.items()}}
    classes = []
    for key, value in said.items():
        if key == "style" or (key, value) in _DEFAULTS:
            continue
        if key == "id":
            if value in names:
                yield "id", names[value]
        elif key == f"{_XLINK}href":
            yield "href", f"#{names[value[1:]]}"
        elif key in ("fill", "stroke") and value.lower() in _NAMES:
            painted = _painted(key, value.lower())
            classes.append(painted.pop("class"))
            yield key, painted[key]
        else:
            value = _REFERENCE.sub(lambda m: f"url(#{names[m[1]]})", value)
            yield key, " ".join(_DECIMALS.sub(_rounded, value).split()) if key in _ROUNDED else value
    if classes:
        yield "class", " ".join(classes)


def _rounded(match: re.Match[str]) -> str:
    text = f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
