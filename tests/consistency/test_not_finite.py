"""A loss that is not finite after a gradient that was not: which state is kept, and what is said of it."""

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.errors import NonFiniteLoss
from manyhands.training import checkpoint

HERE = "tests.consistency.test_not_finite"


class Model(nn.Module):
    """All zero, so that `loss` is 0 with a gradient of NaN; that of a model that starts elsewhere is finite."""

    def __init__(self, start=0.0):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        for p in self.parameters():
            nn.init.constant_(p, start)

    def forward(self, x):
        return self.layer(x.flatten(1))


def zero():
    return Model()


def loss(outputs, target):
    return outputs.norm(dim=1).sqrt().mean()


def train(tmp_path, *, workers, strategy="synchronous", **task):
    with pytest.raises(NonFiniteLoss) as e:
        mh.train(
            mh.Task(model=f"{HERE}:zero", data="digits", loss=f"{HERE}:loss", steps=5, batch_size=50, **task),
            mh.Plan(workers=workers, strategy=strategy),
            out=tmp_path / "out",
            progress=False,
            **({"checkpoint": 1} if workers == 1 else {}),
        )
    return e.value


def kept(tmp_path):
    folders = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    return {path.name: all(bool(v.isfinite().all()) for v in checkpoint.load(path).model.values()) for path in folders}


def test_parameters_that_a_gradient_spoilt_are_not_called_a_good_state(tmp_path):
    error = train(tmp_path, workers=2)
    assert error.step == 1
    assert error.spoilt
    assert error.kept == ""
    assert "No checkpoint of a good state exists" in str(error)
    assert kept(tmp_path) == {}


def test_a_checkpoint_of_spoilt_parameters_is_passed_over_for_the_newest_good_one(tmp_path):
    error = train(tmp_path, workers=1)  # keeps a checkpoint of every step
    assert not any(kept(tmp_path).values())
    assert error.kept == ""
    assert "No checkpoint" in str(error)


@pytest.mark.parametrize("strategy", ["synchronous", "replica_average(what='parameters')", "slice_own_batch"])
def test_with_a_clip_the_gradient_itself_stops_the_run_before_it_spoils_anything(tmp_path, strategy):
    error = train(tmp_path, workers=2, strategy=strategy, clip=1.0)
    assert error.step == 0
    assert not error.spoilt
    assert "gradient" in str(error)
    assert kept(tmp_path) == {"step-00000000": True}
    assert error.kept.endswith("step-00000000")


def test_complex_and_reassigned_buffers_survive_training_and_checkpoints(tmp_path):
    for workers in (1, 2):
        out = tmp_path / str(workers)
        result = mh.train(
            mh.Task(model=f"{HERE}:buffered", data="digits", steps=5, batch_size=50),
            mh.Plan(workers=workers),
            out=out,
            progress=False,
        )
        state = result.model.state_dict()
        assert torch.equal(state["phases"], torch.tensor([1j, 2 + 2j]))
        assert float(state["mean"].norm()) > 0
        stored = checkpoint.load_newest(out / "checkpoints").model
        assert torch.equal(stored["phases"], state["phases"])
        assert torch.equal(stored["mean"], state["mean"])


class Buffered(Model):
    """A complex constant, and an average that every forward puts in the old one's place."""

    def __init__(self):
        super().__init__(start=0.01)
        self.register_buffer("phases", torch.tensor([1j, 2 + 2j]))
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.flatten(1).mean(0).detach()
        return super().forward(x)


def buffered():
    return Buffered()
