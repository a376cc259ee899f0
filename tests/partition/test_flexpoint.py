"""Training in flex16+5: Autoflex's rule, what overflows, what is rounded, and that it learns as float32 does."""

import math

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.errors import InvalidPlan
from manyhands.partition.flexpoint import Flex16


def exponent(chi: float) -> int:
    return min(31, max(0, math.floor(math.log2(32767 / chi))))


def test_autoflex_foresees_the_exponent_from_the_maxima_of_the_last_writes():
    flex, maxima = Flex16(nn.Identity()), [1.0, 1.5, 0.7, 2.2, 1.1]
    e = exponent(2 * maxima[0])  # of the first write: the tensor itself, times alpha
    phi: list[float] = []
    for largest in maxima:
        x = torch.tensor([largest, -largest / 3, 0.01])
        kappa = 2.0**-e
        assert torch.equal(flex.rounded("x", x), torch.round(x / kappa) * kappa)
        phi.append(round(largest / kappa) * kappa)
        mean = sum(phi) / len(phi)
        deviation = math.sqrt(sum((p - mean) ** 2 for p in phi) / len(phi))
        e = exponent(2 * (mean + max(3 * deviation, 100 * kappa)))
    assert flex.overflows == 0


def test_what_does_not_fit_is_cut_counted_and_fits_the_next_time():
    flex = Flex16(nn.Identity())
    flex.rounded("x", torch.ones(3))
    cut = flex.rounded("x", torch.tensor([9.0, -9.0, 0.5]))
    assert cut.tolist() == [cut[0], -cut[0], 0.5]
    assert 1 < cut[0] < 9
    assert flex.overflows == 1
    rounds = 0
    while flex.rounded("x", torch.tensor([9.0]))[0] < 8.9:  # the history is gone and its last maximum counts double
        rounds += 1
    assert 1 <= rounds + flex.overflows <= 4


def test_tensors_have_exponents_of_their_own_and_what_is_not_finite_stays_so():
    flex = Flex16(nn.Identity())
    for scale in (1.0, 1e-3):
        x = torch.rand(50) * scale
        assert (flex.rounded(str(scale), x) - x).abs().max() <= x.max() * 2**-14
    assert flex.rounded("1.0", torch.tensor([math.nan]))[0].isnan()


def test_a_step_rounds_weights_outputs_and_both_kinds_of_gradients():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    flex, x = Flex16(model), torch.rand(4, 6)
    with flex.training():
        model(x).sum().backward()
    tensors = set(flex.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert tensors == {
        *names,
        *(f"gradient of {name}" for name in names),
        *(f"{kind}output of {i}" for i in range(3) for kind in ("", "gradient of ")),
    }
    for p in model.parameters():
        for value in (p.detach(), p.grad):
            steps = value / 2.0 ** math.floor(math.log2(value.abs().max()) - 14)
            assert torch.equal(steps, steps.round())
    gradient = model[0].weight.grad.clone()
    model(x).sum().backward()  # outside: nothing is rounded, and no hook is left
    assert not torch.equal(model[0].weight.grad, 2 * gradient)


def trained(precision: str, out, *, transport: str = "threads", resume: bool = False, **more) -> mh.Result:
    task = mh.Task(model="perceptron(hidden=20)", data="digits", optimizer="sgd(lr=0.1)", batch_size=50, **more)
    plan = mh.Plan(workers=2, transport=transport, threads=1, precision=precision)
    return mh.train(task, plan, out=out, resume=resume, progress=False)


@pytest.mark.slow
def test_a_perceptron_learns_as_in_float32(tmp_path):
    losses = [trained(p, tmp_path / p, epochs=4).history[-1]["train_loss"] for p in ("float32", "flexpoint")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("transport", [pytest.param("shared", marks=pytest.mark.slow), "gloo"])
def test_replicas_stay_identical_where_each_has_a_process(transport, tmp_path):
    a, b = (trained("flexpoint", tmp_path / on, steps=4, transport=on) for on in (transport, "threads"))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_a_resume_is_exact(tmp_path):
    whole = trained("flexpoint", tmp_path / "whole", steps=6)
    trained("flexpoint", tmp_path / "cut", steps=3)
    rest = trained("flexpoint", tmp_path / "cut", steps=6, resume=True)
    assert rest.summary.steps == whole.summary.steps
    assert all(torch.equal(x, y) for x, y in zip(rest.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("cut", [{"strategy": "hogwild"}, {"mesh": "tensor=2"}, {"shard": 3}], ids=str)
def test_whoever_does_not_hold_whole_weights_alike_is_refused(cut):
    task = mh.Task(model="perceptron(hidden=20)", data="digits", steps=1)
    with pytest.raises(InvalidPlan, match="flexpoint"):
        mh.predict(task, mh.Plan(workers=2, precision="flexpoint", **cut))
