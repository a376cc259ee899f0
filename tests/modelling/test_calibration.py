"""Calibration: knots go where a curve bends, time counts from the last arrival, noise widens, files go stale."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.cluster import load, read, write
from manyhands.errors import BadInput, UnknownName
from manyhands.modelling import calibration
from manyhands.modelling.calibration import hosting, keeping, links, measuring, patterns, probe, repeating, stamps
from manyhands.modelling.calibration.collectives import _lower
from manyhands.modelling.calibration.knots import (
    FEWEST,
    GAP,
    MOST,
    MOST_B,
    TOLERANCE,
    expected_s,
    first_sizes,
    next_size,
)
from manyhands.modelling.calibration.repeating import Try, best, settled, widened
from manyhands.training.conclusion import versions
from manyhands.training.team import team
from tests.cluster.measured_tables import calibrated, curve

# -- knots -------------------------------------------------------------------------------------------------------------


def refined(seconds, noise=0.0):
    """The knots that a curve without noise gets."""
    knots = {n: (seconds(n), noise) for n in first_sizes(MOST_B)}
    confirmed = set()
    while (size := next_size(knots, confirmed)) is not None:
        assert size not in confirmed
        if size in knots:
            confirmed.add(size)
        knots[size] = seconds(size), noise
    return knots


def worst(seconds, knots):
    found = curve(seconds=tuple(knots[n][0] for n in sorted(knots)), sizes_B=tuple(sorted(knots)))
    return max(abs(found.at(n) / seconds(n) - 1) for n in (64 * int(1.1**i) for i in range(140)) if n <= MOST_B)


def alpha_beta(n):
    return 1e-5 + n / 5e9


def switching(n):
    """A transport that takes another algorithm beyond 100 kB."""
    return 1e-5 + n / 1e9 if n < 100_000 else 2e-4 + n / 8e9


@pytest.mark.parametrize("seconds", [alpha_beta, switching])
def test_a_curve_has_sixteen_to_twenty_four_knots(seconds):
    knots = refined(seconds)
    assert FEWEST <= len(knots) <= MOST
    assert {64, MOST_B} <= set(knots)
    assert all(n % 64 == 0 for n in knots)


def test_where_it_is_smooth_straight_lines_are_within_the_tolerance():
    assert worst(alpha_beta, refined(alpha_beta)) < TOLERANCE


def test_knots_gather_where_the_curve_bends():
    knots = sorted(refined(switching))
    below, above = max(n for n in knots if n < 100_000), min(n for n in knots if n >= 100_000)
    assert above / below <= GAP
    assert max(b / a for a, b in itertools.pairwise(knots)) > 2


def test_a_disturbed_knot_is_measured_again_and_gets_no_others_beside_it():
    knots = {n: (alpha_beta(n), 0.01) for n in first_sizes(MOST_B)}
    knots[16384] = 5 * alpha_beta(16384), 0.01
    again = set()
    while (size := next_size(knots, again)) in knots:
        again.add(size)
        knots[size] = alpha_beta(size), 0.01
    assert 16384 in again
    assert len(knots) == len(first_sizes(MOST_B))
    assert _lower((5e-5, 0.01), (1e-5, 0.02)) == (1e-5, pytest.approx(2.0))
    assert _lower((0.0, 0.0), (1e-5, 0.0)) == (0.0, 0.0)


def test_what_is_within_the_spread_is_no_misfit():
    assert len(refined(switching, noise=3.0)) == FEWEST


@given(st.integers(64, MOST_B), st.booleans())
def test_sizes_to_begin_with_grow_to_the_most(most_B, few):
    sizes = first_sizes(most_B, few=few)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (min(64, most_B), most_B)


@given(st.floats(1e-6, 1.0), st.integers(64, MOST_B))
def test_a_larger_size_is_expected_to_take_no_less_and_at_most_in_proportion(round_s, size):
    expected = expected_s({64: round_s}, size)
    assert round_s <= expected <= round_s * size / 64 * (1 + 1e-9)
    assert expected_s({}, size) == 0
    more = max(size, 4096)
    assert 2 * round_s <= expected_s({64: round_s, 4096: 2 * round_s}, more) <= 2 * round_s * more / 4096 * (1 + 1e-9)


# -- stamps ------------------------------------------------------------------------------------------------------------

TIMES = st.lists(st.floats(0, 10), min_size=3, max_size=3)


@given(TIMES, st.floats(1e-6, 1))
def test_waiting_for_the_last_is_no_part_of_the_time(arrivals, taken):
    arrived = np.array(arrivals)[:, None]
    left = np.full((3, 1), max(arrivals) + taken)
    assert stamps.since_last_arrival(arrived, left)[0] == pytest.approx(taken, rel=1e-6, abs=1e-12)


def test_who_needs_nobody_may_leave_before_the_last_has_come():
    assert stamps.since_last_arrival(np.array([[0.0], [5.0]]), np.array([[1.0], [5.0]]))[0] == 0


def test_a_message_counts_from_when_both_ends_are_there():
    arrived, left = np.array([[0.0], [2.0], [7.0], [1.0]]), np.array([[0.1], [2.5], [7.1], [7.7]])
    assert stamps.of_pairs(arrived, left)[0] == pytest.approx((0.5 + 0.7) / 2)


def test_who_took_no_part_does_not_count():
    nan = float("nan")
    assert stamps.own(np.array([[1.0], [nan]]), np.array([[1.5], [nan]]))[0] == 0.5


def test_the_spread_is_that_of_the_median():
    rng = np.random.default_rng(0)
    medians = [np.median(1 + 0.1 * rng.standard_normal(50)) for _ in range(500)]
    told = [stamps.median_and_spread(1 + 0.1 * rng.standard_normal(50))[1] for _ in range(500)]
    assert np.mean(told) == pytest.approx(np.std(medians), rel=0.15)
    assert stamps.median_and_spread(np.zeros(3)) == (0.0, 0.0)


# -- repeating ---------------------------------------------------------------------------------------------------------


def tried(seconds, noise=0.01, before=2.4e-7, after=2.4e-7, **more):
    found = {"sizes_B": [64, 128], "noise": noise, "series": {"send": {"seconds": seconds, "spread": [noise, noise]}}}
    return Try(found, before, after, **more)


def test_a_flip_of_the_host_is_seen_and_drift_is_none():
    assert probe.flipped(0.24e-6, 0.89e-6)
    assert probe.flipped(0.89e-6, 0.24e-6)
    assert not probe.flipped(0.24e-6, 0.3e-6)
    assert not probe.flipped(None, 0.3e-6)


def test_the_calm_try_counts():
    calm, flipped, noisy = tried([1.0, 2.0]), tried([5.0, 6.0], after=9e-7), tried([7.0, 8.0], noise=0.4)
    assert [t.calm for t in (calm, flipped, noisy)] == [True, False, False]
    assert best([flipped, noisy, calm]) is calm
    assert best([flipped, noisy]) is noisy
    assert settled([flipped, calm], "shared", 2) == calm.curves("shared", 2)
    assert tried([1.0, 2.0], noise=0.2, oversubscribed=True).calm


def test_none_calm_is_as_wide_as_they_differ():
    (found,) = settled([tried([1.0, 2.0], noise=0.2), tried([1.5, 2.0], noise=0.3)], "shared", 2)
    assert found.seconds == (1.0, 2.0)
    assert found.spread == (pytest.approx(math.hypot(0.2, 0.5), abs=0.01), 0.2)
    assert widened(curve(spread=0.02), []).spread == (0.04,) * 3
    assert widened(curve(spread=8.0), []).spread == (repeating.WIDEST,) * 3


# -- links -------------------------------------------------------------------------------------------------------------


@given(st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-7))
def test_alpha_and_beta_come_back(alpha, beta):
    sizes = (64, 4096, 2**18, 2**24)
    found = links.alpha_beta(curve(operation="send", seconds=tuple(alpha + beta * n for n in sizes), sizes_B=sizes))
    assert found[2] < 1e-6
    assert found[0] + found[1] * 2**20 == pytest.approx(alpha + beta * 2**20, rel=1e-6)


def test_neither_is_below_nothing():
    alpha, beta, error = links.alpha_beta(curve(seconds=(5e-5, 4e-5, 3e-5)))
    assert alpha > 0
    assert beta >= 0
    assert error > 0
    assert links.alpha_beta(curve(seconds=(5e-5,))) == (5e-5, 0.0, 0.0)


# -- keeping -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def own(**host):
    return dataclasses.replace(calibrated(curve(), host=keeping.machine() | host), versions=versions())


def test_the_cache_gives_back_what_holds(home):
    assert calibration.cached() is None
    assert "not been measured" in calibration.look().reason
    keeping.check_writable(keeping.place())
    write(own(), keeping.place())
    assert calibration.cached() == own()
    assert calibration.look().reason == ""


def test_another_machine_and_other_versions_are_refused_with_the_reason(home):
    assert calibration.stale(own()) is None
    assert "cores 999 there" in calibration.stale(own(cores=999))
    older = dataclasses.replace(own(), versions={**versions(), "torch": "1.0"})
    assert f"measured with torch 1.0, here is {versions()['torch']}" in calibration.stale(older)
    assert "a specification" in calibration.stale(load("laptop"))


def test_a_calibration_of_other_versions_is_no_calibration_and_is_named(home):
    keeping.check_writable(keeping.place())
    older = dataclasses.replace(own(), versions={**versions(), "torch": "1.0"})
    write(older, keeping.place().with_name("older.toml"))
    assert calibration.cached() is None
    assert all(part in calibration.look().reason for part in ("older.toml", "torch 1.0", "manyhands calibrate"))
    write(older, keeping.place())  # edited by hand
    assert calibration.cached() is None
    keeping.place().write_text("name = 3")
    assert "line 1" in calibration.look().reason


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_workers(monkeypatch):
    def started(*_, **__):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(measuring, "team", started)
    monkeypatch.setattr(probe, "team", started)


@pytest.mark.usefixtures("no_workers")
def test_what_cannot_be_measured_or_written_is_refused_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.toml", tmp_path):
        with pytest.raises(BadInput, match=r"cannot be written to .*--out"):
            calibration.calibrate(out=out)
    with pytest.raises(UnknownName, match=r"'shard'.*'shared'"):
        calibration.calibrate(wanted=["shard"])
    with pytest.raises(BadInput, match=r"transport nccl.*shared, threads, gloo, mpi"):
        calibration.calibrate(wanted=["nccl"])
    monkeypatch.setattr(measuring.environment, "shared_memory_works", lambda: False)
    with pytest.raises(BadInput, match="transport shared: it is for Linux"):
        calibration.calibrate(wanted=["shared"])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="under torchrun"):
        calibration.calibrate(out=tmp_path / "x.toml")


@pytest.mark.usefixtures("no_workers")
def test_an_unwritable_cache_is_told_before_anything(home):
    (home / ".cache").write_text("in the way")
    with pytest.raises(BadInput, match=r"cannot be written.*\.cache.*--out"):
        calibration.calibrate()


# -- measured ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["threads", pytest.param("shared", marks=pytest.mark.slow)])
def test_every_pattern_of_common_memory_gives_its_curves(on):
    with team(on, 3, threads=1, timeout_s=20) as crew:
        for name in patterns.patterns_of(shares_memory=True, one_sided=False, ranks=2):
            first, *others = crew.run(measuring.JOB, 2, name, 0.02, 4096, True, deadline_s=40)
            assert others == [None, None] or others[1] is None
            wanted = [s for s in patterns.PATTERNS[name].series if s != patterns.OWN_READ]
            assert list(first["series"]) == wanted
            for series in first["series"].values():
                assert len(series["seconds"]) == len(series["spread"]) == len(first["sizes_B"]) >= 1
                assert all(0 <= s < 10 for s in series["seconds"])
            sizes = first["sizes_B"]
            assert sizes == [0] if name == "barrier" else {64, 4096} <= set(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["gloo", "mpi"])
def test_every_pattern_between_processes_gives_its_curves(on):
    with team(on, 3, threads=1, timeout_s=20) as crew:
        for name in patterns.patterns_of(shares_memory=False, one_sided=on == "mpi", ranks=2):
            first = crew.run(measuring.JOB, 2, name, 0.02, 4096, True, deadline_s=40)[0]
            assert all(s > 0 for series in first["series"].values() for s in series["seconds"])


def test_two_processes_pass_a_cache_line():
    with probe.Probe() as found:
        seconds = [found.seconds() for _ in range(2)]
    assert all(s is None or 1e-9 < s < probe.SLOWEST_S for s in seconds)
    assert found.seen_s == [s for s in seconds if s]


def test_a_probe_whose_process_is_killed_says_nothing_more():
    with probe.Probe() as found:
        os.kill(found._team.pids[1], signal.SIGKILL)
        assert found.seconds() is None
        assert found.seconds() is None
    assert found.seen_s == []


def test_a_calibration_on_threads_is_a_cluster_file_that_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "QUICK_EACH_S", 0.01)
    monkeypatch.setattr(hosting.jobs, "TRIAD", 2**12)
    path = tmp_path / "mine.toml"
    found = calibration.calibrate(out=path, quick=True, wanted=["threads"], total_s=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]
    assert read(path) == found.cluster
    assert calibration.stale(found.cluster) is None
    assert found.cluster.link("within").latency.si > 0
    measured = found.cluster.measured
    assert {c.operation for c in measured.curves} >= {"all_reduce", "reread", "all_gather_common", "pull", "barrier"}
    assert {(c.transport, c.ranks) for c in measured.curves} == {("threads", 2)}
    assert any("quick" in note for note in measured.notes)
    assert json.loads(json.dumps(found.as_dict()))["path"] == str(path)


def test_an_interrupted_calibration_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "host_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(out=tmp_path / "mine.toml", quick=True, wanted=["threads"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_calibration_from_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", "calibrate", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    cluster = read(said["path"])
    assert said["path"].startswith(str(tmp_path / ".cache" / "manyhands" / "calibration"))
    assert {c["transport"] for c in said["curves"]} >= {"shared", "threads", "gloo"}
    assert cluster.measured.curve("shared", "all_reduce", 2) is not None
    assert "shared, 2 ranks: all_reduce" in done.stderr
