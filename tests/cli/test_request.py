"""What a resume takes from the folder's plan, and what it decides anew."""

import json
import tomllib

import pytest

from manyhands.cli import options
from manyhands.cli.request import requested

PLAN = """
[task]
model = "perceptron(hidden=(32,16))"
data = "digits"
[plan]
strategy = "synchronous"
mesh = "data=1,pipeline=2"
pipeline = "one_f_one_b(cut='hidden2')"
micro_batches = 8
workers = 2
threads = 1
transport = "shared"
buffers = "rank0"
[asked]
mesh = "pipeline=2"
pipeline = "one_f_one_b"
buffers = "rank0"
"""


@pytest.mark.parametrize(
    ("said", "mesh", "pipeline", "micro_batches"),
    [
        ([], "mesh(data=1, pipeline=2)", "one_f_one_b(cut='hidden2')", None),
        (["--mesh", "data=1,pipeline=2"], "mesh(data=1, pipeline=2)", "one_f_one_b(cut='hidden2')", None),
        (["--mesh", "tensor=2"], "mesh(tensor=2)", None, None),
        (["--workers", "1"], "None", None, None),
    ],
)
def test_another_mesh_or_number_of_workers_puts_aside_how_the_model_was_cut(
    tmp_path, said, mesh, pipeline, micro_batches
):
    (tmp_path / "plan.toml").write_text(PLAN)
    _, plan, _ = requested(options.parse(["train", "--resume", "--out", str(tmp_path), *said]))
    assert (str(plan.mesh), plan.pipeline, plan.micro_batches) == (mesh, pipeline, micro_batches)
    assert plan.buffers == "rank0", "what is not about the mesh stays"


def test_micro_batches_that_were_asked_for_bind_a_resume_on_any_mesh(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN + "micro_batches = 8\n")
    _, plan, _ = requested(options.parse(["train", "--resume", "--out", str(tmp_path), "--workers", "1"]))
    assert (plan.micro_batches, plan.workers) == (8, 1)


MESHES = {
    "ampnet": [("pipeline=2", 1), ("pipeline=3", 1)],
    "pipedream": [("pipeline=2", 8), ("data=2", 1), ("pipeline=2", 8)],
    "synchronous": [("data=2", 1), ("pipeline=2", 8)],
}


@pytest.mark.parametrize("strategy", MESHES)
def test_a_run_is_taken_up_on_its_own_and_on_another_mesh(run, tmp_path, strategy):
    how = ("--data", "digits", "--model", "perceptron(hidden=(12, 10))", "--transport", "threads", "--threads", "1")
    where: tuple[str, ...] = ()
    for i, (mesh, micro_batches) in enumerate(MESHES[strategy]):
        where = ("--out", str(tmp_path), "--mesh", mesh, "--steps", str(2 * i + 1), "--evaluate", "end", "--json", "-q")
        how = ("--resume", "--transport", "threads") if i else (*how, "--strategy", strategy)
        assert run("train", *how, *where)[0] == 0
        status, out, err = run("train", "--resume", "--out", tmp_path, "--steps", 2 * i + 2, "--json", "-q")
        assert status == 0, err
        plan = tomllib.loads((tmp_path / "plan.toml").read_text())["plan"]
        assert (plan["workers"], plan["micro_batches"]) == (2 + (mesh == "pipeline=3"), micro_batches)
        assert json.loads(out)["steps"] == 2 * i + 2
        if strategy == "pipedream":
            assert json.loads(out)["staleness_max"] == (1 if mesh == "pipeline=2" else 0)
