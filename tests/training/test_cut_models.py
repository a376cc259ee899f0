"""Training a model that is cut, from a user's side: results, checkpoints that know no mesh, what is refused."""

import sys

import pytest
import torch

import manyhands as mh
from manyhands import cli
from manyhands.cli.summary import lines
from manyhands.errors import BadInput, InvalidPlan, NonFiniteLoss
from manyhands.training import checkpoint

MODEL = "perceptron(hidden=(12, 10))"


def task(**changes):
    return mh.Task(
        **{"model": MODEL, "data": "digits", "steps": 12, "batch_size": 24, "optimizer": "adam(lr=0.01)"} | changes
    )


def trained(mesh, transport="threads", *, out=None, resume=False, how=(), **changes):
    plan = mh.Plan(mesh=mesh, transport=transport, threads=1, **dict(how))
    return mh.train(task(**changes), plan, out=out, resume=resume, progress=False, evaluate="end")


def close(a, b):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-6)  # float32: sums in another order


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
@pytest.mark.parametrize("transport", ["threads", "shared"])
def test_a_cut_model_is_trained_as_the_whole_one(transport, axis):
    whole, part = trained("data=1"), trained(f"{axis}=2", transport)
    close(whole.model.state_dict(), part.model.state_dict())
    assert part.summary.test_accuracy == pytest.approx(whole.summary.test_accuracy, abs=0.02)
    assert part.summary.train_loss == pytest.approx(whole.summary.train_loss, rel=1e-4)
    assert part.summary.parameters == whole.summary.parameters
    assert part.summary.workers == 2
    assert str(part.plan.mesh) == f"mesh(data=1, {axis}=2)"
    assert part.plan.micro_batches == (8 if axis == "pipeline" else 1)
    assert part.notes[-1].startswith("cut among 2 workers" if axis == "tensor" else "cut into 2 stages")
    said = part.summary
    if axis == "tensor":
        assert (said.bubble_by_worker, said.bubble_of_schedule, said.bubble_of_flush) == ([], None, None)
    else:  # 8 micro-batches on two stages
        assert len(said.bubble_by_worker) == 2
        assert all(0 < idle < 1 for idle in said.bubble_by_worker)
        assert said.bubble_of_schedule == pytest.approx(1 / 9)
        assert said.bubble_of_flush == pytest.approx(1 / 9)
        line = next(x for x in lines(task(), part) if x.startswith("  bubble"))
        assert line.endswith("by worker (medians); of the schedule 0.111, (p − 1)/(m + p − 1) = 0.111")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,tensor=2", "pipeline=3", "data=2,tensor=2,pipeline=2"])
@pytest.mark.parametrize("transport", ["gloo", "mpi", "shared"])
def test_a_cut_model_is_trained_as_the_whole_one_everywhere(transport, mesh):
    close(trained("data=1").model.state_dict(), trained(mesh, transport).model.state_dict())


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble", "interleaved(cut='hidden2, activation2, output')"])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_schedule_trains_alike(schedule, recompute):
    how = {"pipeline": schedule, "recompute": recompute, "micro_batches": 5}
    close(trained("data=1").model.state_dict(), trained("pipeline=2", how=how).model.state_dict())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param("tensor=2", "data=1", marks=pytest.mark.slow),
        pytest.param("data=1", "tensor=2", marks=pytest.mark.slow),
        ("pipeline=2", "tensor=3"),
        ("data=2,tensor=2", "pipeline=3"),
        ("data=2", "pipeline=2"),
    ],
)
def test_a_run_begun_on_one_mesh_goes_on_on_another(tmp_path, first, then):
    trained(first, out=tmp_path, steps=7)
    kept = checkpoint.load_newest(tmp_path / "checkpoints")
    again = trained(then, out=tmp_path, resume=True, steps=7)  # nothing left to do: what was kept, bit for bit
    assert all(torch.equal(value, kept.model[name]) for name, value in again.model.state_dict().items())
    close(trained("data=1").model.state_dict(), trained(then, out=tmp_path, resume=True).model.state_dict())


