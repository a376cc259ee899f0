"""Sentences of a report's top: learning, trust, failures."""

import dataclasses

import pytest

from manyhands.studies import findings
from tests.studies.made_curves import Runs


def test_all_learn_as_much():
    lines = Runs().add(ends=0.95).add(workers=2, ends=0.948).lines
    assert findings.learning(lines) == [
        "Every plan learns as much as one worker: 94.8 % to 95.0 % are right at the end."
    ]


def test_without_evaluation_nobody_knows():
    lines = Runs(scale="test_loss").add().lines
    assert findings.learning(lines) == ["What was learned is not known: no run was evaluated."]


def test_without_one_worker_there_is_no_comparison():
    assert "no single worker to compare with" in findings.learning(Runs().add(workers=2).lines)[0]


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (Runs().add(runs=1), "Every plan ran once, so that nothing tells a difference from noise."),
        (Runs().add(runs=3), "Every plan ran 3 times."),
        (Runs().add(runs=3).add(workers=2, runs=2), "Every plan ran 2 to 3 times."),
        (Runs().add(runs=1, seeds=(0, 1)), "Every plan ran once with each of 2 seeds."),
    ],
)
def test_how_often_is_said(runs, says):
    assert findings.trust(runs.lines) == [says]


def test_disturbances_and_differences_are_said():
    lines = [dataclasses.replace(line, noisy=2) for line in Runs().add(spread=0.9).lines]
    (said,) = findings.trust(lines)
    assert "2 of 3 runs were disturbed" in said
    assert "repeats differ by up to" in said
    busy = [dataclasses.replace(line, load_average=9.0) for line in Runs().add().lines]
    assert "load average up to 9.0 on 2 cores" in findings.trust(busy)[0]


def test_oversubscribed_cells_are_counted():
    assert "1 cell with more workers × threads than the 2 cores" in findings.trust(Runs().add().add(workers=4).lines)[0]


def test_what_went_wrong_has_its_reason():
    runs = Runs().add().fail(workers=2, reason="RuntimeError: no\nmore").fail("slice_update", 2, status="refused")
    assert findings.wrong(runs.lines) == [
        "1 plan was refused (strategy=slice_update, workers=2: it broke); "
        "1 run failed (synchronous with 2 workers on shared: RuntimeError: no)."
    ]
    assert findings.wrong(Runs().add().lines) == []


def test_a_long_reason_is_cut():
    (said,) = findings.wrong(Runs().fail(reason="x" * 1000).lines)
    assert len(said) < 260


def test_nothing_is_said_of_nothing():
    for sentences in (findings.trust, findings.wrong, findings.learning, findings.fastest, findings.surprises):
        assert sentences(()) == []
