"""Predictions beside measurements: made before a run, kept with its rows, shown in table, sentence and chart."""

import dataclasses

import pytest

from manyhands import studies, verbs
from manyhands.errors import BadInput
from manyhands.studies import calibration, predicting
from manyhands.studies.reporting import made_of
from manyhands.studies.rows import read
from manyhands.studies.summary import summarize
from tests.studies.made import cell, measurement, row, study

GRID = {"plan.strategy": ["synchronous", "replica_average"], "plan.workers": [1, 2]}


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    def train(task, plan, **_):
        return verbs.Result(None, plan, measurement(plan.workers), [], None)

    monkeypatch.setattr(verbs, "train", train)
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.0)


def test_each_plan_is_predicted_once_before_it_is_run(tmp_path, predicted):
    result = studies.run(study(GRID), out=tmp_path)
    assert len(predicted) == 4
    assert {(r.predicted_step_s, r.prediction_error, r.unpredicted) for r in result.rows} == {(0.011, 0.05, "")}
    assert read(tmp_path) == list(result.rows)
    studies.run(study(GRID, repeats=3), out=tmp_path)
    assert len(predicted) == 4  # what a row says stands
    assert "predicted ms" in result.table
    assert "11.0 ± 5 % (+10 %)" in result.table
    assert "Steps of 4 plans were predicted with a mean error of 10.0 %" in result.table
    assert "predicted-against-measured" in result.as_dict()["charts"]


def test_a_prediction_that_cannot_be_made_leaves_its_reason(tmp_path, monkeypatch):
    def predict(task, plan, **_):
        raise BadInput("pipelines are not priced.\nUse another.")

    monkeypatch.setattr(verbs, "predict", predict)
    result = studies.run(study({"plan.workers": [1]}, repeats=1), out=tmp_path)
    assert result.rows[0].status == "done"
    assert result.rows[0].unpredicted.startswith("pipelines are not priced.")
    assert "1 plan could not be predicted (synchronous with 1 worker: pipelines are not priced)." in result.table
    assert "predicted ms" not in result.table


def test_a_study_that_is_to_predict_nothing_does_not(tmp_path, predicted):
    result = studies.run(study({"plan.workers": [1]}, repeats=1), out=tmp_path, predict=False)
    assert predicted == []
    assert result.rows[0].predicted_step_s is None


def of(predicted_s, measured_s, **fields):
    """A row of a cell of its own."""
    done = row(cell(**fields), measured=measurement(1, measured_s))
    return dataclasses.replace(done, predicted_step_s=predicted_s, prediction_error=0.05)


def test_the_chart_has_the_diagonal_and_the_bars():
    cells = [cell(threads=1), cell(threads=2)]
    rows = [of(0.011, 0.010, threads=1), of(0.039, 0.040, threads=2)]
    lines = summarize(cells, rows)
    (chart,) = predicting.charts(lines)
    points, diagonal = chart.series
    assert chart.kind == "points"
    assert [(p.x, p.y) for p in points.points] == [pytest.approx((10, 11)), pytest.approx((40, 39))]
    assert (points.points[0].low, points.points[0].high) == pytest.approx((11 * 0.95, 11 * 1.05))
    assert all(p.x == p.y for p in diagonal.points)
    assert diagonal.role == "ideal"
    assert predicting.sentences(lines)[0].endswith("; 1 of them within the error bar.")
    assert predicting.charts(lines[:1]) == ()


def test_a_report_of_rows_without_predictions_says_nothing_of_them():
    one = study({"plan.workers": [1]}, repeats=1)
    (only,) = one.cells()
    result = made_of(one, None, [row(only)])
    assert "redicted" not in result.table


def test_a_study_traces_its_runs_where_it_keeps_them(tmp_path, monkeypatch):
    traces = []

    def train(task, plan, *, trace, **_):
        traces.append(trace)
        return verbs.Result(None, plan, measurement(plan.workers), [], None)

    monkeypatch.setattr(verbs, "train", train)
    one = study({"plan.workers": [1]}, repeats=1)
    (row_,) = studies.run(one, out=tmp_path, trace=True).rows
    assert traces == [tmp_path / "runs" / f"{row_.cell}-1" / "trace.json"]
    with pytest.raises(BadInput, match="a trace lies in the folder of its run"):
        studies.run(dataclasses.replace(one, keep="rows"), out=tmp_path / "other", trace=True)