def test_weights_in_channels_last_memory_go_on_on_another_mesh(tmp_path):
    of_cnn = {"model": "cnn", "data": "synthetic(samples=120, inputs=(1, 8, 8))", "optimizer": "adam(lr=0.01)"}
    once = trained("data=1", **of_cnn, steps=9)
    trained("data=1", out=tmp_path, **of_cnn, steps=3)
    trained("tensor=2", out=tmp_path, resume=True, **of_cnn, steps=6)
    again = trained("data=1", out=tmp_path, resume=True, **of_cnn, steps=9)
    close(once.model.state_dict(), again.model.state_dict())


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "data=2,pipeline=2"])
def test_a_resume_on_the_same_mesh_is_exact(tmp_path, mesh):
    how = {"strategy": "local(every=3)", "pipeline": "gpipe(cut='hidden2')" if "pipeline" in mesh else None}
    once = trained(mesh, how=how)
    trained(mesh, how=how, out=tmp_path, steps=7)
    again = trained(mesh, how=how, out=tmp_path, resume=True)
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in once.model.state_dict().items())


def test_the_payload_of_a_step_holds_what_the_cut_exchanges():
    found = trained("tensor=2").summary
    # hidden1 is cut by outputs, hidden2 by inputs and output is whole. A sum of the batch goes forward and none back,
    # as nobody wants the gradient of the samples; what both hold, hidden2's bias and output, is summed and gathered.
    summed, held = 24 * 10 * 4, (10 + 10 * 10 + 10) * 4
    assert found.sent_B_per_step == summed + held


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"mesh": "tensor=2", "strategy": "hogwild"}, "wants the whole model"),
        ({"mesh": "tensor=2", "strategy": "ssp"}, "wants the whole model"),
        ({"mesh": "tensor=2", "strategy": "synchronous(aggregate=median)"}, "wants the whole model"),
        ({"mesh": "data=2", "tensor": "hidden1=column"}, "tensor axis"),
        ({"mesh": "data=2", "pipeline": "gpipe"}, "pipeline axis"),
        ({"mesh": "tensor=2", "recompute": True}, "pipeline axis"),
        ({"mesh": "pipeline=2", "strategy": "asynchronous", "transport": "gloo"}, "wants the whole model"),
        ({"mesh": "sideways=2"}, "the axes that exist are"),
        ({"mesh": "tensor=2", "workers": 3}, "multiply to the number of workers"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan, says):
    with pytest.raises(InvalidPlan, match=says):
        mh.train(task(), mh.Plan(**{"transport": "threads", **plan}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tensor": "hidden9=column"}, "no module is called so"),
        ({"tensor": "hidden1=column"}, "hidden2 says RuntimeError"),
        ({"tensor": "hidden1=column(unit=5)"}, "do not come out even"),
        ({"pipeline": "gpipe(cut='hidden9')"}, "hidden9"),
        ({"pipeline": "gpipe(cut='hidden2, output')"}, "1 modules to cut before, and 2 are named"),
        ({"pipeline": "sideways"}, "one_f_one_b"),
        ({"pipeline": "gpipe(chunks=2)"}, "chunks"),
        ({"pipeline": "pipedream"}, "Say strategy=pipedream"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_before_anything_starts(tmp_path, how, says):
    with pytest.raises(BadInput, match=says):
        trained(f"{next(iter(how))}=2", "shared", how=how, out=tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints"))


@pytest.mark.parametrize("strategy", ["synchronous", "pipedream"])
def test_what_no_stage_uses_is_kept_as_it_was(strategy):
    """Also under a weight decay, as torch leaves alone what has no gradient."""
    how = {"model": "tests.training.factories:partly_used", "steps": 3, "optimizer": "sgd(lr=0.1, weight_decay=0.1)"}
    plan = {
        "strategy": strategy,
        "micro_batches": 1,
        "pipeline": f"{'pipedream' if strategy != 'synchronous' else 'gpipe'}(cut='b')",
    }
    whole, part = trained("data=1", **how), trained("pipeline=2", how=plan, **how)
    close(whole.model.state_dict(), part.model.state_dict())
    assert torch.equal(part.model.state_dict()["never"], torch.ones(4))


@pytest.mark.parametrize("axis", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_from_the_command_line_a_users_model_is_cut_without_editing_it(tmp_path, monkeypatch, capsys, axis):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc1, self.fc2 = nn.Linear(64, 20), nn.Linear(20, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        return self.fc2(self.fc1(x).relu()) + x[:, :10]\n"
    )
    how = ["--data", "digits", "--steps", "20", "--out", "run", "-q"]
    assert cli.main(["train", "--model", "theirs:Net", "--mesh", f"{axis}=2", *how]) == 0
    sys.modules.pop("theirs")
    said = capsys.readouterr().err
    assert ("20×64 → 10×64" if axis == "tensor" else "stage 1 from fc2") in said, "what was cut is told"
    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints").model
    assert {name: tuple(value.shape) for name, value in state.items()}["fc1.weight"] == (20, 64)


@pytest.mark.parametrize(
    "strategy",
    [
        "downpour(fetch=2, push=2, server='adagrad(lr=0.05)')",
        pytest.param("ssp(staleness=1)", marks=pytest.mark.slow),
    ],
)
def test_distbelief_learns_on_split_replicas(tmp_path, strategy):
    how = {"strategy": strategy, "pipeline": "gpipe(cut='hidden2')", "micro_batches": 2}
    found = trained("data=2,pipeline=2", "shared", how=how, out=tmp_path, steps=150, optimizer="sgd(lr=0.3)")
    assert found.summary.test_accuracy > 0.4  # chance is 0.1
    again = trained("pipeline=2", how=how, out=tmp_path, resume=True, steps=152, optimizer="sgd(lr=0.3)")
    assert again.summary.steps == 152


@pytest.mark.parametrize("strategy", ["asynchronous", "local(every=3)", "synchronous"])
def test_a_loss_that_is_not_finite_stops_all_stages_of_all_replicas(strategy):
    how = {"strategy": strategy, "pipeline": "gpipe(cut='hidden2')", "micro_batches": 2}
    with pytest.raises(NonFiniteLoss):
        trained("data=2,pipeline=2", "shared", how=how, steps=200, optimizer="sgd(lr=1e30)")


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_a_live_model_of_a_notebook_stays_whole(axis):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = torch.randn(24, 6), torch.randint(3, (24,))
    found = mh.train(
        mh.Task(model=model, data=data, steps=3, batch_size=8),
        mh.Plan(mesh=f"{axis}=2", transport="threads"),
        progress=False,
    )
    assert found.model is model
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 6), (8,), (3, 8), (3,)]


def test_a_live_model_stays_whole_where_dense_layers_are_cut_along_the_data_axis():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 16, 5))
    data = torch.randn(24, 1, 6, 6), torch.randint(5, (24,))
    plan = mh.Plan(mesh="data=2", tensor="one_weird_trick(scheme=a)", transport="threads")
    found = mh.train(mh.Task(model=model, data=data, steps=3, batch_size=8), plan, progress=False)
    assert found.model is model
    assert [tuple(p.shape) for p in model.parameters()] == [(2, 1, 3, 3), (2,), (5, 32), (5,)]
    assert model(data[0]).shape == (24, 5), "and no hook of a worker's is left in it"


def test_batchnorm_is_told_how_small_a_micro_batch_is():
    of_norm = {"model": "tests.training.factories:batchnorm", "steps": 2}
    found = trained("pipeline=2", **of_norm, batch_size=24)
    assert any("BatchNorm normalises within a micro-batch, of 3 samples" in note for note in found.notes)
    with pytest.raises(BadInput, match="1 samples have no variance"):
        trained("pipeline=2", **of_norm, batch_size=12)


def test_a_module_that_cannot_be_traced_is_a_part_of_its_own():
    how = {"micro_batches": 1}  # by whose values it branches
    found = trained("pipeline=2", how=how, model="tests.training.factories:branching", steps=3)
    close(
        trained("data=1", model="tests.training.factories:branching", steps=3).model.state_dict(),
        found.model.state_dict(),
    )
