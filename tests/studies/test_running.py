"""Running a study: rounds, refusals, failures, interruption, going on; once with real workers."""

import dataclasses
import io
import itertools
import json

import pytest
from rich.console import Console

from manyhands import studies, verbs
from manyhands.errors import BadInput, ManyhandsError, WorkerFailed
from manyhands.studies import calibration
from manyhands.studies.finding import find
from manyhands.studies.grid import Cell, Grid, Study
from manyhands.studies.progress import TimeLeft
from manyhands.studies.reporting import REPORT, report
from manyhands.studies.rows import Rows, read
from manyhands.studies.running import Rounds, asked, order
from tests.studies.made import TINY, measurement, study

GRID = {"plan.strategy": ["synchronous", "replica_average"], "plan.workers": [1, 2]}


@pytest.fixture
def trained(monkeypatch):
    """Nothing is trained; what would have been is listed, and ``trained.at[n]`` is raised in call n."""

    class Trained(list):
        at = {}  # noqa: RUF012

    calls = Trained()
    calls.at = {}

    calls.data = "digits"

    def train(task, plan, *, evaluate, **_):
        calls.append((plan.strategy.name, plan.workers))
        if len(calls) in calls.at:
            raise calls.at[len(calls)]
        looks = [{"step": 4, "test_accuracy": 0.95, "test_loss": 0.3}] if evaluate != "end" else []
        return verbs.Result(None, plan, measurement(plan.workers, data=calls.data), looks, None)

    monkeypatch.setattr(verbs, "train", train)
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.0)
    return calls


def test_repeats_take_turns():
    a, b, c = (Cell({"steps": n}, {}, repeats=n) for n in (2, 1, 3))
    assert list(order([a, b, c])) == [(1, a), (1, b), (1, c), (2, a), (2, c), (3, c)]


