"""A study as data: what a file may say, and which cells it means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.errors import BadInput, UnknownName
from manyhands.studies import presets, studies
from manyhands.studies.finding import find
from manyhands.studies.grid import FACTORS, MEASURES, PLAN_KEYS, TASK_KEYS, Cell, Grid, Study, parse
from tests.studies.made import study

FILE = """
[study]
name = "scaling"
repeats = 2

[task]
model = "cnn"
batch_size = 100

[plan]
threads = 1

[grid]
plan.strategy = ["synchronous", "replica_average"]
"plan.workers" = [1, 2]
"""

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
values = words | st.integers(-(2**53), 2**53) | st.booleans() | st.floats(allow_nan=False)


@st.composite
def any_study(draw):
    table = lambda keys: st.dictionaries(st.sampled_from(keys), values, max_size=3)  # noqa: E731
    many = st.lists(values, min_size=1, max_size=3).map(tuple)
    return Study(
        draw(words.filter(str.strip)),
        draw(table(TASK_KEYS)),
        draw(table(PLAN_KEYS)),
        tuple(
            Grid(factors, draw(words), draw(st.none() | st.integers(1, 9)), draw(st.sampled_from(MEASURES)))
            for factors in draw(
                st.lists(st.dictionaries(st.sampled_from(FACTORS), many, min_size=1, max_size=3), max_size=3)
            )
        ),
        draw(st.integers(1, 9)),
        draw(st.none() | st.integers(1, 1000)),
    )


@given(any_study())
def test_what_is_written_reads_back(one):
    assert parse(one.to_toml()) == one


@given(any_study())
def test_every_combination_is_one_cell(one):
    cells = one.cells()
    assert len({cell.id for cell in cells}) == len(cells)
    most = sum(_product(len(v) for v in grid.factors.values()) for grid in one.grids) if one.grids else 1
    assert 1 <= len(cells) <= most
    for grid in one.grids:
        for factor, several in grid.factors.items():
            kind, _, key = factor.partition(".")
            found = [(cell.task if kind == "task" else cell.plan).get(key) for cell in cells]
            assert all(value in found for value in several)


def _product(numbers):
    total = 1
    for n in numbers:
        total *= n
    return total


def test_a_file_means_its_cells_in_the_order_written():
    one = parse(FILE)
    assert (one.name, one.repeats) == ("scaling", 2)
    assert [(c.plan["strategy"], c.plan["workers"]) for c in one.cells()] == [
        ("synchronous", 1),
        ("synchronous", 2),
        ("replica_average", 1),
        ("replica_average", 2),
    ]
    assert all(c.plan["threads"] == 1 and c.task["model"] == "cnn" for c in one.cells())


def test_several_grids_stand_one_after_the_other_and_a_cell_counts_once():
    one = parse(
        '[[grid]]\n"plan.workers" = [1, 2]\n[[grid]]\n"plan.workers" = [2, 3]\n"plan.transport" = "gloo"\n'
        '[[grid]]\n"plan.workers" = 1'
    )
    assert [(c.plan["workers"], c.plan.get("transport")) for c in one.cells()] == [
        (1, None),
        (2, None),
        (2, "gloo"),
        (3, "gloo"),
    ]


def test_without_a_grid_there_is_one_cell():
    assert len(parse("[task]\nsteps = 3").cells()) == 1


def test_a_factor_takes_the_place_of_its_alternative():
    cells = study({"task.batch_per_worker": [10], "task.steps": [5], "plan.workers": [3]}).cells()
    task, _ = cells[0].make()
    assert (task.batch_size, task.steps, task.epochs) == (30, 5, None)


def test_weak_scaling_is_a_batch_per_worker():
    cells = study({"plan.workers": [1, 2, 4], "task.batch_per_worker": [25]}).cells()
    assert [cell.make()[0].batch_size for cell in cells] == [25, 50, 100]


@pytest.mark.parametrize(
    ("task", "plan", "says"),
    [
        ({"batch_per_worker": 10}, {}, "Say plan.workers"),
        ({"batch_per_worker": 0}, {"workers": 2}, "whole number from 1"),
        ({"batch_per_worker": 10, "batch_size": 20}, {"workers": 2}, "said once"),
        ({}, {"strategy": "synchronos"}, "Did you mean 'synchronous'"),
    ],
)
def test_a_cell_that_cannot_be_made_says_why(task, plan, says):
    with pytest.raises(BadInput, match=says):
        Cell(task, plan).make()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[study]\nrepeat = 2", "key in \\[study\\] named 'repeat'. Did you mean 'repeats'"),
        ("[task]\nmodle = 'cnn'", "Did you mean 'model'"),
        ("[plan]\nworker = 2", "Did you mean 'workers'"),
        ("[grid]\nplan.stratgy = ['a']", "Did you mean 'plan.strategy'"),
        ("[grid]\nworkers = [1]", "Did you mean 'plan.workers'"),
        ("[grids]\n", "Did you mean 'grid'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(text, says):
    with pytest.raises(UnknownName, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[study\n", "line 1"),
        ("grid = 3", "a table is expected"),
        ("[study]\nrepeats = 0", "whole number from 1"),
        ("[study]\nrepeats = true", "whole number from 1"),
        ("[study]\nname = 3", "it is a text"),
        ("[study]\nlimit_s = -1", "positive number of seconds"),
        ("[grid]\nplan.workers = []", "at least one value"),
        ("[grid]\nplan.workers = [[1]]", "a value is a text"),
        ("[task]\nmodel = {a = 1}", "a value is a text"),
        ("[grid]\nplan.workers = [1]\n'plan.workers' = [2]", "stands twice"),
    ],
)
def test_what_is_no_study_is_refused_with_the_rule(text, says):
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_a_study_is_found_by_name_by_file_or_as_it_is(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[grid]\nplan.workers = [1, 2, 4]")
    assert find(file).name == "mine"
    assert find(str(file), workers=2).grids == (Grid({"plan.workers": (1, 2)}),)
    assert find().name == "default"
    assert find(study()) == study()
    with pytest.raises(UnknownName, match="Did you mean 'default'"):
        find("defalt")
    with pytest.raises(BadInput, match="cannot be read"):
        find(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="no plan of at most 1"):
        find(study({"plan.workers": [2, 3]}), workers=1)


@pytest.mark.parametrize("name", studies)
@pytest.mark.parametrize("most", [None, 1, 2, 8])
def test_every_cell_of_a_built_in_study_can_be_made(name, most):
    from manyhands import verbs

    one = studies.load(name)(most)
    assert one.name == name
    for cell in one.cells():
        verbs.resolved(*cell.make())


def test_the_default_study_has_every_strategy():
    from manyhands.consistency import strategies

    assert {cell.plan["strategy"] for cell in presets.default().cells()} == set(strategies) - {
        "sandblaster"
    }  # it wants all data in a batch
    assert {cell.plan.get("transport") for cell in presets.default().cells()} >= {"threads", "gloo"}


def test_an_id_names_the_cell_and_tells_apart_what_differs():
    one, other = study({"plan.strategy": ["synchronous(update='sharded')"], "task.seed": [0, 1]}).cells()
    assert one.id.startswith("synchronous-update-sharded-")
    assert one.id != other.id
    assert one.id == study({"task.seed": [0], "plan.strategy": ["synchronous(update='sharded')"]}).cells()[0].id


def test_workers_said_once_for_all_plans_are_limited_too():
    eight = study({"plan.strategy": ["synchronous"]}, plan={"workers": 8})
    assert find(eight, workers=8) == eight
    for one in (eight, study(plan={"workers": 8})):
        with pytest.raises(BadInput, match="no plan of at most 2 workers"):
            find(one, workers=2)
    varied = study({"plan.workers": [1, 2, 4]}, plan={"workers": 8})
    assert [cell.plan["workers"] for cell in find(varied, workers=2).cells()] == [1, 2]


def test_a_study_that_answers_one_question_takes_no_other_task():
    for key, value in (("model", "cnn"), ("batch_size", 10), ("seed", 3), ("clip", 1.0)):
        with pytest.raises(BadInput, match=rf"{key}=.* for study xin-ma.* only data can be said.*study compare"):
            find("xin-ma", task={key: value})
    assert find("xin-ma", task={"data": "digits"}).task["data"] == "digits"
    with pytest.raises(UnknownName, match="Did you mean 'model'"):
        find(study(), task={"modle": "cnn"})
