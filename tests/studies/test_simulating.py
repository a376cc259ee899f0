"""A study goes on with simulated workers: from what one was measured to take, and apart from what was measured."""

import dataclasses

import pytest

from manyhands import studies, verbs
from manyhands.errors import BadInput
from manyhands.studies import calibration, simulating
from manyhands.studies.finding import find
from manyhands.studies.grid import Cell, Grid, parse
from manyhands.studies.reporting import made_of
from tests.studies.made import TINY, measurement, row, study

WEAK = Grid({"task.batch_per_worker": (50,), "plan.strategy": ("synchronous",), "plan.workers": (1, 2)}, "weak")


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    def train(task, plan, **_):
        return verbs.Result(None, plan, measurement(plan.workers, global_batch=task.batch_size), [], None)

    monkeypatch.setattr(verbs, "train", train)
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.0)


@pytest.mark.parametrize(
    ("text", "counts"), [("2..16", (2, 4, 8, 16)), ("1..1", (1,)), ("3..20", (3, 6, 12, 20)), ("2..1000", None)]
)
def test_counts_double_up_to_the_last(text, counts):
    found = simulating.counts(text)
    assert found[-1] == 1000 if counts is None else found == counts


@pytest.mark.parametrize("text", ["", "2", "8..2", "0..4", "2...8", "a..b"])
def test_what_are_no_counts_is_refused(text):
    with pytest.raises(BadInput, match=r"FIRST\.\.LAST"):
        simulating.counts(text)


def test_an_extended_study_has_simulated_cells_beside_its_own():
    asked = study({"plan.workers": [1, 2], "plan.transport": ["shared", "gloo"]})
    more = simulating.extended(asked, "2..8", "ethernet_1g")
    simulated = [cell for cell in more.cells() if cell.measure == "simulate"]
    assert [cell.plan["workers"] for cell in simulated] == [2, 4, 8]
    assert all("transport" not in cell.plan and cell.repeats == 1 for cell in simulated)
    assert [cell for cell in more.cells() if cell.measure == "train"] == asked.cells()
    assert parse(more.to_toml()) == more
    assert simulating.extended(more, "2..8", "ethernet_1g") == more
    assert find(more, workers=1).cells()[-1].plan["workers"] == 8  # the limit is one of real workers


def test_only_studies_that_can_show_it_are_extended():
    with pytest.raises(BadInput, match="analysis compare shows no simulated plans"):
        simulating.extended(study(analysis="compare"), "2..8")
    with pytest.raises(BadInput, match="without simulate"):
        studies.run(study(), cluster="ethernet_1g")


def test_workers_that_compute_what_one_did_take_as_long_as_it(tmp_path):
    task = {k: v for k, v in TINY.items() if k not in ("batch_size", "epochs")} | {"steps": 4}
    weak = dataclasses.replace(study(task=task, repeats=1), grids=(WEAK,))
    result = studies.run(weak, out=tmp_path, simulate="1..64", cluster="ethernet_1g", predict=False)
    simulated = [r for r in result.rows if r.measure == "simulate"]
    assert [r.workers for r in simulated] == [1, 2, 4, 8, 16, 32, 64]
    assert simulated[0].measurement.step_s.median == pytest.approx(0.010)
    assert all(r.measurement.transport == "simulated" for r in simulated)
    assert "ethernet_1g; a step of one worker, 10.0 ms measured" in simulated[-1].simulated_on
    times = [r.measurement.step_s.median for r in simulated]
    assert min(times) > 0.009  # what is computed; the update of 1 ms is divided
    assert "Simulated: synchronous with 64 workers does" in result.table
    assert "With 2 workers it is 2.08× simulated and 2× measured on shared." in result.table
    assert not any("simulate" in line for line in result.table.splitlines()[:4])
    chart = next(c for c in result.analysis.charts if c.name == "speed-up-simulated")
    assert [s.role for s in chart.series] == ["measured", "simulated", "ideal"]
    assert len(chart.series[1].points) == 7
    laws = [note for note in result.analysis.notes if "law" in note]
    assert laws
    assert all("64" not in note for note in laws)  # no fit has seen what was simulated
    again = studies.run(tmp_path / "study.toml", out=tmp_path, predict=False)
    assert [r.measurement.step_s for r in again.rows] == [r.measurement.step_s for r in result.rows]


def test_a_smaller_share_is_measured_here_as_a_ratio(tmp_path, monkeypatch):
    def cost_here(task, plan, splits):
        return simulating.StepCost(0.001 + 0.0001 * task.batch_size, 0.0005, task.batch_size, 650)

    monkeypatch.setattr(simulating.values, "cost_here", cost_here)
    strong = study({"task.batch_size": [100], "plan.workers": [1]}, repeats=1)
    result = studies.run(strong, out=tmp_path, simulate="2..4", cluster="ethernet_1g", predict=False)
    compute = [r.measurement.step_parts_s.compute for r in result.rows if r.measure == "simulate"]
    assert compute == pytest.approx([0.009 * 6 / 11, 0.009 * 3.5 / 11])


def test_without_a_single_worker_there_is_nothing_to_go_on_from(tmp_path):
    result = studies.run(study({"plan.workers": [2]}, repeats=1), out=tmp_path, simulate="4..4", predict=False)
    assert [r.status for r in result.rows] == ["done", "refused"]
    assert "Let the grid have plan.workers=1" in result.rows[1].reason


def test_nodes_like_this_machine_have_its_cores():
    cluster = simulating.cluster_of("")
    assert cluster.devices_per_node == simulating.futex.cores()
    assert cluster.link("between").bandwidth_Bps(1) == pytest.approx(1.25e9 * 0.949)
    assert cluster.nodes_for(1024) == -(-1024 // cluster.devices_per_node)


def test_a_simulated_row_is_no_base_of_a_measured_one():
    one, two = (Cell(TINY, {"strategy": "synchronous", "workers": n, "threads": 1}) for n in (1, 2))
    simulated = dataclasses.replace(one, measure="simulate")
    asked = dataclasses.replace(
        study(repeats=1),
        grids=(
            Grid({"plan.strategy": ("synchronous",), "plan.workers": (2,)}),
            Grid({"plan.strategy": ("synchronous",), "plan.workers": (1,)}, measure="simulate", repeats=1),
        ),
    )
    rows = [row(two), dataclasses.replace(row(simulated), measure="simulate")]
    measured, _ = made_of(asked, None, rows).summary
    assert measured.base is None
    assert measured.speed_up is None
