"""Charts as drawings: whatever the numbers, well-formed SVG that a strict page may hold, and the same every time."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.report.draw import NARROW, WIDE, draw, drawn
from manyhands.studies.report.lettering import number, shortened, text_width
from manyhands.studies.report.lines import spread
from manyhands.studies.report.palette import COLOURS, styles
from manyhands.studies.report.scale import scale
from tests.studies.reported import CHARTS, EVIL, series

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=40)


@st.composite
def points(draw):
    y = draw(finite)
    low, high = draw(st.sampled_from([(None, None), (y, y), (min(y, 0.0), max(y, 1.0))]))
    return Point(draw(st.one_of(finite, texts, st.integers(-5, 50))), y, low, high)


charts = st.builds(
    Chart,
    name=texts,
    title=texts,
    x=texts,
    y=texts,
    series=st.lists(
        st.builds(
            Series,
            name=texts,
            points=st.lists(points(), max_size=5).map(tuple),
            role=st.sampled_from(["measured", "ideal", "fit", "published", "simulated"]),
        ),
        max_size=4,
    ).map(tuple),
    kind=st.sampled_from(["lines", "points", "bars", "stack"]),
    log_x=st.booleans(),
    log_y=st.booleans(),
)


def chart(*pairs, **fields):
    return Chart(**{"name": "c", "title": "t", "x": "x", "y": "y", "series": tuple(series(*p) for p in pairs)} | fields)


def checked(svg, prefix):
    """Nothing that a strict page would refuse, and nothing off the sheet by its numbers."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(set(ids)) == len(ids)
    assert all(x.startswith(f"{prefix}-") for x in ids)
    for node in root.iter():
        assert node.tag.removeprefix(SVG) in {"svg", "g", "path", "defs", "use", "text", "title", "pattern", "rect"}
        assert not {"style", "onload"} & node.attrib.keys()
        for key, value in node.attrib.items():
            assert set(re.findall(r"url\(#([^)]*)\)", value)) <= set(ids)
            assert key != "href" or value[1:] in ids
            if key in ("d", "x", "y"):
                assert not re.search("nan|inf", value), value
    width = float(root.get("width"))
    for node in root.iter(f"{SVG}text"):
        need = text_width(node.text or "", 12)
        x = float(node.get("x")) - {None: 0, "middle": need / 2, "end": need}[node.get("text-anchor")]
        assert need > width or -0.1 <= x <= width - need + 0.1, node.text
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    return root


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(charts, st.sampled_from([WIDE, NARROW]))
@example(chart(("a", [(1.0, 1e308), (2.0, -1e308)])), WIDE)
@example(chart(("a", [(5e-324, 5e-324), (1e308, 1e308)]), log_x=True, log_y=True), WIDE)
@example(chart(("a", [(1.0, 1.0), (math.nextafter(1, 2), math.nextafter(1, 2))])), NARROW)
@example(chart(("a", [("", 0.0)]), kind="bars"), NARROW)
@example(chart(("$x^2$", [("$\\frac$", 1.0)]), title="\x00\ud800￿", kind="stack", log_y=True), WIDE)
def test_whatever_is_finite_can_be_drawn(some, width):
    checked(draw(some, width=width, prefix="p"), "p")


@pytest.mark.parametrize("each", CHARTS, ids=lambda c: c.name)
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_each_kind_of_chart_is_small_and_the_same_every_time(each, width):
    svg = draw(each, width=width)
    assert svg == draw(each, width=width)
    checked(svg, each.name)
    assert len(svg) < 30_000


def test_all_colours_are_classes_too_so_that_the_page_can_change_them():
    for each in CHARTS:
        for node in ElementTree.fromstring(draw(each)).iter():
            for key in ("fill", "stroke"):
                if node.get(key, "none").startswith("#"):
                    name = next(n for n, colour in COLOURS.items() if colour == node.get(key))
                    assert f"{key[0]}-{name}" in node.get("class").split()


def test_what_is_no_number_or_has_no_logarithm_is_left_out_and_counted():
    nan, inf = math.nan, math.inf
    some = chart(("a", [(1, nan), (2, inf), (3, None), (4, 1.0), (nan, 1.0), (5, 2.0, nan, 3.0)]))
    left, count = drawn(some)
    assert [p.x for p in left.series[0].points] == [4, 5]
    assert left.series[0].points[1].low is None
    assert count == 4
    logarithmic = chart(("a", [(0, 1.0), (1, 0.0), (2, -1.0), (3, 4.0)]), ("b", [(1, 0.0)]), log_x=True, log_y=True)
    left, count = drawn(logarithmic)
    assert [[p.x for p in s.points] for s in left.series] == [[3]]
    assert count == 4
    assert "4 values have no place in the drawing" in draw(logarithmic)


def test_nothing_to_draw_says_so():
    assert "There is nothing to draw here." in draw(chart())
    assert "There is nothing to draw here." in draw(chart(("a", [(1, math.nan)])))


