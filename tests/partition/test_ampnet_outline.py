"""What a plan for a graph of nodes comes to, told before anything runs, is what training then counts."""

import math
from xml.etree import ElementTree

import pytest

import manyhands as mh
from manyhands import verbs
from manyhands.studies.cut_picture import draw

#: A step of the lists is all of them, so that each step sends what the outline has counted.
TASKS = {
    "perceptron(hidden=(12, 10))": ("digits", 24, "ampnet(samples=5)"),
    "list_rnn(hidden=8)": ("list_reduction(samples=30, test=5)", 30, "ampnet"),
    "tree_rnn(hidden=8)": ("boolean_trees(samples=30, test=5)", 30, "ampnet"),
}


@pytest.mark.parametrize("model", TASKS)
def test_nodes_and_bytes_that_are_told_are_those_of_training(model):
    data, batch_size, strategy = TASKS[model]
    task = mh.Task(model=model, data=data, steps=2, batch_size=batch_size)
    plan = mh.Plan(strategy, mesh="pipeline=2", transport="threads", threads=1)
    told = verbs.outlined(task, plan)
    nodes = [set(part.nodes) for part in told.parts]
    assert nodes[0]
    assert nodes[1]
    assert not nodes[0] & nodes[1]
    for part in told.parts:
        assert part.parameters == sum(math.prod(told.whole[name]) for name in part.holds)
        assert {name.split(".")[0] for name in part.holds if "rnn" in model} <= set(part.nodes)
    assert sum(part.parameters for part in told.parts) == sum(map(math.prod, told.whole.values()))
    run = mh.train(task, plan, progress=False, evaluate=1)  # what that sends is no part of a step
    assert run.notes[-1].startswith(f"nodes of worker 0: {', '.join(told.parts[0].nodes)}")
    assert run.summary.sent_B_per_step == told.parts[0].cut_B  # worker 0's


def test_a_graph_that_is_placed_can_be_drawn():
    task = mh.Task(model="list_rnn", data="list_reduction(samples=5, test=5)", steps=1)
    picture = draw(verbs.outlined(task, mh.Plan("ampnet", mesh="pipeline=2", transport="threads")))
    said = " ".join(ElementTree.fromstring(picture).itertext())
    assert "worker 0 (pipeline 0)" in said
    assert "cell.0.weight" in said
