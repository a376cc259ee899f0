"""What a study would do, and how long it would take."""

import json

import pytest

from manyhands.studies import estimate as estimating
from manyhands.studies.estimate import Timing, estimate
from manyhands.studies.grid import Grid, Study
from tests.studies.made import TINY, study

GRID = {"plan.strategy": ["synchronous", "slice_update"], "plan.workers": [1, 2]}


@pytest.fixture
def timed(monkeypatch):
    """A step takes 1 ms a sample, preparation 1 s, an evaluation 2 s, two workers' start 3 s; 2 cores."""
    asked = []

    def timing(each, shares, data_dir):
        asked.append((each.task.model, shares))
        if each.task.model == "perceptron":
            raise RuntimeError("it breaks")
        return Timing(200, 1.0, tuple((b, 1e-3 * b) for b in sorted({shares[0], shares[-1]})), 2.0)

    monkeypatch.setattr(estimating, "_timed", timing)
    monkeypatch.setattr(estimating, "_start_s", lambda transport, workers: 3.0)
    monkeypatch.setattr(estimating.futex, "cores", lambda: 2)
    return asked


def seconds(found):
    return [each.seconds for each in found.cells]


def test_a_run_takes_what_its_parts_take(timed):
    """20 steps on 50, or on 25 for two workers that divide the batch."""
    found = estimate(study(GRID))
    alone = 2 * 1 + 20 * 0.050 + 2
    assert seconds(found) == pytest.approx([alone, 3 + 2 + 20 * 0.025 + 1, alone, 3 + 2 + 20 * 0.050 + 1])
    assert found.runs == 8
    assert found.seconds == pytest.approx(2 * sum(seconds(found)))
    assert timed == [("logistic", [25, 50])]  # one kind of step, two shares


def test_more_workers_than_cores_share_them(timed):
    (one,) = estimate(study({"plan.workers": [4], "task.batch_per_worker": [50]}, repeats=1)).cells
    assert one.seconds == pytest.approx(3 + 1 + 2 + 2 * 5 * 0.050 + 1)


def test_an_epochs_evaluations_count(timed):
    ends = [seconds(estimate(study({"plan.workers": [2]}, evaluate=when)))[0] for when in ("never", "end", "epoch", 5)]
    # by two workers, who share it: once, after each of 5 epochs, and at every fifth of 20 steps
    assert [later - ends[0] for later in ends[1:]] == pytest.approx([1, 5, 4])


def test_what_is_refused_is_told_with_the_reason_and_takes_no_time(timed):
    found = estimate(study({"plan.transport": ["single", "auto"], "plan.workers": [2]}))
    refused, able = found.cells
    assert "single is one worker" in refused.refused
    assert found.seconds == pytest.approx(2 * able.seconds)
    text = "\n".join(found.lines())
    assert "refused: " in text
    assert "1 cell refused" in text
    assert found.exit_code == 0
    assert estimate(study({"plan.transport": ["single"], "plan.workers": [2]})).exit_code == 2


def test_a_model_that_breaks_does_not_stop_the_estimate(timed):
    found = estimate(study({"task.model": ["perceptron", "logistic"]}, repeats=1))
    assert found.cells[0].untimed == "RuntimeError: it breaks"
    assert found.cells[1].seconds > 0
    assert "1 cell could not be timed" in "\n".join(found.lines())


def test_what_is_done_is_not_counted(timed):
    one = study(GRID, repeats=1)
    first = one.cells()[0]
    found = estimate(one, done={(first.id, 1)})
    assert (found.runs, found.done) == (3, 1)
    assert found.seconds == pytest.approx(sum(seconds(found)[1:]))


def test_a_round_over_the_limit_is_left_out(timed):
    whole = estimate(study(GRID, repeats=3))
    found = estimate(study(GRID, repeats=3, limit_s=0.8 * whole.seconds))
    assert (found.runs, found.left_out) == (8, 4)


def test_a_first_round_over_the_limit_is_told(timed):
    whole = estimate(study(GRID, repeats=1))
    for limit_s, told in ((2 * whole.seconds, False), (0.5 * whole.seconds, True)):
        found = estimate(study(GRID, repeats=2, limit_s=limit_s))
        assert found.first_round_s == pytest.approx(whole.seconds)
        assert any("The first round alone takes" in line for line in found.lines()) is told


def test_noise_is_computed_one_worker_after_the_other(timed):
    noise = Study("noise", TINY, {"threads": 1}, (Grid({"plan.workers": (2,)}, measure="noise"),), repeats=1)
    assert seconds(estimate(noise)) == pytest.approx([64 * 2 * 0.025 + 2])


def test_the_grids_are_told_by_name_a_line_a_cell(timed):
    grids = (
        Grid({"plan.workers": (1, 2), "task.seed": (0, 1)}, "speed"),
        Grid({"plan.workers": (1,), "task.seed": (0,), "task.batch_size": (50,)}, "noise", 1, "noise"),
    )
    lines = estimate(Study("two", TINY, {"threads": 1}, grids, repeats=2)).lines()
    at = lines.index("speed:")
    assert lines[0] == "Study two: 5 cells"
    assert lines[at + 1].startswith("  synchronous with 1 worker, seed=0 ")
    assert "2 × " in lines[at + 1]
    assert lines[at + 6] == "noise:"
    assert lines[at + 7].startswith("  synchronous with 1 worker, noise")


def test_a_busy_machine_is_told(timed, monkeypatch):
    for load, told in ((1.5, False), (7.25, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        found = estimate(study(GRID))
        assert any("load average 7.2 on 2 cores" in line for line in found.lines()) is told
        assert found.as_dict()["load_average"] == load


def test_it_is_data_too(timed):
    found = json.loads(json.dumps(estimate(study(GRID)).as_dict()))
    assert (found["runs"], found["refused"]) == (8, 0)
    assert found["minutes"] == pytest.approx(found["seconds"] / 60)
    assert [cell["repeats"] for cell in found["cells"]] == [2, 2, 2, 2]


def test_a_line_between_the_shares_that_were_timed():
    timing = Timing(100, 0.0, ((10, 0.1), (50, 0.3)), 0.0)
    assert [timing.step(b) for b in (10, 30, 50)] == pytest.approx([0.1, 0.2, 0.3])
    assert Timing(100, 0.0, ((10, 0.1),), 0.0).step(10) == 0.1


def test_real_steps_are_timed():
    found = estimate(study({"plan.workers": [1, 2]}, repeats=1))
    assert all(0 < each.seconds < 30 for each in found.cells)
    assert all(not each.untimed for each in found.cells)


def test_a_broken_model_and_missing_data_are_found_for_real():
    broken, lost = estimate(
        study(
            {"task.data": ["digits(limit=200)", "no_such_data"], "plan.workers": [1]},
            task={"model": "tests.studies.made:Broken"},
        )
    ).cells
    assert "one too many" in broken.untimed
    assert "no_such_data" in lost.refused
