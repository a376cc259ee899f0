"""Samples to a target, as a search takes them from the rows of a study."""

import dataclasses

import pytest

import manyhands as mh
from manyhands.errors import BadInput
from manyhands.studies.reached import samples_to_target
from manyhands.studies.rows import Rows
from tests.studies.made import TINY, study
from tests.studies.made_curves import Runs

TASK = mh.Task(**(TINY | {"batch_size": 100}))


@pytest.fixture
def folder(tmp_path):
    """Epochs of 1,000 samples; one worker ends at 0.95, so the target is 0.94."""
    runs = Runs()
    runs.add("synchronous", 1, values=(0.5, 0.8, 0.95))
    runs.add("synchronous", 2, values=(0.5, 0.8, 0.95))
    runs.add("local", 2, values=(0.5, 0.95, 0.96))
    runs.add("gossip", 2, ends=0.9)
    runs.add("ssp", 2, task={"optimizer": "adam"}, ends=0.99)
    with Rows(tmp_path, study()) as rows:
        for row in runs.rows:
            said = dataclasses.replace(row.measurement, strategy=row.plan["strategy"])
            rows.add(dataclasses.replace(row, measurement=said))
    return tmp_path


def test_of_plans_that_always_got_there_by_strategy_and_workers(folder):
    found = samples_to_target(folder, TASK)
    assert (found.scale, found.target) == ("test_accuracy", pytest.approx(0.94))
    assert set(found.samples) == {"synchronous", "local"}  # gossip did not, and ssp learned another task
    assert found.samples["synchronous"] == {n: pytest.approx(2000 + 1000 * 14 / 15) for n in (1, 2)}
    assert found.samples["local"] == {2: pytest.approx(1000 + 1000 * 44 / 45)}


def test_the_tasks_own_target_goes_first(folder):
    found = samples_to_target(folder, mh.Task(**(TINY | {"batch_size": 100, "target_accuracy": 0.8})))
    assert found.samples["synchronous"][1] == pytest.approx(2000)


def test_a_study_that_says_nothing_is_refused_with_what_it_has(folder):
    with pytest.raises(BadInput, match=r"no finished run of cnn on .*it has logistic on digits\(limit=200\)"):
        samples_to_target(folder, mh.Task(**(TINY | {"model": "cnn", "batch_size": 100})))
    with pytest.raises(BadInput, match=r"no plan reached test_accuracy 0\.999"):
        samples_to_target(folder, mh.Task(**(TINY | {"batch_size": 100, "target_accuracy": 0.999})))
