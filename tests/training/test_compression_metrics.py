"""A compressed run tells what compressing came to: in its summary, in its metrics and in the lines for people."""

import json

import pytest

import manyhands as mh
from manyhands.cli.summary import lines
from manyhands.communication.compression.meter import FIRST
from manyhands.training import loop
from manyhands.training.metrics import METRICS, read_summary


@pytest.fixture
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(loop, "METRICS_EVERY_S", 0.0)


def test_a_compressed_run_tells_ratio_error_mass_and_time(tmp_path, every_step_is_logged):
    task = mh.Task(model="perceptron(hidden=12)", data="digits", steps=FIRST + 3, batch_size=30)
    plan = mh.Plan(workers=2, transport="threads", threads=1, compress="top_k(ratio=0.05)")
    result = mh.train(task, plan, progress=False, evaluate="never", out=tmp_path)
    n, said = result.summary.parameters, result.summary
    assert said.compression_ratio == 4 * n / (8 * -(-n // 20))
    assert 0 < said.compression_error < 1
    # What top-k leaves out is orthogonal to what it sends.
    assert said.compression_kept == pytest.approx(1 - said.compression_error**2, rel=1e-4)
    assert said.compression_s > 0
    assert read_summary(tmp_path)["compression_ratio"] == said.compression_ratio
    each = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert {line["compression_ratio"] for line in each} == {said.compression_ratio}
    assert [line["step"] for line in each if "compression_error" in line] == [FIRST + 1]
    assert all(line["compression_s"] > 0 for line in each)
    (told,) = [line for line in lines(task, result) if line.startswith("  compression ")]
    assert f"error {said.compression_error:.3g}, kept mass {said.compression_kept:.3g}" in told


def test_a_run_that_compresses_nothing_says_nothing_of_it(tmp_path, every_step_is_logged):
    task = mh.Task(model="perceptron(hidden=12)", data="digits", steps=3, batch_size=30)
    plan = mh.Plan(workers=2, transport="threads", threads=1)
    result = mh.train(task, plan, progress=False, evaluate="never", out=tmp_path)
    assert result.summary.compression_ratio is None
    assert result.summary.compression_s is None
    assert "compression" not in (tmp_path / METRICS).read_text()
    assert not [line for line in lines(task, result) if "compression" in line]
