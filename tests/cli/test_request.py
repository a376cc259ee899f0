"""What a resume takes from the folder's plan, and what it decides anew."""

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
"""


@pytest.mark.parametrize(
    ("said", "mesh", "pipeline", "micro_batches"),
    [
        ([], "mesh(data=1, pipeline=2)", "one_f_one_b(cut='hidden2')", 8),
        (["--mesh", "data=1,pipeline=2"], "mesh(data=1, pipeline=2)", "one_f_one_b(cut='hidden2')", 8),
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
