"""A cluster file is read with every figure checked, written so that it reads back, and ready for common hardware."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.cluster import Cluster, Figure, Link, clusters
from manyhands.cluster.description import LEVELS, plausible
from manyhands.cluster.figure import UNITS
from manyhands.cluster.file import dumps, load, parse, read, write
from manyhands.errors import BadInput, UnknownName

SMALL = """name = "small"
about = "two machines"
nodes = { value = 2, unit = "count", source = "counted" }

[device]
name = "a core"
kind = "cpu"
memory = { value = 4, unit = "GB", source = "dmidecode" }
memory_bandwidth = { value = 12, unit = "GB/s", source = "stream", spread = 0.02 }

[device.peak]
float32 = { value = 80, unit = "GFLOP/s", source = "derived" }

[node]
devices = { value = 4, unit = "count", source = "lscpu" }

[link.within]
kind = "shared memory"
latency = { value = 1, unit = "us", source = "measured" }
bandwidth = { value = 8, unit = "GB/s", source = "measured" }

[link.between]
kind = "Ethernet"
latency = { value = 50, unit = "us", source = "ping" }
bandwidth = { value = 1, unit = "Gbit/s", source = "IEEE 802.3" }
shared_by = { value = 4, unit = "count", source = "one port" }
efficiency = { value = 94.9, unit = "%", source = "derived" }

