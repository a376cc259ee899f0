"""What a run tells, in files that are valid whatever happens."""

import json
import logging
import math
import subprocess
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.errors import BadInput
from manyhands.training import metrics
from manyhands.training.metrics import MetricsLog, forget_after, json_text, write_summary


def lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(metrics, "_tensorboard", lambda *_: ())


class Recorder:
    def __init__(self):
        self.seen = []

    def metrics(self, step, values):
        self.seen.append((step, dict(values)))

    def event(self, kind, values):
        self.seen.append((kind, dict(values)))

    def summary(self, values):
        self.seen.append(dict(values))

    def close(self):
        self.seen.append("closed")


class Broken(Recorder):
    def metrics(self, step, values):
        raise ConnectionError("tracker is down")


def test_each_record_is_a_line(tmp_path, without_tensorboard):
    with MetricsLog(tmp_path / "run") as log:
        log.metrics(1, {"epoch": 0, "loss": 2.5, "lr": 0.1})
        log.metrics(2, {"epoch": 0, "loss": 2.25, "lr": 0.1})
        log.event("peer lost", rank=3, step=2, kind="killed")
        log.summary({"train_loss": 2.25, "step_s": {"median": 0.1}})
    assert lines(tmp_path / "run/metrics.jsonl") == [
        {"step": 1, "epoch": 0, "loss": 2.5, "lr": 0.1},
        {"step": 2, "epoch": 0, "loss": 2.25, "lr": 0.1},
    ]
    (event,) = lines(tmp_path / "run/events.jsonl")
    assert abs(event.pop("time_s") - time.time()) < 60
    assert event == {"event": "peer lost", "rank": 3, "step": 2, "kind": "killed"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["step_s"] == {"median": 0.1}


def test_only_rank_0_writes(tmp_path):
    recorder = Recorder()
    with MetricsLog(tmp_path / "run", rank=1, more=[recorder]) as log:
        log.metrics(1, {"loss": 1.0})
        log.event("fault")
        log.summary({})
    assert not (tmp_path / "run").exists()
    assert recorder.seen == []


def test_an_event_and_the_metrics_before_it_are_on_disk_at_once(tmp_path, without_tensorboard):
    log = MetricsLog(tmp_path)
    log.metrics(1, {"loss": 1.0})
    assert lines(tmp_path / "metrics.jsonl") == []
    log.event("fault")
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "events.jsonl")) == 1
    log.close()


def test_metrics_are_flushed_now_and_then(tmp_path, without_tensorboard, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_EVERY_S", 0.0)
    log = MetricsLog(tmp_path)
    log.metrics(1, {"loss": 1.0})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    log.close()
    log.close()


def test_what_is_not_finite_is_null_and_says_what_it_was(tmp_path, without_tensorboard):
    with MetricsLog(tmp_path) as log:
        log.metrics(1, {"loss": math.nan, "lr": 0.1, "norm": -math.inf})
        log.summary({"train_loss": math.inf, "step_s": {"median": math.nan, "all": [1.0, math.nan]}})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "lr": 0.1, "norm": None, "nonfinite": {"loss": "nan", "norm": "-inf"}}
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "train_loss": None,
        "step_s": {"median": None, "all": [1.0, None]},
        "nonfinite": {"train_loss": "inf", "step_s.median": "nan", "step_s.all.1": "nan"},
    }


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
def test_json_is_valid_for_every_value_and_stays_on_one_line(values):
    text = json_text(values)
    assert "\n" not in text
    json.loads(text, parse_constant=pytest.fail)


def test_tensors_and_paths_become_numbers_and_text(tmp_path):
    values = {"loss": torch.tensor(0.5), "bad": torch.tensor(math.nan), "out": tmp_path, "many": torch.zeros(2)}
    found = json.loads(json_text(values))
    assert found["loss"] == 0.5
    assert found["bad"] is None
    assert found["nonfinite"] == {"bad": "nan"}
    assert found["out"] == str(tmp_path)
    assert found["many"].startswith("tensor(")


# Resuming.


def test_resuming_drops_the_steps_that_are_done_again(tmp_path, without_tensorboard):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.metrics(step, {"loss": 1 / step})
        log.event("fault", step=7)
    with MetricsLog(tmp_path, resumed_step=4) as log:
        log.event("resumed", step=4)
        for step in range(5, 9):
            log.metrics(step, {"loss": 0.0})
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in found[4:]] == [0.0] * 4
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["fault", "resumed"]


