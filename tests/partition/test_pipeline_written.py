"""Schedules written by hand, in a text, a file or a function of one's own: what is right runs, what is not is shown."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.errors import BadInput
from manyhands.partition.pipeline import description, schedules
from manyhands.partition.pipeline.schedule import Schedule
from manyhands.testing import run_ranks
from tests.partition import pipelines

GRID = "rank 0  F0 F1 ·  B0 F2 B1 ·  B2\nrank 1  ·  F0 B0 F1 B1 F2 B2 ·\n"
ROWS = "F0 F1 B0 F2 B1 B2 / F0 B0 F1 B1 F2 B2"


def trained(pipeline, **how):
    task = mh.Task(model="perceptron(hidden=(12, 10))", data="digits", steps=3, batch_size=24)
    plan = mh.Plan(mesh="pipeline=2", pipeline=pipeline, transport="threads", **how)
    return mh.train(task, plan, progress=False, evaluate="never")


@settings(max_examples=25)
@given(
    ranks=st.integers(1, 5),
    micro_batches=st.integers(1, 9),
    name=st.sampled_from(["gpipe", "zero_bubble", "interleaved"]),
)
def test_what_a_schedule_prints_can_be_said(ranks, micro_batches, name):
    made = schedules.load(name)(ranks, micro_batches)
    said = description.Pipelining("written", (("rows", str(made)),))
    again = description.parse(str(said))
    assert again.micro_batches == micro_batches
    assert again.made(ranks, micro_batches) == made
    assert description.parse(str(again)) == again


def test_rows_a_file_and_a_function_are_one_schedule(tmp_path):
    (tmp_path / "mine.txt").write_text(GRID)
    said = description.parse(f"written(file={str(tmp_path / 'mine.txt')!r}, cut='hidden2')")
    assert str(said) == "written(rows='rank 0 F0 F1 · B0 F2 B1 · B2 / rank 1 · F0 B0 F1 B1 F2 B2 ·', cut='hidden2')"
    assert said.made(2, 3) == description.parse(f"written(rows={ROWS!r})").made(2, 3)
    assert said.made(2, 3) == description.parse(f"{__name__}:mine").made(2, 3)


def mine(ranks: int, micro_batches: int) -> Schedule:
    """One of a user's own."""
    return schedules.load("one_f_one_b")(ranks, micro_batches)


def nothing(ranks: int, micro_batches: int) -> list[int]:
    """No schedule."""
    return []


def other(ranks: int, micro_batches: int) -> Schedule:
    """For more micro-batches than it was asked for."""
    return schedules.load("gpipe")(ranks, micro_batches + 1)


def test_a_hand_written_schedule_trains_as_the_one_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text(GRID)
    ours = trained(f"written(file={str(tmp_path / 'mine.txt')!r}, cut='hidden2')")
    theirs = trained("one_f_one_b(cut='hidden2')", micro_batches=3)
    assert ours.plan.micro_batches == 3, "the schedule says how many"
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[name])


@pytest.mark.parametrize("on", ["threads", "shared", pytest.param("gloo", marks=pytest.mark.slow)])
def test_micro_batches_may_be_taken_up_in_another_order(on):
    run_ranks(pipelines.written_order, 2, on=on, args=("0F0 0F1 0F2 0B0 0B2 0B1\n1F2 1F0 1B0 1B2 1F1 1B1", [7, 8, 3]))


@pytest.mark.parametrize(
    ("said", "how", "message"),
    [
        ("written(rows='F0 F1 B0 B1 / B0 F0 F1 B1')", {}, "rank 1  ⇒B0 F0  F1  B1"),
        ("written(rows='F0 B0')", {}, "it has 1 row and the mesh 2 ranks of stages; each has a row of its own. W"),
        (f"written(rows={ROWS!r})", {"micro_batches": 4}, "it has 3 micro-batches and the plan micro_batches=4"),
        ("written(rows='F0 X0 / F0 B0')", {}, "rank 0: 'X0' is no action"),
        ("written", {}, "wants either rows= or file="),
        ("written(rows=3)", {}, "wants either rows= or file="),
        ("written(rows='F0', file='x')", {}, "wants either rows= or file="),
        ("written(file='no/such.txt')", {}, "cannot be read: No such file"),
        (f"written(rows={ROWS!r}, chunks=2)", {}, "chunks"),
        (f"{__name__}:nothing", {}, "returned a list; the rule is"),
        (f"{__name__}:other", {"micro_batches": 2}, "asked for 2 ranks and 2 micro-batches and is for 2 and 3"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(said, how, message):
    with pytest.raises(BadInput, match=message.replace("(", r"\(")) as caught:
        trained(said, **how)
    assert "Traceback" not in str(caught.value)
