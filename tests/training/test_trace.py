"""The trace of a real run: one row a worker, one thing at a time, and the amounts that the summary counts."""

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.communication.communicator import Context
from manyhands.errors import BadInput
from manyhands.partition.pipeline.one_f_one_b import one_f_one_b
from manyhands.training.recorder import Recorder, _Watched, flat

KINDS = {"compute", "update", "communicate", "wait", "strategy", "evaluate", "checkpoint"}


def traced(tmp_path, *, steps=4, **plan):
    file = tmp_path / "trace.json"
    task = mh.Task(model="perceptron(hidden=8)", data="digits(limit=300)", batch_size=40, steps=steps)
    result = mh.train(task, mh.Plan(threads=1, **plan), evaluate="never", progress=False, trace=file)
    found = json.loads(file.read_text())
    return result, [e for e in found["traceEvents"] if e["ph"] == "X"], found


def row(events, rank):
    return sorted((e for e in events if e["tid"] == rank), key=lambda e: e["ts"])


def check(events, found, workers=2):
    """One row a worker, all begun together, nothing at the same time twice."""
    names = [e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"]
    assert names == [f"worker {rank}" for rank in range(workers)]
    assert {e["cat"] for e in events} <= KINDS
    assert found["otherData"] == {"left_out": 0, "clock": "one for all workers"}
    for rank in range(workers):
        mine = row(events, rank)
        assert mine[0]["ts"] >= 0
        assert {e["args"]["step"] for e in mine} == set(range(4))
        for before, after in itertools.pairwise(mine):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3


@pytest.mark.parametrize(
    "transport", ["threads", *(pytest.param(t, marks=pytest.mark.slow) for t in ("shared", "gloo", "mpi"))]
)
def test_a_row_holds_what_the_summary_counts(tmp_path, transport):
    result, events, found = traced(tmp_path, workers=2, transport=transport)
    check(events, found)
    mine = row(events, 0)
    last = max(e["ts"] + e["dur"] for e in mine if e["cat"] == "strategy")
    parts = result.summary.step_parts_s
    kinds = [("compute", parts.compute), ("update", parts.update), ("wait", parts.wait)]
    if transport == "gloo":
        kinds = kinds[1:]  # its all-reduces begin within the backward pass
    for kind, mean_s in kinds:
        spent = sum(e["dur"] for e in mine if e["cat"] == kind and e["ts"] < last) / 1e6
        assert spent == pytest.approx(4 * mean_s, rel=0.05, abs=1e-3), kind


def test_a_pipeline_shows_its_schedule(tmp_path):
    _, events, found = traced(tmp_path, mesh="pipeline=2", micro_batches=4, transport="threads")
    check(events, found)
    for rank in range(2):
        wanted = [str(action) for action in one_f_one_b(2, 4).rows[rank]]
        done = [e["name"] for e in row(events, rank) if e["cat"] == "compute" and e["args"]["step"] == 3]
        assert [name for name, _ in itertools.groupby(done)] == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        {"workers": 2, "strategy": "asynchronous", "transport": "gloo"},
        {"workers": 2, "strategy": "ssp"},
        {"mesh": "pipeline=2", "strategy": "pipedream"},
        {"mesh": "tensor=2"},
    ],
)
def test_other_strategies_and_cuts_have_rows_too(tmp_path, plan):
    _, events, found = traced(tmp_path, **plan)
    check(events, found)


def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    task = mh.Task(data="digits")
    with pytest.raises(BadInput, match="there is no folder"):
        mh.train(task, mh.Plan(workers=2), trace=tmp_path / "no" / "trace.json")
    with pytest.raises(BadInput, match="is a folder"):
        mh.train(task, mh.Plan(workers=2), trace=tmp_path)


def test_of_an_operation_waiting_is_drawn_first():
    context = Context()
    recorder = Recorder(context, 100)
    counters = _Watched(recorder, context.counters)
    with_lock = time.perf_counter()
    counters.wait_s += 0.001  # a lock
    counters.tallies["step"]["all_reduce"].calls += 1
    counters.wait_s += 0.002  # told as a sum at the end of the operation
    counters.communicate_s += 0.003
    times = [span[:2] for span in recorder.spans]
    lengths = [ended - begun for begun, ended in times]
    assert lengths == pytest.approx([0.001, 0.002, 0.003])
    assert times[0][1] >= with_lock
    assert times[1][1] == times[2][0]
    names = [span[2:4] for span in recorder.spans]
    assert names == [("wait", "others"), ("wait", "all_reduce"), ("communicate", "all_reduce")]
    assert (counters.wait_s, counters.communicate_s) == pytest.approx((0.003, 0.003))
    assert counters.tallies["step"]["all_reduce"].calls == 1


def test_what_is_too_much_is_counted_and_left_out():
    recorder = Recorder(Context(), 2)
    for i in range(5):
        recorder.add("compute", "compute", i, i + 1)
    assert recorder.left_out == 3


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=12))
def test_flat_is_one_thing_at_a_time_and_all_of_the_time(spans):
    given_ = [(float(begun), float(begun + length), i) for i, (begun, length) in enumerate(spans)]
    found = list(flat(given_))
    for (_, ended, _), (begun, _, _) in itertools.pairwise(found):
        assert begun >= ended
    for at in (i + 0.5 for i in range(75)):
        under = [what for begun, ended, what in given_ if begun < at < ended]
        here = [what for begun, ended, what in found if begun < at < ended]
        assert len(here) == bool(under)
        assert set(here) <= set(under)
