"""Charts say what they show: titles computed from the points, nothing oversubscribed in charts of speed."""

import dataclasses

import pytest

from manyhands.contract import StepParts
from manyhands.studies import charts, learning_charts
from manyhands.studies.charting import alike, titled
from tests.studies.made import measurement
from tests.studies.made_curves import Runs

BATCH = {"batch_size": 400}


def both(**two):
    return Runs().add(spread=0).add(workers=2, **{"spread": 0, **two}).contenders


def series(chart, name):
    return next(s for s in chart.series if s.name == name).points


def without_history(runs):
    runs.rows = [dataclasses.replace(r, history=[]) for r in runs.rows]
    return runs


def test_speed_up_says_how_much_workers_gain_and_draws_the_ideal():
    (chart,) = charts.speed_up(both(speed=1.7))
    assert chart.title == "Two workers of synchronous do 1.70× the work of one"
    assert [(p.x, round(p.y, 1)) for p in series(chart, "synchronous")] == [(1, 1.0), (2, 1.7)]
    assert [(p.x, p.y) for p in series(chart, "ideal")] == [(1, 1), (2, 2)]
    assert chart.series[-1].role == "ideal"
    (chart,) = charts.speed_up(both(speed=1.7, spread=0.1))
    gained = series(chart, "synchronous")[1]
    assert gained.low < gained.y < gained.high


def test_slower_and_equal_are_said_as_plainly():
    (slow,) = charts.speed_up(both(speed=0.5))
    assert slow.title == "No plan is as fast as one worker: two workers of synchronous reach 0.50× its speed"
    (equal,) = charts.speed_up(both(speed=1.01))
    assert "No plan is faster than one worker" in equal.title


def test_strategies_that_differ_are_both_in_the_title():
    runs = Runs().add(spread=0).add(workers=2, speed=1.7, spread=0).add("slice_update", 2, speed=0.9, spread=0)
    (chart,) = charts.speed_up(runs.contenders)
    assert chart.title == "Two workers of synchronous do 1.70× the work of one, of slice_update 0.90×"


def test_oversubscribed_plans_stand_in_no_chart_of_speed():
    found = Runs().add().add(workers=4, speed=9).contenders
    drawn = [
        *charts.speed_up(found),
        *charts.parts(found),
        *charts.throughput(found),
        *learning_charts.against_seconds(found),
    ]
    for chart in drawn:
        assert not any("4 workers" in f"{s.name} {p.x}" for s in chart.series for p in s.points)
    assert charts.speed_up(found) == ()


def test_without_one_worker_there_is_no_speed_up():
    assert charts.speed_up(Runs().add(workers=2).contenders) == ()


def test_workers_of_more_threads_than_the_base_are_no_point_of_speed_up():
    found = Runs(cores=4).add().add(workers=2, threads=2, speed=3.0).contenders
    assert charts.speed_up(found) == ()


def test_parts_add_up_to_the_step_and_the_title_names_the_largest_overhead():
    found = Runs().add().add(workers=2, speed=1.7).contenders
    (chart,) = charts.parts(found)
    assert chart.kind == "stack"
    assert [s.name for s in chart.series] == ["computing", "communicating", "waiting", "updating"]
    total = sum(series(chart, s.name)[1].y for s in chart.series)
    assert total == pytest.approx(10 / 1.7, rel=0.05)
    assert (
        chart.title == "Synchronous with 2 workers spends 30 % of its step communicating and waiting, the largest share"
    )


def test_each_task_has_its_own_chart():
    runs = Runs().add().add(workers=2).add(task=BATCH, global_batch=400).add(workers=2, task=BATCH, global_batch=400)
    for build, name in (
        (charts.speed_up, "speed-up"),
        (charts.parts, "step-parts"),
        (charts.throughput, "throughput"),
        (charts.sent, "bytes-per-step"),
    ):
        found = build(runs.contenders)
        assert [chart.name for chart in found] == [f"{name}-batch-50", f"{name}-batch-400"]
        assert found[0].title.endswith(" (batch 50)")


def test_throughput_is_in_order():
    (chart,) = charts.throughput(both(speed=1.6))
    assert [p.x for p in chart.series[0].points] == ["synchronous with 2 workers", "one process with 1 thread"]
    assert chart.title.startswith("Synchronous with 2 workers does most: 16,")


def test_bytes_are_of_the_same_number_of_workers():
    runs = Runs().add().add(workers=2, sent_B_per_step=2e6).add("slice_update", 2, sent_B_per_step=1e6)
    (chart,) = charts.sent(runs.contenders)
    assert [(p.x, p.y) for p in chart.series[0].points] == [("synchronous", 2.0), ("slice_update", 1.0)]
    assert chart.title == "Synchronous sends most, 2 MB in a step from each of 2 workers; slice_update least, 1 MB"
    assert chart.y.endswith("MB")


def test_alike_strategies_are_said_to_learn_alike():
    (chart,) = learning_charts.against_samples(both(ends=0.948))
    assert chart.title == "All learn alike from the same samples: 94.8 to 95.0 % right after 3,000"
    assert [p.x for p in chart.series[0].points] == [1000, 2000, 3000]
    assert chart.series[0].points[-1].y == pytest.approx(95)


def test_who_learns_less_is_in_the_title_by_how_much():
    (chart,) = learning_charts.against_samples(both(ends=0.90))
    assert chart.title == (
        "Synchronous with 2 workers ends 5.0 points below one process with 1 thread after the same samples "
        "(90.0 % right)"
    )


