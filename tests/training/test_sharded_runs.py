"""Training with gradients and parameters shared out, from a user's side: results, resumes, what a plan tells."""

import pytest
import torch

import manyhands as mh
from manyhands import verbs
from manyhands.training import checkpoint

HERE = "tests.training.factories"


def task(**changes):
    return mh.Task(
        **{"model": f"{HERE}:model", "data": f"{HERE}:data", "steps": 9, "batch_size": 12, "optimizer": "adam(lr=0.01)"}
        | changes
    )


def trained(workers, shard, transport="threads", *, out=None, resume=False, **changes):
    plan = mh.Plan(workers=workers, shard=shard, transport=transport if workers > 1 else "single", threads=1)
    return mh.train(task(**changes), plan, out=out, resume=resume, progress=False)


def close(a, b):
    for name, value in a.model.state_dict().items():
        torch.testing.assert_close(value, b.model.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("workers", "shard", "transport"),
    [
        (3, 2, "threads"),
        (2, 3, "shared"),
        (2, 3, "gloo"),
        *(pytest.param(3, shard, on, marks=pytest.mark.slow) for shard in (2, 3) for on in ("shared", "gloo", "mpi")),
    ],
)
def test_it_trains_as_one_worker_does(workers, shard, transport):
    one, several = trained(1, None), trained(workers, shard, transport)
    close(one, several)
    for found, expected in zip(several.history, one.history, strict=True):
        assert found["test_accuracy"] == expected["test_accuracy"]
        assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)
    assert several.summary.parameters == one.summary.parameters
    assert several.notes[-1].startswith(f"shard={shard}: 1 unit ") or transport == "threads"


@pytest.mark.parametrize(
    ("first", "then"), [((2, 3), (1, None)), ((1, None), (3, 3)), pytest.param((3, 2), (2, 3), marks=pytest.mark.slow)]
)
def test_a_run_goes_on_on_another_number_of_workers_and_with_another_stage(tmp_path, first, then):
    trained(*first, out=tmp_path, steps=5)
    kept = checkpoint.load_newest(tmp_path / "checkpoints")
    again = trained(*then, out=tmp_path, resume=True, steps=5)  # nothing left to do: what was kept, bit for bit
    assert all(torch.equal(value, kept.model[name]) for name, value in again.model.state_dict().items())
    close(trained(1, None), trained(*then, out=tmp_path, resume=True))


def test_a_resume_on_as_many_workers_is_exact(tmp_path):
    once = trained(2, 3, "shared").model.state_dict()
    trained(2, 3, "shared", out=tmp_path, steps=5)
    again = trained(2, 3, "shared", out=tmp_path, resume=True).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_a_tensor_under_two_names_is_kept_once(tmp_path):
    trained(2, 3, out=tmp_path, steps=2, model=f"{HERE}:tied")
    found = checkpoint.load_newest(tmp_path / "checkpoints").model
    assert found["1.weight"] is found["3.weight"]
    close(*(trained(workers, shard, model=f"{HERE}:tied") for workers, shard in ((1, None), (2, 3))))


@pytest.mark.parametrize("shard", [2, 3])
def test_a_plan_tells_what_is_held_and_what_is_counted(shard):
    plan = mh.Plan(workers=2, shard=shard, transport="threads", threads=1, micro_batches=2)
    parts = verbs.outlined(task(), plan).parts
    found = mh.train(task(), plan, progress=False, evaluate="never").summary
    assert found.sent_B_per_step == parts[0].sent_B + parts[0].cut_B
    whole = sum(p.numel() for p in trained(1, None, steps=1).model.parameters())
    assert sum(part.gradients_B for part in parts) == 8 * whole
    assert sum(part.optimizer_B for part in parts) == 2 * 8 * whole
    assert [part.parameters for part in parts] == ([whole] * 2 if shard == 2 else [p.gradients_B // 8 for p in parts])
