"""The tables of a calibration: curves between and beyond their knots, and a file that says what was measured."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.cluster.file import dumps, parse
from manyhands.cluster.measured import OPERATIONS, TRANSPORTS, Curve, OperatorTime
from manyhands.communication.transports import transports
from manyhands.communication.transports.events import Operation
from manyhands.errors import BadInput, UnknownName
from tests.cluster.measured_tables import OPERATOR, calibrated, curve

seconds = st.floats(1e-9, 100.0)
knots = st.lists(st.tuples(st.integers(0, 2**26), seconds), min_size=1, max_size=8, unique_by=lambda k: k[0]).map(
    sorted
)


def of(points, **more):
    return curve(seconds=tuple(s for _, s in points), sizes_B=tuple(n for n, _ in points), **more)


@given(knots, st.floats(0, 2**30))
def test_a_curve_goes_through_its_knots_and_stays_between_them(points, size):
    found = of(points)
    for n, s in points:
        assert found.at(n) == pytest.approx(s, rel=1e-12)
    around = [s for n, s in points if n <= size][-1:] + [s for n, s in points if n >= size][:1]
    if len(around) == 2:
        assert min(around) * (1 - 1e-9) <= found.at(size) <= max(around) * (1 + 1e-9)


def test_between_knots_it_is_straight_in_the_logarithms_and_beyond_in_the_bytes():
    found = curve(seconds=(1e-5, 2e-5, 4e-4))
    assert found.at(512) == pytest.approx(math.sqrt(1e-5 * 2e-5))
    slope = (4e-4 - 2e-5) / (2**20 - 4096)
    assert found.at(2**22) == pytest.approx(4e-4 + slope * (2**22 - 2**20))
    assert found.at(0) == 1e-5
    assert (found.spread_at(1), found.spread_at(2**30)) == (0.02, 0.02)


def test_what_has_no_logarithm_is_straight_in_the_bytes():
    assert of([(0, 1e-6), (100, 3e-6)]).at(50) == pytest.approx(2e-6)
    assert of([(64, 0.0), (192, 4e-6)]).at(128) == pytest.approx(2e-6)


def test_names_are_those_of_transports_and_operations():
    assert set(TRANSPORTS) <= set(transports)
    assert {"all_reduce", "send", "pull", "barrier"} <= set(OPERATIONS)
    assert Operation._fields[0] == "name"


operator = st.builds(
    OperatorTime,
    name=st.text(max_size=5),
    phase=st.sampled_from(["forward", "backward", "update"]),
    operands=st.lists(st.lists(st.integers(0, 9)).map(tuple), max_size=3).map(tuple),
    results=st.just(((2, 3),)),
    options=st.text(max_size=8),
    dtype=st.just("float32"),
    threads=st.integers(1, 4),
    co_runners=st.integers(1, 4),
    seconds=seconds,
    spread=st.floats(0, 9),
)


@given(knots, st.booleans(), st.lists(operator, max_size=3), st.text(max_size=10))
def test_what_is_written_reads_back_equal(points, crowded, operators, note):
    made = calibrated(
        of(points, operation="barrier", oversubscribed=crowded, probe_s=(2.4e-7, 8.9e-7)),
        curve("gloo", "send", 8),
        operators=operators,
        host={"processor": "a", "cores": 2, "jitter": {"ratios": [1.0, 1.5]}},
        notes=(note,),
    )
    assert parse(dumps(made)) == made


def test_a_few_bytes_may_take_no_time_and_many_may_not():
    quick = calibrated(curve("gloo", "all_gather", 8, seconds=(0.0, 2e-5)))
    assert parse(dumps(quick)) == quick
    with pytest.raises(BadInput, match="67108864 B in 0 s"):
        parse(dumps(calibrated(curve(seconds=(1e-5, 0.0), sizes_B=(64, 2**26)))))


def test_a_line_a_curve_and_a_line_an_operator():
    text = dumps(calibrated(curve(), curve(ranks=4), operators=[OPERATOR, OPERATOR]))
    assert len([line for line in text.splitlines() if line.startswith("shared.all_reduce.")]) == 2
    assert len([line for line in text.splitlines() if line.startswith('  ["addmm"')]) == 2


TEXT = dumps(calibrated(curve(), operators=[OPERATOR, OPERATOR]))


def line_of(part):
    return next(i for i, line in enumerate(TEXT.splitlines(), 1) if part in line)


CURVE_LINE, ROW = line_of("shared.all_reduce.2"), line_of('["addmm"')


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('unit = "s", sizes', 'unit = "us", sizes', [f"line {CURVE_LINE}", "1e-05 us cannot be right", "Is the unit"]),
        ('unit = "s", sizes', 'unit = "ns", sizes', [f"line {CURVE_LINE}", "cannot be right", "lies between"]),
        ('unit = "s", sizes', 'unit = "B", sizes', [f"line {CURVE_LINE}", "measures a size", "ms"]),
        ('unit = "s", sizes', 'unit = 3, sizes', [f"line {CURVE_LINE}", "is no unit"]),
        ("0.0004]", "1e-9]", [f"line {CURVE_LINE}", "1048576 B in 1e-09 s", "no memory is so fast", "Is s meant?"]),
        ("0.0004]", "-1.0]", [f"line {CURVE_LINE}", "-1 s cannot be right"]),
        ("0.0004]", "nan]", [f"line {CURVE_LINE}", "no finite number"]),
        ("0.0004]", "0.0004, 1.0]", ["3 sizes, 4 times, 3 spreads"]),
        ("times = [", "time = [", [f"line {CURVE_LINE}", "'time'", "Did you mean 'times'?"]),
        (", spread = [0.02, 0.02, 0.02]", "", [f"line {CURVE_LINE}", "spread is missing"]),
        ("[0.02, 0.02, 0.02]", "[0.02, 20, 0.02]", ["20 is no spread"]),
        ("4096, 1048576", "1048576, 4096", ["do not grow"]),
        ("4096, 1048576", "4096.5, 1048576", ["bytes are whole"]),
        ("shared.all_reduce.2", "shard.all_reduce.2", [f"line {CURVE_LINE}", "Did you mean 'shared'?"]),
        ("shared.all_reduce.2", "shared.allreduce.2", ["Did you mean 'all_reduce'?"]),
        ("shared.all_reduce.2", "shared.all_reduce.two", ["no number of ranks"]),
        ("shared.all_reduce.2 = {", "shared.all_reduce = {", ["no number of ranks"]),
        ("shared.all_reduce.2 = {", "shared = 1\n# {", ["shared", "it is a table"]),
        ('when = "2026-11-21T19:00:00Z"', "when = 2026", ["when", "as text"]),
        ('unit = "s"\ncolumns', 'unit = "km"\ncolumns', ["operators", "no unit 'km'"]),
        ('columns = ["name", ', "columns = [", ["the columns are name, phase"]),
        ('  ["addmm", "forward", [[50]', '  ["addmm", 3, [[50]', [f"line {ROW}", "phase is text"]),
        ('  ["addmm", "forward", [[50]', '  ["addmm", "forward", [["x"]', [f"line {ROW}", "are shapes"]),
        ("8.75e-05, 0.01]", "8.75e-05]", [f"line {ROW}", f"a row has {len(dataclasses.fields(OPERATOR))} values"]),
        ('"", 10035200, ', '"", -1, ', [f"line {ROW}", "flops is a whole number from 0"]),
        ("cores = 2", "cores = 2026-11-21", ["host.cores", "numbers, texts"]),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused_with_line_and_unit(old, new, says):
    assert old in TEXT
    with pytest.raises((BadInput, UnknownName)) as refused:
        parse(TEXT.replace(old, new, 1), name="mine.toml")
    assert all(part in str(refused.value) for part in says), str(refused.value)


def test_the_second_row_is_named_by_its_own_line():
    first, _, last = TEXT.rpartition("8.75e-05, 0.01]")
    changed = f"{first}8.75e-05, -1]{last}"
    with pytest.raises(BadInput, match=rf"line {ROW + 1}: .*rows.1.*-1 is no spread"):
        parse(changed)


def test_a_specification_has_no_tables():
    made = calibrated(curve())
    assert isinstance(made.measured.curve("shared", "all_reduce", 2), Curve)
    assert made.measured.curve("shared", "all_reduce", 3) is None
