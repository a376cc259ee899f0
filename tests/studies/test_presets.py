"""The built-in studies: cells that can be made on every machine, and what a user says of the task goes before them."""

import inspect
import itertools

import pytest

from manyhands.communication import futex
from manyhands.errors import BadInput
from manyhands.plan import Facts, resolve, strategy_from
from manyhands.studies import presets, studies
from manyhands.studies.grid import parse

PRESETS = [presets.default, presets.quick, presets.compare, presets.scaling, presets.spectrum]


@pytest.fixture
def on(monkeypatch):
    return lambda cores: monkeypatch.setattr(futex, "cores", lambda: cores)


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_can_be_made_on_every_machine(preset, cores, on):
    on(cores)
    quick = [{}, {"quick": True}] if "quick" in inspect.signature(preset).parameters else [{}]
    for keywords in quick:
        study = preset(**keywords)
        cells = study.cells()
        assert cells
        for cell in cells:
            task, plan = cell.make()
            task.check()
            decided = resolve(plan, Facts(cores=cores, batch_size=task.batch_size, stateless=True)).plan
            assert decided.workers <= max(cores, 2)
            if cores > 1:
                assert decided.workers * decided.threads <= cores
        assert parse(study.to_toml()).cells() == cells


@pytest.mark.parametrize("preset", PRESETS)
def test_the_largest_number_of_workers_is_kept(preset):
    assert max(cell.plan["workers"] for cell in preset(3).cells()) == 3
    assert {cell.plan["workers"] for cell in preset(1).cells()} == {1}


def test_the_default_study_sets_every_strategy_beside_one_process_of_one_and_of_all_threads(on):
    on(4)
    study = presets.default()
    alone = [c for c in study.cells() if c.plan["workers"] == 1]
    many = {(c.plan["strategy"], c.plan["workers"]) for c in study.cells() if c.plan["workers"] > 1}
    assert [(c.plan["strategy"], c.plan["threads"]) for c in alone] == [("synchronous", 1), ("synchronous", 4)]
    assert many == set(itertools.product(presets.COMPARED, (2, 4)))
    assert study.limit_s < 180


def test_the_default_study_of_many_cores_has_few_counts_of_workers(on):
    on(64)
    assert {c.plan["workers"] for c in presets.default().cells()} == {1, 4, 16, 64}


@pytest.mark.parametrize("workers", [2, 3])
def test_spectrum_shows_every_strategy_with_every_seed_beside_one_process(workers):
    study = presets.spectrum(workers)
    many = [c for c in study.cells() if c.plan["workers"] > 1]
    shown = {c.plan["strategy"] for c in many}
    assert {strategy_from(text).name for text in shown} == set(presets.COMPARED)
    assert {c.task["seed"] for c in study.cells()} == {0, 1, 2}
    assert len(many) == 3 * len(shown)
    assert {c.plan["workers"] for c in many} == {workers}
    assert len([c for c in study.cells() if c.plan["workers"] == 1]) == 3
    for cell in many:
        task, plan = cell.make()
        resolve(plan, Facts(cores=4, batch_size=task.batch_size, stateless=True))


def test_a_seed_of_spectrum_goes_through_all_strategies_before_the_next():
    seeds = [c.task["seed"] for c in presets.spectrum().cells()]
    assert seeds == sorted(seeds)


def test_quick_spectrum_has_one_seed_and_less_of_everything():
    full, quick = presets.spectrum(), presets.spectrum(quick=True)
    assert len(full.cells()) == 3 * len(quick.cells())
    assert quick.task["epochs"] < full.task["epochs"]


def test_compare_sets_every_strategy_beside_one_process_of_all_threads(on):
    on(4)
    study = presets.compare()
    cells = study.cells()
    assert study.analysis == "compare"
    assert {c.plan["strategy"] for c in cells if c.plan["workers"] > 1} == set(presets.COMPARED)
    assert {c.plan["threads"] for c in cells if c.plan["workers"] == 1} == {1, 2, 4}
    assert {c.task["batch_size"] for c in cells} == {50, 200}
    assert {c.task["seed"] for c in cells} == {0, 1}


def test_quick_compare_has_one_batch_one_seed_and_one_round():
    study = presets.compare(quick=True)
    assert ({c.task["batch_size"] for c in study.cells()}, {c.task["seed"] for c in study.cells()}) == ({100}, {0})
    assert study.repeats == 1


def test_what_the_user_says_of_the_task_goes_before_the_grid():
    said = {"model": "my_pkg:make", "data": "mnist", "batch_size": 64, "epochs": 12, "seed": 5}
    for cell in presets.compare(task=said).cells():
        assert said.items() <= cell.task.items()
    weak = presets.compare(task={"batch_per_worker": 32}).cells()
    assert all("batch_size" not in c.task and c.task["batch_per_worker"] == 32 for c in weak)


def test_steps_take_the_place_of_epochs_and_are_looked_at_ten_times():
    cells = presets.compare(task={"steps": 300}).cells()
    assert {c.evaluate for c in cells} == {30}
    assert all("epochs" not in c.task for c in cells)


def test_few_epochs_are_divided_and_many_are_not():
    few = presets.compare(task={"epochs": 2, "batch_size": 50}).cells()
    (every,) = {c.evaluate for c in few}
    assert 1 <= every < 1797 / 50
    assert {c.evaluate for c in presets.compare(task={"epochs": 30}).cells()} == {"epoch"}


@pytest.mark.parametrize("task", [{"data": "no_such_pkg:data", "epochs": 1}, {"epochs": "many"}, {"batch_size": 0}])
def test_what_cannot_be_is_left_for_the_runs_to_refuse(task):
    study = presets.compare(task=task)
    for cell in study.cells()[:1]:
        if "data" not in task:
            with pytest.raises(BadInput):
                cell.make()[0].check()


def test_scaling_is_strong_and_weak():
    study = presets.scaling(8)
    assert {name for cell in study.cells() for name in cell.grids} == {"strong scaling", "weak scaling"}
    assert {c.plan["workers"] for c in study.cells()} == {1, 2, 3, 4, 8}
    assert {c.plan.get("transport") for c in study.cells()} == {None, "threads", "gloo"}


def test_the_curves_of_learning_are_recorded():
    assert {presets.default().evaluate, presets.quick().evaluate, presets.compare().evaluate} == {"epoch"}


def test_the_presets_are_in_the_catalogue():
    assert {"default", "quick", "compare", "scaling", "spectrum"} <= set(studies)
