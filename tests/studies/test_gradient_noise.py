"""The noise of an update, against what averaging promises and against plain torch by hand."""

import math

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands import data
from manyhands.errors import BadInput
from manyhands.studies import parity
from manyhands.studies.gradient_noise import PLACE_BATCH, Moments, measure
from manyhands.training.sampler import Sampler

TASK = {"model": "logistic", "data": "digits(limit=1000)", "optimizer": "sgd(lr=0.1)", "steps": 20, "seed": 3}
WORKERS = (1, 2, 4, 8)


def variances(strategy, batch):
    """Of one update with 1 … 8 workers; ``batch`` is a function of how many."""
    found = [
        measure(mh.Task(**TASK, batch_size=batch(p)), mh.Plan(strategy=strategy, workers=p, threads=1)) for p in WORKERS
    ]
    assert [(each.batch, each.workers, each.parameters) for each in found] == [(batch(p), p, 650) for p in WORKERS]
    return [each.variance for each in found]


def slope(values):
    """Of the logarithms, by least squares."""
    x, y = ([math.log(v) for v in each] for each in (WORKERS, values))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def one_of(strategy, *alike):
    """The first per commit: that the others compute the same the contract test says at every commit."""
    return [strategy, *(pytest.param(text, marks=pytest.mark.slow) for text in alike)]


@pytest.mark.parametrize("strategy", one_of("synchronous", "synchronous(update='replicated')", "replica_average"))
def test_with_a_batch_a_worker_the_variance_of_an_average_falls_as_one_over_the_workers(strategy):
    assert slope(variances(strategy, lambda p: 8 * p)) == pytest.approx(-1, abs=0.15)


@pytest.mark.parametrize("strategy", one_of("slice_update", "synchronous", "replica_average(what='parameters')"))
def test_with_one_batch_in_all_the_workers_change_nothing(strategy):
    found = variances(strategy, lambda p: 32)
    assert found == pytest.approx(found[:1] * 4, rel=1e-5)


def test_slices_from_own_batches_are_as_noisy_as_one_workers_batch():
    """In strong scaling, so, P times as noisy as the batch would be; in weak scaling as noisy as one worker."""
    assert slope(variances("slice_own_batch", lambda p: 32)) == pytest.approx(1, abs=0.15)
    assert slope(variances("slice_own_batch", lambda p: 8 * p)) == pytest.approx(0, abs=0.15)


@pytest.mark.slow  # that one worker is plain SGD, bit for bit, the contract test says at every commit
@pytest.mark.parametrize("strategy", [str(each) for each in parity.variants() if each.plain_alone])
def test_one_worker_has_the_noise_of_plain_sgd(strategy):
    found = measure(mh.Task(**TASK, batch_size=30), mh.Plan(strategy=strategy, workers=1), draws=40)
    assert found.as_dict() == pytest.approx(by_hand(batch=30, draws=40), rel=1e-5)


def by_hand(batch, draws):
    """In torch and float64 but for the gradient itself."""
    splits = data.load(TASK["data"])
    place = mh.train(
        mh.Task(**TASK, batch_size=PLACE_BATCH), mh.Plan(workers=1), evaluate="never", progress=False
    ).model
    drawn = []
    for share in Sampler(len(splits.train), batch_size=batch, seed=TASK["seed"]).batches(steps=1000):
        if share.global_count == batch and len(drawn) < draws:
            x, y = splits.train.rows(share.indices)
            place.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(place(x), y))
            drawn.append(torch.cat([p.grad.reshape(-1).double() for p in place.parameters()]))
    u = torch.stack(drawn)
    variance = float(u.var(0, unbiased=True).sum())
    return {
        "batch": batch,
        "workers": 1,
        "draws": draws,
        "parameters": u.shape[1],
        "mean_square": float(u.square().sum(1).mean()),
        "square_of_mean": float(u.mean(0).square().sum()) - variance / draws,
        "variance": variance,
    }


def test_the_parts_add_up():
    """E|u|² = |E u|² + tr Cov u, for the unbiased estimates exactly."""
    found = measure(mh.Task(**TASK, batch_size=16), mh.Plan(workers=2, threads=1), draws=10)
    assert found.mean_square == pytest.approx(found.square_of_mean + found.variance, rel=1e-12)


def test_moments_are_those_of_all_vectors_at_once():
    vectors = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments(5)
    for vector in vectors:
        moments.add(vector)
    assert moments.variance == pytest.approx(float(vectors.var(0).sum()), rel=1e-9)
    assert torch.allclose(moments.mean, vectors.mean(0), rtol=1e-14)
    assert moments.mean_square == pytest.approx(float(vectors.square().sum(1).mean()))


def test_the_same_question_has_the_same_answer():
    task, plan = mh.Task(**TASK, batch_size=16), mh.Plan(workers=3, threads=1)
    before = torch.get_rng_state()
    assert measure(task, plan, draws=4) == measure(task, plan, draws=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_further_on_the_way_the_place_is_another():
    found = [
        measure(mh.Task(**{**TASK, "steps": steps}, batch_size=50), mh.Plan(workers=1), draws=10) for steps in (1, 200)
    ]
    assert found[1].square_of_mean < found[0].square_of_mean / 2


class Normed(nn.Sequential):
    """With buffers and random numbers of its own."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))


def test_buffers_and_random_numbers_do_no_harm():
    task = mh.Task(**{**TASK, "model": "tests.studies.test_gradient_noise:Normed"}, batch_size=40)
    found = measure(task, mh.Plan(workers=2, threads=1), draws=8)
    assert found.variance > 0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(BadInput, match="draws=1: a variance needs"):
        measure(mh.Task(**TASK), mh.Plan(workers=1), draws=1)
    with pytest.raises(BadInput, match="live model"):
        measure(mh.Task(**{**TASK, "model": nn.Linear(64, 10)}), mh.Plan(workers=1))
    with pytest.raises(BadInput, match="single is one worker"):
        measure(mh.Task(**TASK), mh.Plan(workers=2, transport="single"))