[versions]
torch = "2.13.0"
"""


def test_a_file_says_what_it_says():
    small = parse(SMALL)
    assert small.devices == 8
    assert small.device.peak_of("float32") == 8e10
    assert small.device.memory_bandwidth == Figure(12, "GB/s", "stream", 0.02)
    assert small.links["between"].bandwidth.si == 1.25e8
    assert small.versions == {"torch": "2.13.0"}


@pytest.mark.parametrize("name", clusters)
def test_a_ready_cluster_reads_back_as_it_is_written(name):
    ready = load(name)
    assert ready.name == name
    assert parse(dumps(ready)) == ready
    assert set(ready.links) <= set(LEVELS)


def test_a_written_file_is_read_from_disk_and_leaves_nothing_beside_it(tmp_path):
    write(parse(SMALL), tmp_path / "mine.toml")
    assert read(tmp_path / "mine.toml") == load(str(tmp_path / "mine.toml")) == parse(SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


@given(st.floats(1e8, 1e14), st.sampled_from([u for u, (m, _) in UNITS.items() if m == "rate"]))
def test_any_believable_bandwidth_survives_writing(si, unit):
    small = parse(SMALL)
    figure = Figure(si / UNITS[unit][1], unit, "made up")
    if plausible(type(small.device))["memory_bandwidth"].complaint(figure.value, unit) is None:
        text = dumps(small).replace("value = 12\n", f"value = {figure.value!r}\n").replace("GB/s", unit, 1)
        assert parse(text).device.memory_bandwidth.si == pytest.approx(si, rel=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"GFLOP/s"', '"GB/s"', ["line 12", "device.peak.float32", "measures a rate", "TFLOP/s"]),
        ('80, unit = "GFLOP/s"', '80, unit = "gigaflops"', ["line 12", "no unit 'gigaflops'", "GFLOP/s"]),
        ("value = 12,", "value = 12e9,", ["line 9", "1.2e+10 GB/s cannot be right", "100 MB/s and 100 TB/s"]),
        ("value = 12,", "value = -12,", ["line 9", "cannot be right"]),
        ("value = 12,", "value = inf,", ["line 9", "no finite number"]),
        ("value = 4, unit = \"GB\"", "value = true, unit = \"GB\"", ["line 8", "True is no number"]),
        ("spread = 0.02", "spread = -1", ["line 9", "no spread"]),
        ('source = "dmidecode"', 'source = " "', ["line 8", "source is empty"]),
        (', source = "dmidecode"', "", ["line 8", "source is missing"]),
        ('{ value = 4, unit = "count", source = "lscpu" }', "4", ["line 15", "a figure has value, unit and source"]),
        ("value = 4, unit = \"count\", source = \"lscpu\"", "value = 4.5, unit = \"count\", source = \"lscpu\"",
         ["line 15", "no whole number"]),
        ('latency = { value = 1, unit = "us", source = "measured" }\n', "",
         ["line 17", "link.within", "latency is missing", 'unit = "us"', "10 ns and 5 s"]),
        ('[device.peak]\nfloat32 = { value = 80, unit = "GFLOP/s", source = "derived" }\n', "", ["peak is missing"]),
        ('kind = "cpu"', 'kind = "tpu"', ["line 7", "cpu or cuda"]),
        ('name = "a core"', "name = 3", ["line 6", "as text"]),
        ('torch = "2.13.0"', "torch = 2", ["line 30", "a version is text"]),
        ("[node]\n", "[noodle]\n", ["noodle"]),
        ("about = ", "about", ["no TOML", "line 2"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_line_unit_and_range(old, new, says):
    assert old in SMALL
    with pytest.raises(BadInput) as refused:
        parse(SMALL.replace(old, new, 1), name="mine.toml")
    assert all(part in str(refused.value) for part in says), str(refused.value)


def test_an_unknown_entry_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match=r"line 19.*latensy.*'latency'"):
        parse(SMALL.replace("latency", "latensy", 1))


@pytest.mark.parametrize(
    ("name", "says"), [("dgx_a10", "dgx_a100"), ("nowhere.toml", "No such file"), ("a/b", "cannot be read")]
)
def test_a_cluster_that_is_not_there(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=says):
        load(name)


def test_a_link_takes_latency_and_its_part_of_the_port():
    link = parse(SMALL).link("between")
    alone, together = link.seconds(1e6), link.seconds(1e6, users=4)
    assert alone == 50e-6 + 1e6 / (1.25e8 * 0.949)
    assert together - 50e-6 == pytest.approx(4 * (alone - 50e-6), rel=1e-12)
    assert link.seconds(1e6, users=9) == together  # a node has no more devices on the port


def test_workers_cross_the_level_that_their_number_asks_for():
    small = parse(SMALL)
    assert [small.level(n) for n in (1, 4, 5, 8)] == ["within", "within", "between", "between"]
    with pytest.raises(BadInput, match="2 nodes of 4 devices, 8 workers at most"):
        small.level(9)


def test_what_a_cluster_does_not_say_is_refused_when_it_is_asked_for():
    small = parse(SMALL)
    with pytest.raises(BadInput, match=r"no link 'host'.*within, between"):
        small.link("host")
    with pytest.raises(BadInput, match=r"no peak for bfloat16.*float32"):
        small.device.peak_of("bfloat16")


def test_no_figure_comes_without_unit_and_source():
    for name in clusters:
        figures = list(_figures(load(name)))
        assert len(figures) > 10
        assert all(f.source and f.unit in UNITS for f in figures)


def _figures(described):
    if isinstance(described, Figure):
        yield described
    elif isinstance(described, dict):
        for value in described.values():
            yield from _figures(value)
    elif hasattr(described, "__dataclass_fields__"):
        for name in described.__dataclass_fields__:
            yield from _figures(getattr(described, name))


def test_a_ready_cluster_is_a_file_and_says_what_it_says():
    assert "dgx_a100" in clusters
    for name in clusters:
        assert clusters.load(name).__doc__ == load(name).about
    with pytest.raises(UnknownName, match=r"no cluster named 'dgx_a1000'\. Did you mean 'dgx_a100'"):
        load("dgx_a1000")
    with pytest.raises(BadInput, match=r"no cluster in manyhands\.cluster\.ready named 'none'"):
        load("manyhands.cluster.ready:none")


def test_the_names_of_the_package():
    assert isinstance(load("laptop"), Cluster)
    assert isinstance(load("laptop").link("within"), Link)