def test_a_run_that_does_not_resume_starts_its_metrics_anew(tmp_path, without_tensorboard):
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.metrics(1, {})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00", '{"loss": 1}\n', "[]\n", '"x"\n', "\n"])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    forget_after(path, 5)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_without_metrics_is_no_error(tmp_path, without_tensorboard):
    with MetricsLog(tmp_path, resumed_step=3) as log:
        log.metrics(4, {})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [4]


# Things that fail.


def test_a_sink_that_raises_is_dropped_and_the_others_go_on(tmp_path, without_tensorboard, caplog):
    recorder = Recorder()
    with MetricsLog(tmp_path, more=[Broken(), recorder]) as log:
        log.metrics(1, {"loss": 1.0})
        log.metrics(2, {"loss": 1.0})
    assert recorder.seen == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), "closed"]
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Broken is given up, training goes on: ConnectionError: tracker is down"
    ]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB; skipped where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_lines_wait_while_a_disk_is_full_and_none_is_torn(small_disk, without_tensorboard, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "FLUSH_EVERY_S", 0.0)
    log = MetricsLog(small_disk)
    (small_disk / "ballast").write_bytes(bytes(150_000))
    for step in range(2000):
        log.metrics(step, {"text": "x" * 60})
    on_disk = lines(small_disk / "metrics.jsonl")
    assert 0 < len(on_disk) < 2000
    assert caplog.text.count("cannot be written") == 1
    (small_disk / "ballast").unlink()
    log.close()
    assert [line["step"] for line in lines(small_disk / "metrics.jsonl")] == list(range(2000))


def test_a_summary_on_a_full_disk_leaves_the_old_one(small_disk):
    write_summary(small_disk, {"a": 1})
    with pytest.raises(OSError, match="No space left"):
        write_summary(small_disk, {"a": "x" * 300_000})
    assert [path.name for path in small_disk.iterdir()] == ["summary.json"]
    assert json.loads((small_disk / "summary.json").read_text()) == {"a": 1}


class FullDisk:
    """Takes ``room`` bytes, then fails as a full disk does: a part of the last write is there."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_half_a_line_is_taken_back(tmp_path, caplog):
    out = metrics._Lines(tmp_path / "x.jsonl")
    real, out._file = out._file, FullDisk(out._file, room=25)
    for step in range(3):
        out.add(json_text({"step": step}))
        out.flush()
    assert lines(tmp_path / "x.jsonl") == [{"step": 0}, {"step": 1}]
    out._file = real
    out.close()
    assert [line["step"] for line in lines(tmp_path / "x.jsonl")] == [0, 1, 2]


def test_what_is_lost_at_last_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "PENDING_LIMIT", 10)
    out = metrics._Lines(tmp_path / "x.jsonl")
    out._file = FullDisk(out._file, room=0)
    for step in range(12):
        out.add(json_text({"step": step}))
    out.close()
    assert "oldest 5 lines are lost" in caplog.text
    assert "last 7 lines are lost" in caplog.text


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        MetricsLog(tmp_path / "run")


# TensorBoard.


def test_tensorboard_gets_numbers_and_forgets_what_is_done_again(tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(metrics, "POINT_EVERY_S", 0.0)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.metrics(step, {"loss": 1.0, "phase": "train"})
        log.event("fault", step=5)
    time.sleep(1.1)  # TensorBoard orders files by the second in their names, and no resume is quicker than that
    with MetricsLog(tmp_path, resumed_step=3) as log:
        log.metrics(4, {"loss": 0.5})
        log.summary({"train_loss": math.nan})
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in found.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5)]
    assert found.Tags()["scalars"] == ["loss"]


def test_tensorboard_is_not_written_at_every_step(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path) as log:
        for step in range(1000):
            log.metrics(step, {"loss": 1.0})
    points = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert 1 <= len(points) < 300


def test_without_tensorboard_nothing_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with MetricsLog(tmp_path) as log:
        log.metrics(1, {"loss": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]
    assert not caplog.records


def test_a_tensorboard_that_does_not_start_costs_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ImportError("protobuf is of another age")

    monkeypatch.setattr(metrics, "TensorBoard", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with MetricsLog(tmp_path) as log:
        log.metrics(1, {"loss": 1.0})
    assert "TensorBoard is left out" in caplog.text
