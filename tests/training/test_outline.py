"""What a plan comes to, told before anything runs, is what training then counts."""

import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import manyhands as mh
from manyhands import verbs
from manyhands.studies.cut_picture import draw

TASK = mh.Task(model="perceptron(hidden=(12, 10))", data="digits", steps=4, batch_size=24, optimizer="adam")
PLANS = {
    "data=2": {},
    "tensor=2": {},
    "tensor=3": {},
    "pipeline=2": {"pipeline": "gpipe(cut='hidden2')"},
    "data=2,tensor=2": {"strategy": "synchronous(update='replicated')"},
    "data=2,pipeline=2": {"pipeline": "one_f_one_b(cut='hidden2')", "strategy": "local(every=2)"},
    "tensor=2,pipeline=2": {"pipeline": "interleaved(cut='hidden2, activation2, output')"},
}


def plan(mesh):
    return mh.Plan(mesh=mesh, transport="threads", threads=1, **PLANS[mesh])


@pytest.mark.parametrize("mesh", PLANS)
def test_bytes_that_are_told_are_the_bytes_that_are_counted(mesh):
    told = verbs.outlined(TASK, plan(mesh)).parts[0]
    found = mh.train(TASK, plan(mesh), progress=False, evaluate="never").summary
    assert found.sent_B_per_step == told.sent_B + told.cut_B


@pytest.mark.parametrize("mesh", PLANS)
def test_the_parts_hold_the_whole_model(mesh):
    found = verbs.outlined(TASK, plan(mesh))
    elements = {name: math.prod(shape) for name, shape in found.whole.items()}
    replica = [part for part in found.parts if part.where.get("data", 0) == 0]
    for name, numel in elements.items():
        held = [part.holds[name] for part in replica if name in part.holds]
        assert held
        assert None in held or sum(block.numel for block in held) == numel
    for part in found.parts:
        assert part.parameters == sum(elements[n] if b is None else b.numel for n, b in part.holds.items())
        assert part.parameters_B == part.gradients_B == 4 * part.parameters


def test_state_of_the_optimizer_is_shared_where_the_update_is():
    alone, shared = (verbs.outlined(TASK, mh.Plan(mesh=m, transport="threads")).parts for m in ("data=1", "data=2"))
    assert alone[0].optimizer_B == 2 * alone[0].parameters_B
    assert shared[0].optimizer_B == alone[0].optimizer_B / 2


def test_a_model_that_is_outlined_stays_as_it_is():
    before = verbs.outlined(TASK, plan("tensor=2"))
    again = verbs.outlined(TASK, plan("tensor=2"))
    assert before.as_dict() == again.as_dict()


@pytest.mark.parametrize("mesh", PLANS)
def test_a_picture_has_a_box_for_each_part_of_each_matrix(mesh):
    found = verbs.outlined(TASK, plan(mesh))
    drawn = draw(found)
    assert drawn == draw(found)
    words = " ".join(text for text in ElementTree.fromstring(drawn).itertext() if text)
    assert all(name in words for name, shape in found.whole.items() if len(shape) > 1)
    assert ("forward" in words) == ("pipeline" in mesh)
    assert all(f"worker {part.rank}" in words for part in found.parts)


def manyhands(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "manyhands", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    asked = ["plan", "--model", "perceptron(hidden=16)", "--data", "digits", "--mesh", "pipeline=2"]
    done = manyhands(tmp_path, *asked, "--draw", "it.svg")
    assert done.returncode == 0, done.stderr
    assert "stage 0 from flatten" in done.stdout
    assert "rank 0  F0 F1" in done.stdout
    assert (tmp_path / "it.svg").read_text().startswith("<svg")
    told = json.loads(manyhands(tmp_path, *asked, "--json").stdout)
    assert told["bubble"] == pytest.approx(1 / 9)  # (p - 1) / (m + p - 1) with m = 8
    assert [worker["stages"] for worker in told["workers"]] == [[0], [1]]


@pytest.mark.slow
def test_another_kind_of_picture_is_refused(tmp_path):
    done = manyhands(tmp_path, "plan", "--data", "digits", "--draw", "it.png")
    assert done.returncode == 2
    assert "name a file that ends in .svg" in done.stderr
