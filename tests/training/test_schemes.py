"""Training a network that a scheme cuts, from a user's side."""

import subprocess
import sys

import pytest
import torch

import manyhands as mh
from manyhands.errors import BadInput, InvalidPlan
from manyhands.training import checkpoint

PERCEPTRON, IMAGES = "perceptron(hidden=(12, 10))", "cnn"
DUAL = "redundant(copies=dual)"
#: Schemes with a mesh of few ranks and a model for them.
SCHEMES = {
    "rotate": ("tensor=3", PERCEPTRON),
    "redundant": ("tensor=2", PERCEPTRON),
    "redundant(copies=halo)": ("tensor=4", PERCEPTRON),
    DUAL: ("data=2,tensor=2", PERCEPTRON),
    "cannon": ("tensor=4", PERCEPTRON),
    "spatial": ("tensor=2", IMAGES),
}


def trained(scheme, mesh, model, transport="threads", *, out=None, resume=False, steps=8, **how):
    # Adam makes much of the rounding of a gradient near 0, and convolutions have such.
    optimizer = "sgd(lr=0.1, momentum=0.9)" if model == IMAGES else "adam(lr=0.01)"
    task = mh.Task(model=model, data="digits", steps=steps, batch_size=24, optimizer=optimizer)
    plan = mh.Plan(mesh=mesh, tensor=scheme, transport=transport, threads=1, **how)
    return mh.train(task, plan, out=out, resume=resume, progress=False, evaluate="end")


def close(a, b):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5)  # float32: sums in another order


@pytest.fixture(scope="module")
def whole():
    return {model: trained(None, "data=1", model) for model in (PERCEPTRON, IMAGES)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_trains_the_network_as_one_worker_does(whole, scheme):
    mesh, model = SCHEMES[scheme]
    found, expected = trained(scheme, mesh, model), whole[model]
    close(expected.model.state_dict(), found.model.state_dict())
    assert found.summary.test_accuracy == pytest.approx(expected.summary.test_accuracy, abs=0.02)
    assert found.summary.parameters == expected.summary.parameters
    assert found.notes[-1].startswith("cut among")
    assert found.summary.sent_B_per_step > 0 or scheme == "redundant", "two ranks with a halo send nothing"


@pytest.mark.parametrize("scheme", ["rotate", "redundant", DUAL, "spatial"])
def test_schemes_work_between_processes(whole, scheme):
    model = SCHEMES[scheme][1]
    close(whole[model].model.state_dict(), trained(scheme, "tensor=2", model, "shared").model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gloo", "mpi", "shared"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_work_everywhere(whole, scheme, transport):
    mesh, model = SCHEMES[scheme]
    close(whole[model].model.state_dict(), trained(scheme, mesh, model, transport).model.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_begun_with_a_scheme_goes_on_with_another_or_none(tmp_path, whole, scheme):
    mesh, model = SCHEMES[scheme]
    trained(scheme, mesh, model, out=tmp_path, steps=5)
    kept = checkpoint.load_newest(tmp_path / "checkpoints")
    assert {n: v.shape for n, v in kept.model.items()} == {
        n: v.shape for n, v in whole[model].model.state_dict().items()
    }
    other, how = ("data=1", None) if model == IMAGES else ("tensor=4", "cannon")
    close(whole[model].model.state_dict(), trained(how, other, model, out=tmp_path, resume=True).model.state_dict())


@pytest.mark.parametrize("scheme", ["rotate", "redundant(copies=halo)", DUAL, "cannon"])
def test_a_resume_on_the_same_mesh_is_exact(tmp_path, scheme):
    mesh, model = SCHEMES[scheme]
    once = trained(scheme, mesh, model)
    trained(scheme, mesh, model, out=tmp_path, steps=5)
    again = trained(scheme, mesh, model, out=tmp_path, resume=True)
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in once.model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"mesh": "tensor=2", "tensor": "cannon"}, "square grid"),
        ({"mesh": "tensor=3", "tensor": "redundant"}, "even and odd"),
        ({"mesh": "tensor=2", "tensor": "spatial"}, "no Conv2d"),
        ({"mesh": "tensor=2", "tensor": "canon"}, "Did you mean 'cannon'"),
        ({"mesh": "data=2", "tensor": "rotate"}, "tensor axis"),
        ({"mesh": "tensor=2,pipeline=2", "tensor": "rotate"}, "a scheme cuts a whole network"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(plan, says):
    with pytest.raises((BadInput, InvalidPlan), match=says):
        mh.train(mh.Task(model=PERCEPTRON, data="digits", steps=2), mh.Plan(**plan, transport="threads"))


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    said = ["--model", PERCEPTRON, "--data", "digits", "--steps", "4", "--mesh", "tensor=4", "--tensor", "cannon"]
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", "train", *said, "--transport", "threads", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hidden1 block 6×32 of 12×64 on a grid of 2×2" in done.stderr
