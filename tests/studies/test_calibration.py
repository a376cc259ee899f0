"""The calibration loop, and what a study does about a run that was disturbed."""

import dataclasses
import itertools
import os
import threading
import time

import pytest
import torch

from manyhands import studies, verbs
from manyhands.communication import futex
from manyhands.studies import calibration
from manyhands.studies.calibration import BOUND, FIRST, Calibration
from tests.studies.made import measurement, study


def test_a_loop_takes_some_milliseconds_on_every_core_and_leaves_torch_as_found(monkeypatch):
    began = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (began.append(self), start(self))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seconds = calibration.loop_s()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert 1e-4 < seconds < 5  # 4 ms on an idle core; a test's machine may be anything but idle
    assert len(began) == calibration.watched_cores()


@pytest.mark.parametrize(("quota", "watched"), [(None, 8), (16.0, 8), (2.5, 2), (0.5, 1)])
def test_a_containers_quota_is_not_exceeded(monkeypatch, quota, watched):
    monkeypatch.setattr(calibration.futex, "cores", lambda: 8)
    monkeypatch.setattr(calibration, "own_quota", lambda: quota)
    assert calibration.watched_cores() == watched


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (16.0, 8), (2.5, 3), (2.0, 2), (0.5, 1)])
def test_the_cores_of_a_container_are_those_its_quota_pays_for(monkeypatch, quota, cores):
    monkeypatch.setattr(futex, "affinity", lambda: 8)
    monkeypatch.setattr(futex, "own_quota", lambda: quota)
    assert futex.cores() == cores


def test_a_loop_beside_a_busy_process_is_slower():
    """The quickest of several is compared, as the machine of a test is not idle either."""
    alone = min(calibration.loop_s() for _ in range(10))
    stop = threading.Event()
    x = torch.ones(256, 256)

    def load():
        while not stop.is_set():
            torch.mm(x, x)

    busy = [threading.Thread(target=load) for _ in range(2 * len(os.sched_getaffinity(0)))]
    for each in busy:
        each.start()
    try:
        time.sleep(0.1)
        beside = sorted(calibration.loop_s() for _ in range(5))[2]
    finally:
        stop.set()
        for each in busy:
            each.join()
    assert beside > 1.2 * alone


def test_the_disturbance_is_the_worse_of_before_and_after_over_the_quickest():
    loops = iter([*[3.0] * (FIRST - 1), 2.0, 2.2, 4.0, 2.4, 2.0, 1.0])
    watch = Calibration(lambda: next(loops))
    assert watch.quickest_s == 2
    found = []
    for _ in range(4):
        watch.begins()  # takes a loop of its own only in the third round, after the 4.0
        found.append(watch.ends())
    assert found == [1.1, 2.0, 1.2, 2.0]


@pytest.fixture
def loops(monkeypatch):
    """What the loop takes, in turn after those at the start; 1.0 when the list has ended."""
    times, calls = [], itertools.count()
    monkeypatch.setattr(calibration, "loop_s", lambda: times.pop(0) if next(calls) >= FIRST and times else 1.0)
    return times


@pytest.fixture
def steps(monkeypatch):
    """Nothing is trained; each run has the next of these step times, or fails where that is an exception."""
    times = []

    def train(task, plan, *, out, **_):
        step_s = times.pop(0) if times else 0.010
        (out / "took").write_text(str(step_s))
        if isinstance(step_s, Exception):
            raise step_s
        return verbs.Result(None, plan, measurement(plan.workers, step_s), [], None)

    monkeypatch.setattr(verbs, "train", train)
    return times


def one_run(tmp_path):
    (row,) = studies.run(study({"plan.workers": [1]}, repeats=1), out=tmp_path).rows
    return row


def kept_run(tmp_path):
    (run,) = (tmp_path / "runs").iterdir()
    return {path.name: path.read_text() for path in run.iterdir()}


def test_a_quiet_run_is_done_once(tmp_path, loops, steps):
    loops += [1.4]
    row = one_run(tmp_path)
    assert (row.disturbance, row.noisy, row.attempts) == (1.4, False, 1)


def test_a_disturbed_run_is_repeated_and_the_quieter_one_kept(tmp_path, loops, steps):
    loops += [3.0, 1.2, 1.0]
    steps += [0.030, 0.011]
    row = one_run(tmp_path)
    assert (row.disturbance, row.noisy, row.attempts) == (1.2, False, 2)
    assert row.measurement.step_s.median == 0.011
    assert kept_run(tmp_path) == {"took": "0.011"}


def test_a_run_whose_times_nobody_reads_is_done_once_however_busy_the_machine(tmp_path, loops, steps):
    loops += [5.0, 5.0, 5.0]
    untimed = dataclasses.replace(study({"plan.workers": [1]}, repeats=1).grids[0], timed=False)
    asked = dataclasses.replace(study({"plan.workers": [1]}, repeats=1), grids=(untimed,))
    (row,) = studies.run(asked, out=tmp_path).rows
    assert (row.disturbance, row.noisy, row.attempts) == (None, False, 1)
    assert "timed = false" in asked.to_toml()


def test_of_two_noisy_runs_the_less_disturbed_is_kept_and_marked(tmp_path, loops, steps):
    loops += [5.0, 2.0, 2.5]
    steps += [0.030, 0.011]
    row = one_run(tmp_path)
    assert (row.disturbance, row.noisy, row.attempts) == (2.5, True, 2)
    assert row.disturbance > BOUND
    assert row.measurement.step_s.median == 0.011


def test_a_second_attempt_that_fails_leaves_the_first(tmp_path, loops, steps):
    loops += [2.0, 1.0]
    steps += [0.010, RuntimeError("mine")]
    row = one_run(tmp_path)
    assert (row.status, row.noisy, row.attempts) == ("done", True, 2)
    assert kept_run(tmp_path) == {"took": "0.01"}


def test_a_run_that_fails_is_not_repeated(tmp_path, loops, steps):
    loops += [9.0]
    steps += [RuntimeError("mine")]
    row = one_run(tmp_path)
    assert (row.status, row.noisy, row.attempts) == ("failed", False, 1)
    assert steps == []


def test_a_study_that_goes_on_compares_with_its_own_quickest_loop(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.0)
    assert one_run(tmp_path).disturbance == 1.0
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.8)  # the machine is busy, and stays so
    first, second = studies.run(study({"plan.workers": [1]}, repeats=2), out=tmp_path).rows
    assert (first.noisy, second.noisy, second.disturbance) == (False, True, 1.8)
