"""Sentences of a report's top: learning, trust, failures."""

import dataclasses

import pytest

from manyhands.studies import contenders, findings
from tests.studies.made import measurement
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
        (
            Runs().add(runs=1, seeds=(0, 1, 2)).add(workers=2, runs=2),
            "Every plan ran 2 to 3 times in all, 1 of 2 plans with 3 seeds, the others with one.",
        ),
        (
            Runs().add(runs=1, seeds=(0, 1, 2)).add(workers=2, runs=1, seeds=(0, 1)),
            "Every plan ran 2 to 3 times in all, 2 of 2 plans with 2 to 3 seeds.",
        ),
    ],
)
def test_how_often_is_said(runs, says):
    assert findings.trust(runs.lines) == [says]


def test_disturbances_and_differences_are_said():
    lines = [dataclasses.replace(line, noisy=2) for line in Runs().add(spread=0.9).lines]
    (said,) = findings.trust(lines)
    assert "2 of 3 runs were disturbed" in said
    assert "repeats differ by up to" in said


def test_the_load_that_the_study_makes_itself_is_not_called_other_work():
    runs = Runs().add(spread=0).add(workers=2, spread=0)
    runs.rows = [dataclasses.replace(row, load_average=9.0) for row in runs.rows]
    assert findings.trust(runs.lines) == ["Every plan ran 3 times."]


def test_times_of_oversubscribed_plans_are_no_noise():
    (said,) = findings.trust(Runs().add(spread=0).add(workers=4, spread=0.9).lines)
    assert "repeats differ" not in said


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


# -- the fastest plan --------------------------------------------------------------------------------------------------


def test_the_fastest_plan_is_compared_run_by_run_with_the_best_single_process():
    """The machine is three times slower in the second round, which is no difference between plans."""
    runs = Runs().add(spread=0).add(threads=2, speed=1.25, spread=0).add(workers=2, speed=2.0, spread=0)
    runs.rows = [
        dataclasses.replace(
            row, measurement=measurement(row.workers, row.measurement.step_s.median * (3 if row.repeat == 2 else 1))
        )
        for row in runs.rows
    ]
    assert findings.fastest(runs.contenders) == [
        "Fastest: synchronous with 2 workers, 1.60× [1.60 … 1.60] as fast as one process with 2 threads, 95.0 % right."
    ]


def test_plans_whose_runs_show_no_difference_are_alike_and_none_wins():
    (said,) = findings.fastest(Runs().add().add(workers=2, speed=1.02, spread=0.3).contenders)
    assert said.startswith("synchronous with 2 workers and one process with 1 thread are alike: 1.1")
    assert "Fastest" not in said
    (once,) = findings.fastest(Runs().add(runs=1, spread=0).add(workers=2, speed=1.02, spread=0, runs=1).contenders)
    assert "are alike: 1.02× in samples a second." in once
    runs = Runs().add().add(workers=2, speed=1.9).add("slice_update", 2, speed=1.9)
    (two,) = findings.fastest(runs.contenders)
    assert two.startswith("Fastest: ")
    assert two.endswith("slice_update with 2 workers is alike.")


def test_what_learns_less_or_has_too_few_cores_is_not_the_fastest():
    runs = Runs().add().add(workers=2, speed=1.5).add("slice_own_batch", 2, speed=1.9, ends=0.8).add(workers=4, speed=9)
    (said,) = findings.fastest(runs.contenders)
    assert said.startswith("Fastest: synchronous with 2 workers, 1.5")


def test_each_task_has_its_own_single_process():
    runs = Runs()
    for batch, speed in ((100, 1.5), (400, 0.5)):
        task = {"batch_size": batch}
        runs.add(task=task, global_batch=batch).add(workers=2, speed=speed, task=task, global_batch=batch)
    first, second = findings.fastest(runs.contenders)
    assert first.startswith("Fastest: synchronous with 2 workers at batch 100, 1.5")
    assert second.startswith("Nothing here is faster than one process with 1 thread at batch 400")


# -- learning less -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "ends", "less"),
    [
        ("digits", 0.93, False),
        ("digits", 0.91, True),
        ("mnist", 0.945, False),
        ("mnist", 0.935, True),
        ("own", 0.93, True),
    ],
)
def test_learning_less_depends_on_the_size_of_the_test_set(data, ends, less):
    lines = Runs().add(ends=0.95, data=data).add(workers=2, ends=ends, data=data).lines
    assert ("1 plan of 2 learns less" in findings.learning(lines)[0]) == less
    assert any("learns less" in said for said in findings.surprises(lines)) == less


def test_an_interval_that_says_nothing_is_not_said():
    gain = contenders.Ratio(1.15, 0.03, 44.52, 2)
    assert contenders.useless(gain)
    assert not contenders.useless(contenders.Ratio(1.15, 1.05, 1.25, 3))
