"""The trace of a simulated run: one row a worker, nothing at the same time twice, and the parts of the summary."""

import itertools
import json

import pytest

import manyhands as mh
from manyhands.errors import BadInput


def traced(tmp_path, strategy="ssp(staleness=1)", **more):
    file = tmp_path / "trace.json"
    task = mh.Task(model="perceptron(hidden=8)", data="digits(limit=300)", batch_size=40, steps=5)
    plan = mh.Plan(strategy=strategy, workers=4)
    found = mh.simulate(task, plan, compute_s=0.01, update_s=0.002, stragglers="lognormal", trace=file, **more)
    return found, json.loads(file.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("strategy", "more"), [("ssp(staleness=1)", {}), ("ssp", {"sizes": True}), ("local", {"sizes": True})]
)
def test_a_worker_does_one_thing_at_a_time_and_always_something(tmp_path, strategy, more):
    _, events = traced(tmp_path, strategy, **more)
    for rank in range(4):
        row = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == rank)
        assert row[0][0] == 0
        for (_, ended), (begun, _) in itertools.pairwise(row):
            assert begun == pytest.approx(ended, abs=1e-3)


def test_the_rows_add_up_to_the_summary(tmp_path):
    found, events = traced(tmp_path, "synchronous")
    parts = found.summary.step_parts_s
    for kind, mean_s in (("compute", parts.compute), ("wait", parts.wait), ("update", parts.update)):
        spent = sum(e["dur"] for e in events if e["ph"] == "X" and e["tid"] == 0 and e["cat"] == kind)
        assert spent / 1e6 == pytest.approx(5 * mean_s), kind
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"simulated", *(f"worker {rank}" for rank in range(4))}


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    task = mh.Task(model="perceptron(hidden=8)", data="digits(limit=300)", steps=1)
    with pytest.raises(BadInput, match="cannot be written"):
        mh.simulate(task, mh.Plan(workers=2), compute_s=0.01, trace=tmp_path / "no" / "trace.json")