def test_charts_need_no_font(monkeypatch):
    import matplotlib
    from matplotlib import font_manager, text, textpath

    expected = [draw(each) for each in CHARTS]

    def missing(*_, **__):
        raise FileNotFoundError("no font at all")

    for module in (text, textpath, font_manager):
        monkeypatch.setattr(module, "get_font", missing)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(type(font_manager.fontManager), "findfont", missing)
    with matplotlib.rc_context({"font.family": ["No Such Font"]}):
        assert [draw(each) for each in CHARTS] == expected


def test_what_the_user_configured_for_matplotlib_changes_nothing():
    import matplotlib

    before = dict(matplotlib.rcParams)
    expected = draw(CHARTS[0])
    configured = {"lines.linewidth": 9, "savefig.bbox": "tight", "path.sketch": (1, 1, 1), "savefig.transparent": True}
    with matplotlib.rc_context(configured):
        assert draw(CHARTS[0]) == expected
    assert dict(matplotlib.rcParams) == before


def test_two_drawings_of_one_chart_share_no_id():
    a, b = (draw(CHARTS[4], prefix=p) for p in ("a", "b"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (a, b)]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_names_are_text_and_not_markup_nor_mathematics():
    svg = draw(chart((EVIL, [(1, 1.0), (2, 2.0)]), ("$x$", [(1, 1.0), (2, 3.0)]), title=EVIL))
    root = checked(svg, "c")
    assert root.find(f"{SVG}title").text == EVIL
    assert "$x$" in [node.text for node in root.iter(f"{SVG}text")]


def test_no_two_measured_series_look_alike_but_for_their_colour():
    looks = styles([series(f"s{i}", [(1, 1.0)]) for i in range(14)])
    assert len({(s.marker, s.hollow) for s in looks}) == 14
    for i, a in enumerate(looks):
        for b in looks[:i]:
            assert (a.hatch, a.hollow) != (b.hatch, b.hollow)


def test_a_fit_has_the_colour_of_what_it_fits_and_a_dash_of_its_own():
    a, b, fit, ideal, published = styles(
        [
            series("one", []),
            series("two", []),
            series("two, fitted", [], "fit"),
            series("i", [], "ideal"),
            series("p", [], "published"),
        ]
    )
    assert fit.colour == b.colour != a.colour
    assert (fit.label, ideal.label, published.label) == ("two, fitted", "i (ideal)", "p (published)")
    assert len({fit.dash, ideal.dash, published.dash, a.dash}) == 4


def test_intervals_and_ideals_are_drawn():
    plain = draw(chart(("a", [(1, 1.0), (2, 2.0)])))
    assert draw(chart(("a", [(1, 1.0, 0.5, 1.5), (2, 2.0)]))).count("s-c1") == plain.count("s-c1") + 1
    band = draw(chart(("a", [(i, float(i), i - 0.5, i + 0.5) for i in range(40)])))
    assert band.count("fill-opacity") + band.count(" opacity") == 1
    assert "stroke-dasharray" in draw(chart(("a", [(1, 1.0), (2, 2.0)]), ("i", [(1, 1.0), (2, 2.0)], "ideal")))
    assert "stroke-dasharray" not in plain


@given(st.lists(finite, max_size=6), st.booleans(), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_in_order(values, log, zero, outward):
    axis = scale(values, log=log, zero=zero and not log, outward=outward)
    assert axis.low < axis.high
    places = [axis.at(v) for v in sorted(values) if v > 0 or not log]
    assert places == sorted(places)
    assert all(0 <= p <= 1 for p in places)
    assert len(axis.ticks) <= 12
    assert len(set(axis.labels())) == len(axis.ticks)


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0, 16], False, "0 5 10 15 20"),
        ([0.91, 0.972], False, "0.9 0.92 0.94 0.96 0.98"),
        ([1, 1000], True, "1 3 10 30 100 300 1,000"),
        ([9, 103], True, "5 10 20 50 100 200"),
        ([1e-7, 1e-3], True, "10⁻⁷"),
        ([30_000], False, "0 10,000 20,000 30,000"),
    ],
)
def test_ticks_are_round_numbers(values, log, labels):
    found = scale(values, log=log, zero=len(values) == 1)
    assert labels.split()[-1] in " ".join(found.labels())
    if len(labels.split()) > 3:
        assert " ".join(found.labels()) == labels


def test_labels_beside_lines_do_not_overlap():
    places = spread([10, 10, 12, 90, 100], 15, 0, 100)
    assert all(b - a >= 15 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 100


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-1.5, "−1.5"),
        (999.96, "1,000"),
        (123456, "123,456"),
        (1e6, "1,000,000"),
        (1e7, "1×10⁷"),
        (4.25e-9, "4.25×10⁻⁹"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@given(texts, st.floats(20, 300))
def test_a_text_is_shortened_to_its_room(text, room):
    short = shortened(text, 12, room)
    assert short == text or "…" in short
    assert text_width(short, 12) <= max(room, text_width(text[:1] + "…" + text[-1:], 12) + 12)