def test_rows_come_in_rounds(tmp_path, trained):
    result = studies.run(study(GRID), out=tmp_path)
    assert trained == 2 * list(itertools.product(GRID["plan.strategy"], GRID["plan.workers"]))
    assert [row.repeat for row in result.rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert result.exit_code == 0


@pytest.mark.parametrize("killed_at", [1, 3, 6, 8])
def test_a_study_that_was_ended_goes_on_where_it_was(tmp_path, trained, killed_at):
    trained.at = {killed_at: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        studies.run(study(GRID), out=tmp_path)
    assert len(read(tmp_path)) == killed_at - 1
    assert (tmp_path / REPORT).is_file()
    trained.clear()
    trained.at = {}
    result = studies.run(study(GRID), out=tmp_path)
    assert len(trained) == 8 - (killed_at - 1)
    assert len(result.rows) == 8
    trained.clear()
    assert studies.run(study(GRID), out=tmp_path).rows == result.rows
    assert trained == []


def test_more_repeats_and_more_cells_keep_what_is_done(tmp_path, trained):
    studies.run(study(GRID, repeats=1), out=tmp_path)
    trained.clear()
    larger = study({**GRID, "plan.workers": [1, 2, 3]}, repeats=2)
    assert len(studies.run(larger, out=tmp_path).rows) == 12
    assert len(trained) == 8
    assert len(studies.run(study(GRID, repeats=1), out=tmp_path).rows) == 4


def test_an_impossible_cell_is_a_row_with_the_reason_and_the_rest_runs(tmp_path, trained):
    result = studies.run(study({"plan.transport": ["single", "auto"], "plan.workers": [2]}), out=tmp_path)
    refused, *done = result.rows
    assert (refused.status, refused.measurement) == ("refused", None)
    assert "single is one worker" in refused.reason
    assert [row.status for row in done] == ["done", "done"]
    assert len(trained) == 2
    assert result.exit_code == 0


def test_a_misspelt_strategy_in_a_grid_is_refused_with_the_nearest(tmp_path, trained):
    result = studies.run(study({"plan.strategy": ["synchronos"]}), out=tmp_path)
    assert "Did you mean 'synchronous'" in result.rows[0].reason
    assert result.exit_code == 2
    assert trained == []


def test_a_failing_cell_does_not_stop_the_others_and_is_tried_again(tmp_path, trained):
    trained.at = {2: WorkerFailed(1, 7, "RuntimeError: no", "its own traceback"), 3: RuntimeError("mine")}
    result = studies.run(study(GRID, repeats=1), out=tmp_path)
    assert [row.status for row in result.rows] == ["done", "failed", "failed", "done"]
    assert result.rows[1].traceback == "its own traceback"
    assert "worker 1 at step 7" in result.rows[1].reason
    assert "RuntimeError: mine" in result.rows[2].traceback
    assert result.exit_code == 1
    trained.clear()
    trained.at = {}
    assert studies.run(study(GRID, repeats=1), out=tmp_path).exit_code == 0
    assert len(trained) == 2


def test_a_round_that_would_end_too_late_is_left_out():
    times = iter([0, 0, 40, 80])
    rounds = Rounds(100, lambda: next(times))
    may = [rounds.may_run(repeat) for repeat in (1, 1, 1, 2, 2, 3)]
    assert may == [True, True, True, True, True, False]


def test_without_a_limit_every_round_runs():
    times = itertools.count(0, 1000)
    rounds = Rounds(None, lambda: next(times))
    assert all(rounds.may_run(repeat) for repeat in range(1, 9))


def test_what_is_left_out_for_time_is_said_and_can_be_had(tmp_path, trained, caplog):
    hasty = study(GRID, limit_s=1e-9)
    assert len(studies.run(hasty, out=tmp_path).rows) == 4
    assert "repeat 2" in caplog.text
    assert len(studies.run(hasty, out=tmp_path).rows) == 8


def test_again_runs_everything_anew_and_replaces_the_rows(tmp_path, trained):
    first = studies.run(study(GRID, repeats=1), out=tmp_path)
    trained.clear()
    trained.at = {3: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        studies.run(study(GRID, repeats=1), out=tmp_path, again=True)
    assert len(read(tmp_path)) == 4  # an old row stays until its new one is there
    trained.clear()
    trained.at = {}
    result = studies.run(study(GRID, repeats=1), out=tmp_path, again=True)
    assert len(trained) == len(result.rows) == 4
    assert [r.cell for r in result.rows] == [r.cell for r in first.rows]


def test_a_task_takes_the_place_of_the_studys_own(tmp_path, trained):
    one = study({"plan.workers": [1]}, repeats=1)
    (row,) = studies.run(one, out=tmp_path, task={"steps": 7, "model": "perceptron"}).rows
    assert row.task == {**{k: v for k, v in TINY.items() if k != "epochs"}, "model": "perceptron", "steps": 7}
    assert find(tmp_path / "study.toml").task == row.task


def test_a_disk_that_is_full_ends_the_study_and_it_goes_on_later(tmp_path, trained, monkeypatch):
    add = Rows.add

    def full(self, row):
        if len(trained) == 3:
            raise ManyhandsError("the study's folder cannot be written")
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "add", full)
        with pytest.raises(ManyhandsError):
            studies.run(study(GRID, repeats=1), out=tmp_path)
    assert len(read(tmp_path)) == 2
    trained.clear()
    assert len(studies.run(study(GRID, repeats=1), out=tmp_path).rows) == 4
    assert len(trained) == 2


def test_a_noise_cell_measures_noise(tmp_path):
    noise = Study("noise", TINY, {"threads": 1}, (Grid({"plan.workers": (1, 2)}, measure="noise"),), repeats=1)
    result = studies.run(noise, out=tmp_path)
    assert [row.status for row in result.rows] == ["done", "done"]
    one, two = (row.noise for row in result.rows)
    assert (one["workers"], two["workers"], two["batch"], two["parameters"]) == (1, 2, 50, 650)
    assert one["variance"] == pytest.approx(two["variance"], rel=1e-5)
    assert all(row.measurement is None and row.disturbance is None for row in result.rows)
    assert result.exit_code == 0
    json.dumps(result.as_dict())
    assert report(tmp_path).rows == result.rows


def test_without_a_folder_each_start_has_its_own(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = studies.run(study(name="my study/1"))
    assert result.folder.parent.name == "studies-out"
    assert result.folder.name.startswith("my-study-1-")


def test_under_a_launcher_it_is_refused(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="Run it without a launcher"):
        studies.run(study(), out=tmp_path)


def test_a_note_about_a_plan_is_said_once(tmp_path, monkeypatch, caplog):
    def train(task, plan, **_):
        for note in verbs.resolved(task, plan).notes:
            verbs.log.warning("%s", note)
        return verbs.Result(None, plan, measurement(plan.workers), [], None)

    monkeypatch.setattr(verbs, "train", train)
    studies.run(study({"plan.workers": [64], "task.seed": [0, 1, 2]}), out=tmp_path)
    assert caplog.text.count("right, but not faster") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_runs(tmp_path, trained, terminal):
    out = io.StringIO()
    trained.at = {2: RuntimeError("mine")}
    studies.run(study(GRID, repeats=1), out=tmp_path, console=Console(file=out, force_terminal=terminal, width=120))
    if not terminal:
        lines = out.getvalue().splitlines()
        assert len(lines) == 4
        assert lines[0].startswith("[1/4] synchronous with 1 worker, repeat 1: 10 ms a step, 95.0 % right")
        assert lines[1] == "[2/4] synchronous with 2 workers on shared, repeat 1: failed: mine"
    else:
        assert "replica_average" in out.getvalue()
        assert "1 failed" in out.getvalue()


def test_progress_tells_cells_apart_by_what_varies(tmp_path, trained):
    grids = (Grid({"task.model": ("logistic", "perceptron"), "task.seed": (1,), "plan.workers": (1,)}, "speed"),)
    out = io.StringIO()
    one = Study("names", TINY, {"threads": 1}, grids, repeats=1)
    studies.run(one, out=tmp_path, console=Console(file=out, width=120))
    first, second = out.getvalue().splitlines()
    assert "synchronous with 1 worker, model=logistic, repeat 1: " in first
    assert "synchronous with 1 worker, model=perceptron, repeat 1: " in second


def test_the_time_left_is_that_of_each_cell_so_far():
    times = iter([0, 0, 10, 10, 10, 10, 14, 14, 15])
    left = TimeLeft(["a", "b", "c", "a", "b", "c"], lambda: next(times))
    left.starts()
    assert left.seconds() is None
    left.ends("a")  # took 10 s
    assert left.seconds() == 5 * 10
    left.starts()
    left.ends("b")  # took 4 s
    assert left.seconds() == 2 * 7 + 10 + 4 - 1  # c is not known, and 1 s of it is over


def test_two_cells_end_to_end(tmp_path):
    one = study({"plan.workers": [1, 2]}, repeats=1)
    result = studies.run(one, out=tmp_path)
    single, shared = result.rows
    assert [row.status for row in result.rows] == ["done", "done"]
    assert (single.transport, shared.transport) == ("single", "shared")
    assert single.measurement.test_accuracy == shared.measurement.test_accuracy > 0.3
    assert shared.measurement.sent_B_per_step == 650 * 4
    assert [record["step"] for record in shared.history] == [4, 8, 12, 16, 20]
    assert shared.history[-1]["train_loss"] == shared.measurement.train_loss
    for row in result.rows:
        run = tmp_path / "runs" / f"{row.cell}-{row.repeat}"
        assert {path.name for path in run.iterdir()} >= {"plan.toml", "metrics.jsonl", "events.jsonl", "summary.json"}
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000020"]
        assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(row.measurement.as_dict()))
    assert find(tmp_path / "study.toml") == one
    assert "synchronous        2  shared" in result.table
    json.dumps(result.as_dict())
    (tmp_path / REPORT).unlink()
    assert report(tmp_path).summary == result.summary
    assert (tmp_path / REPORT).is_file()
    assert result.lines()[-1] == f"Report: {tmp_path / REPORT}"


def test_a_run_of_a_study_can_be_trained_further(tmp_path):
    (row,) = studies.run(study({"plan.workers": [1]}, repeats=1), out=tmp_path).rows
    task, plan = Cell(row.task, row.plan).make()
    longer = dataclasses.replace(task, epochs=int(row.measurement.epochs) + 1)
    further = verbs.train(longer, plan, out=tmp_path / "runs" / f"{row.cell}-1", resume=True, progress=False)
    assert further.summary.steps > row.measurement.steps


def test_a_run_that_was_cut_off_leaves_nothing_to_the_next(tmp_path):
    one = study({"plan.workers": [1]}, repeats=1)
    (cell,) = one.cells()
    left = tmp_path / "runs" / f"{cell.id}-1" / "checkpoints" / "step-00000003"
    left.mkdir(parents=True)
    assert studies.run(one, out=tmp_path).rows[0].status == "done"
    assert not left.exists()


def test_rows_only_where_the_disk_is_short(tmp_path):
    studies.run(study({"plan.workers": [1]}, repeats=1, keep="rows"), out=tmp_path)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(BadInput, match=r"keep in \[study\].*'rows'"):
        study(keep="row")


def test_a_model_that_could_not_be_kept_costs_no_row(tmp_path, trained, caplog):
    kept = verbs.Result(None, None, measurement(1), [], tmp_path)
    trained.at = {1: verbs.LastCheckpointNotWritten("No space left.", kept)}
    result = studies.run(study({"plan.workers": [1]}, repeats=1), out=tmp_path)
    assert result.rows[0].measurement == kept.summary
    assert "No space left." in caplog.text


def test_a_model_that_breaks_is_a_failed_row_with_its_traceback(tmp_path):
    broken = study({"task.model": ["tests.studies.made:Broken", "logistic"]}, repeats=1, plan={"workers": 1})
    result = studies.run(broken, out=tmp_path)
    assert [row.status for row in result.rows] == ["failed", "done"]
    assert "one too many" in result.rows[0].reason
    assert "in forward" in result.rows[0].traceback


def test_data_that_is_not_there_is_refused(tmp_path):
    lost = study(task={**TINY, "data": "no_such_data"}, repeats=1, plan={"workers": 1})
    result = studies.run(lost, out=tmp_path)
    assert [row.status for row in result.rows] == ["refused"]
    assert "data set named 'no_such_data'" in result.rows[0].reason


def test_a_cell_that_is_refused_now_keeps_what_it_measured(tmp_path, trained, monkeypatch):
    first = studies.run(study(GRID), out=tmp_path)
    trained.clear()

    def refuse(*_, **__):
        raise BadInput("no longer")

    monkeypatch.setattr(verbs, "resolved", refuse)
    for again in (False, True):
        assert studies.run(study(GRID), out=tmp_path, again=again).rows == first.rows
    assert trained == []


def test_again_keeps_a_measurement_when_the_new_run_fails_and_says_so(tmp_path, trained, caplog):
    first = studies.run(study(GRID, repeats=1), out=tmp_path)
    trained.clear()
    trained.at = {2: RuntimeError("mine")}
    result = studies.run(study(GRID, repeats=1), out=tmp_path, again=True)
    assert {row.status for row in result.rows} == {"done"}
    assert first.rows[1] in result.rows
    assert "repeat 1 failed, and its earlier measurement is kept: mine" in caplog.text


def test_what_was_looked_at_less_often_than_asked_runs_again(tmp_path, trained):
    studies.run(study(GRID), out=tmp_path)
    trained.clear()
    finer = study(GRID, evaluate="epoch")
    assert all(row.history for row in studies.run(finer, out=tmp_path).rows)
    assert len(trained) == 8
    trained.clear()
    for one in (finer, study(GRID)):
        studies.run(one, out=tmp_path)
    assert trained == []


def test_other_data_of_the_same_name_is_not_mixed_with_the_rows(tmp_path, trained):
    auto = {**TINY, "data": "auto"}
    trained.at = {3: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        studies.run(study(GRID, task=auto), out=tmp_path)
    trained.at, trained.data = {}, "mnist"
    with pytest.raises(BadInput, match=r"data=auto is mnist now, and rows in .* measured digits.*--data-dir"):
        studies.run(study(GRID, task=auto), out=tmp_path)
    assert {row.measurement.data for row in read(tmp_path)} == {"digits"}
    rows = studies.run(study(GRID, task=auto), out=tmp_path, again=True).rows
    assert {row.measurement.data for row in rows} == {"mnist"}


def test_going_on_is_told_with_the_folder_of_the_data(tmp_path, trained, caplog):
    trained.at = {1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        studies.run(study(GRID), out=tmp_path, data_dir="my data")
    assert "--data-dir 'my data'" in caplog.text


def test_a_grid_that_says_its_repeats_keeps_them():
    grids = (Grid({"plan.workers": (1,)}), Grid({"plan.workers": (2,)}, repeats=1))
    one = asked(Study("two", TINY, grids=grids, repeats=3), repeats=5)
    assert [cell.repeats for cell in one.cells()] == [5, 1]
