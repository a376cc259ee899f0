"""From rows to lines: medians over repeats, and a base that is chosen as said."""

import dataclasses

import pytest

from manyhands.studies.summary import summarize
from manyhands.studies.table import table
from tests.studies.made import cell, measurement, noise_row, row, slower

ONE, TWO = cell(workers=1), cell(workers=2)


def lines_of(*rows_of):
    cells = list({c.id: c for c, _ in rows_of}.values())
    return summarize(cells, [r for _, r in rows_of])


def test_a_line_has_medians_over_repeats():
    found = lines_of(*((ONE, row(ONE, i, measurement(step_s=s))) for i, s in enumerate([0.030, 0.010, 0.020], 1)))
    assert [line.repeats for line in found] == [3]
    assert found[0].step_s.median == 0.020
    assert found[0].step_s.p90 == pytest.approx(0.024)
    assert found[0].samples_per_s == pytest.approx(5000)
    assert found[0].speed_up == 1


def test_speed_up_compares_runs_of_the_same_round():
    """A machine that slows down from round to round changes no ratio."""
    rows = []
    for repeat, factor in enumerate([1, 3, 10], 1):
        rows.append((ONE, row(ONE, repeat, slower(measurement(1, 0.010), factor))))
        rows.append((TWO, row(TWO, repeat, slower(measurement(2, 0.006), factor))))
    rows.append((TWO, row(TWO, 4, slower(measurement(2, 0.006), 100))))  # a round that the base does not have
    _, two = lines_of(*rows)
    assert two.speed_up == pytest.approx(10 / 6)
    assert two.efficiency == pytest.approx(10 / 12)


def test_the_base_is_one_worker_of_the_same_strategy_with_the_fewest_threads():
    own, threaded, foreign, two = cell("replica_average"), cell("replica_average", threads=2), ONE, TWO
    other = cell("replica_average", 2)
    found = lines_of(
        (threaded, row(threaded, threads=2)),
        (foreign, row(foreign)),
        (own, row(own)),
        (other, row(other)),
        (two, row(two)),
    )
    assert [line.base.cell for line in found] == [own, foreign, own, own, foreign]


def test_one_worker_of_another_strategy_will_do_as_base():
    own = cell("slice_update", 2)
    _, line = lines_of((ONE, row(ONE)), (own, row(own)))
    assert line.base.cell == ONE


def test_another_task_is_no_base():
    other = cell(workers=2, task={"model": "perceptron"})
    _, line = lines_of((ONE, row(ONE)), (other, row(other)))
    assert line.base is None
    assert line.speed_up is None


def test_another_batch_is_no_base():
    large = cell(workers=2, task={"batch_size": 200})
    _, line = lines_of((ONE, row(ONE)), (large, row(large, measured=measurement(2, global_batch=200))))
    assert line.base is None


def test_weak_scaling_compares_samples_per_second_at_the_same_batch_per_worker():
    task = {"batch_per_worker": 50}
    one, two = cell(workers=1, task=task), cell(workers=2, task=task)
    _, line = lines_of(
        (one, row(one, measured=measurement(1, 0.010, global_batch=50))),
        (two, row(two, measured=measurement(2, 0.0125, global_batch=100))),
    )
    assert line.speed_up == pytest.approx(1.6)


def test_an_oversubscribed_plan_gets_no_speed_up():
    four = cell(workers=4)
    _, line = lines_of((ONE, row(ONE)), (four, row(four)))
    assert line.oversubscribed
    assert line.speed_up is None
    assert line.accuracy == 0.95


def test_a_cell_with_one_good_run_is_done_and_counts_its_failures():
    (line,) = lines_of((ONE, row(ONE, 1)), (ONE, row(ONE, 2, status="failed", reason="it broke")))
    assert (line.status, line.repeats, line.failures, line.reason) == ("done", 1, 1, "it broke")


def test_a_refused_cell_is_a_line_without_figures():
    (line,) = lines_of((ONE, row(ONE, status="refused", reason="it cannot be")))
    assert (line.status, line.step_s, line.samples_per_s, line.efficiency) == ("refused", None, None, None)


def test_bytes_of_a_sample_are_those_of_all_workers():
    (line,) = lines_of((TWO, row(TWO)))
    assert line.sent_B_per_sample == 2600 * 2 / 100


def test_step_time_and_speed_up_have_intervals():
    rows = []
    for repeat, (one_s, two_s) in enumerate([(0.010, 0.006), (0.011, 0.005), (0.012, 0.008)], 1):
        rows += [(ONE, row(ONE, repeat, measurement(1, one_s))), (TWO, row(TWO, repeat, measurement(2, two_s)))]
    one, two = lines_of(*rows)
    assert one.step_interval.value == one.step_s.median == 0.011
    assert (one.step_interval.low, one.step_interval.high) == (0.010, 0.012)
    assert two.speed_up_interval.value == two.speed_up == pytest.approx(10 / 6)
    assert two.speed_up_interval.low == pytest.approx(12 / 8)
    assert two.speed_up_interval.high == pytest.approx(11 / 5)


def test_one_repeat_has_no_interval():
    (line,) = lines_of((ONE, row(ONE)))
    assert line.step_interval.value == 0.010
    assert (line.step_interval.low, line.step_interval.high) == (None, None)


def test_bytes_moved_and_memory_are_medians_too():
    runs = [measurement(2, moved_B_per_step=b, peak_memory_B=m) for b, m in [(10.0, 3), (30.0, 1), (None, 2)]]
    (line,) = lines_of(*((TWO, row(TWO, i, m)) for i, m in enumerate(runs, 1)))
    assert (line.moved_B_per_step, line.peak_memory_B) == (20.0, 2)


def test_noisy_runs_are_counted_and_the_worst_disturbance_told():
    rows = [
        (ONE, dataclasses.replace(row(ONE, i), disturbance=d, noisy=d > 1.5)) for i, d in enumerate([1.1, 2.0, 1.7])
    ]
    (line,) = lines_of(*rows)
    assert (line.noisy, line.disturbance) == (2, 2.0)
    (unwatched,) = lines_of((ONE, row(ONE)))
    assert (unwatched.noisy, unwatched.disturbance) == (0, None)


def test_a_noise_cell_is_a_done_line_without_times_and_not_in_the_table():
    noise = cell(measure="noise")
    found = lines_of((noise, noise_row(noise)), (noise, noise_row(noise, 2, variance=0.5)), (ONE, row(ONE)))
    line = found[0]
    assert (line.status, line.repeats, line.failures) == ("done", 2, 0)
    assert (line.step_s, line.samples_per_s, line.speed_up, line.efficiency) == (None, None, None, None)
    assert [each["variance"] for each in line.noise] == [0.4, 0.5]
    assert len(table(found).body) == 1


def test_disturbed_rounds_count_in_no_ratio_where_two_others_remain():
    def two_lines(disturbed):
        rows = []
        for repeat, (one_s, two_s) in enumerate([(0.010, 0.005), (0.010, 0.005), (0.010, 0.050), (0.010, 0.050)], 1):
            done = row(TWO, repeat, measurement(2, two_s))
            rows.append((ONE, row(ONE, repeat, measurement(1, one_s))))
            rows.append((TWO, dataclasses.replace(done, noisy=repeat in disturbed)))
        return lines_of(*rows)[1]

    quiet = two_lines({3, 4})
    assert (quiet.speed_up, quiet.speed_up_interval.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert two_lines(()).speed_up < 2.0
    assert two_lines({1, 3, 4}).speed_up == two_lines(()).speed_up