def test_against_seconds_the_first_at_the_target_is_named():
    (chart,) = learning_charts.against_seconds(both(speed=2.0), target=0.94)
    assert chart.title.startswith("Synchronous with 2 workers is first at 94.0 % right, after 0.15 s; one process")
    assert series(chart, "target")[0].y == 94.0
    (none,) = learning_charts.against_seconds(both(), target=0.99)
    assert none.title == "No plan reaches 99.0 % right"


def test_the_spread_between_runs_is_no_interval_and_says_so():
    runs = Runs().add(seeds=(0,), ends=0.95).add(seeds=(1,), ends=0.93).add(workers=2, seeds=(0, 1))
    (chart,) = learning_charts.against_samples(runs.contenders)
    last = series(chart, "one process with 1 thread")[-1]
    assert (last.low, last.y, last.high) == pytest.approx((93, 94, 95))
    assert "no interval" in chart.note


def test_a_task_without_accuracy_is_drawn_by_its_loss():
    found = Runs(scale="test_loss").add(ends=0.4).add(workers=2, ends=0.4).contenders
    (chart,) = learning_charts.against_samples(found)
    assert chart.name == "test-loss-by-samples"
    assert chart.y == "test loss"
    assert "0.4" in chart.title


def test_accuracy_against_batch_says_what_a_larger_one_costs():
    runs = Runs().add(ends=0.95).add(ends=0.90, task=BATCH, global_batch=400)
    (chart,) = learning_charts.against_batch(runs.contenders)
    assert chart.title == "Accuracy falls from 95.0 % at batch 100 to 90.0 % at 400 (one process with 1 thread)"
    assert chart.log_x
    runs = Runs().add(ends=0.95).add(ends=0.949, task=BATCH, global_batch=400)
    assert "does not change what is learned" in learning_charts.against_batch(runs.contenders)[0].title


def test_the_note_on_batches_says_what_ends_a_run():
    def note(**task):
        runs = Runs().add(task=task).add(ends=0.90, task={**BATCH, **task}, global_batch=400)
        return learning_charts.against_batch(runs.contenders)[0].note

    assert "equally many passes over the data, so a larger batch has fewer steps" in note()
    assert "equally many steps, so a larger batch has seen more samples" in note(steps=100)
    assert "passes" not in note(steps=100)
    assert "need not be equally long" in note(seconds=3.0)


def test_strong_and_weak_scaling_are_two_lines():
    runs = Runs()
    for batch, ends in ((100, 0.95), (400, 0.90)):
        runs.add(workers=2, ends=ends, task={"batch_size": batch}, global_batch=batch)
        weak = {"batch_size": None, "batch_per_worker": batch}
        runs.add(workers=2, ends=ends - 0.1, task=weak, global_batch=2 * batch)
    (chart,) = learning_charts.against_batch(runs.contenders)
    drawn = {s.name: [(p.x, round(p.y)) for p in s.points] for s in chart.series}
    name = "synchronous with 2 workers"
    assert drawn == {name: [(100, 95), (400, 90)], f"{name}, batch per worker": [(200, 85), (800, 80)]}


def test_parts_are_titled_over_all_plans_and_say_how_many_are_not_drawn():
    runs = Runs().add()
    for period in range(2, 20):
        runs.add(f"replica_average(period={period})", 2)
    worst = {"step_parts_s": StepParts(0.001, 0.009, 0.0, 0.0)}
    runs.add("slice_update", 2, **worst)
    (chart,) = charts.parts(runs.contenders)
    assert len(chart.series[0].points) == 16
    assert chart.title.startswith("slice_update with 2 workers spends 90 % of its step")
    assert chart.note.endswith("4 further plans are left out.")
    assert "left out" not in charts.parts(both())[0].note
    (chart,) = charts.throughput(runs.contenders)
    assert chart.note.endswith("4 slower plans are left out.")


def test_rows_without_records_draw_no_curve():
    runs = without_history(Runs().add().add(workers=2))
    assert learning_charts.against_samples(runs.contenders) == ()
    assert learning_charts.against_seconds(runs.contenders) == ()


@pytest.mark.parametrize(
    "build",
    [
        charts.speed_up,
        charts.parts,
        charts.throughput,
        charts.sent,
        learning_charts.against_samples,
        learning_charts.against_seconds,
        learning_charts.against_batch,
    ],
)
def test_nothing_is_drawn_of_nothing(build):
    assert build(()) == ()
    failed = Runs().fail().fail(workers=2)
    assert build(failed.contenders) == ()


def test_names_are_those_of_files_and_every_chart_is_a_table():
    runs = Runs().add().add(workers=2, task=None).add(task=BATCH, global_batch=400)
    found = runs.contenders
    for chart in (
        *charts.speed_up(found),
        *charts.parts(found),
        *learning_charts.against_samples(found),
        *charts.sent(found),
    ):
        assert all(c.isalnum() or c == "-" for c in chart.name)
        head, body = chart.table()
        assert all(len(each) == len(head) for each in body)
        assert chart.note


def test_a_step_of_no_time_is_no_speed():
    runs = Runs().add()
    runs.rows = [dataclasses.replace(r, measurement=measurement(1, 0.0)) for r in runs.rows]
    assert charts.throughput(runs.contenders) == ()


def test_a_point_less_is_alike_and_names_of_code_keep_their_letters():
    assert alike(0.95, 0.94, "test_accuracy")
    assert not alike(0.95, 0.93, "test_accuracy")
    assert alike(0.95, 0.93, "test_accuracy", 360)
    assert not alike(0.95, 0.91, "test_accuracy", 360)
    assert titled("slice_update is slow") == "slice_update is slow"
    assert titled("one process") == "One process"
