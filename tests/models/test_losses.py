"""Losses agree with torch's, and shares of a batch join to the loss of the whole batch."""

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from manyhands.errors import BadInput
from manyhands.models.losses import CrossEntropy, SquaredError, accuracy, build, l2, reduction

HERE = "tests.models.test_losses"


def a_batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, generator=g, dtype=torch.float64), torch.randint(0, 10, (n,), generator=g)


def own_loss(outputs, target):
    return (outputs.sum(1) - target).pow(2).mean()


def make_loss(power: int = 2):
    return lambda outputs, target: (outputs.sum(1) - target).abs().pow(power).mean()


def no_loss() -> int:
    return 3


def test_cross_entropy_is_torchs_bit_for_bit():
    outputs, target = a_batch(25)
    assert torch.equal(CrossEntropy()(outputs, target), F.cross_entropy(outputs, target))
    smoothed = build("cross_entropy(label_smoothing=0.1)")
    assert torch.equal(smoothed(outputs, target), F.cross_entropy(outputs, target, label_smoothing=0.1))


def test_no_label_is_special_unless_it_is_named():
    outputs, target = a_batch(5)
    target[0] = -100
    with pytest.raises(IndexError):
        CrossEntropy()(outputs, target)


@given(st.integers(1, 30), st.data(), st.sampled_from([0.0, 0.1]))
def test_shares_with_ignored_rows_join_to_the_mean_over_kept_rows(n: int, data: st.DataObject, smoothing: float):
    outputs, target = a_batch(n)
    ignored = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    target[torch.tensor(ignored)] = -1
    cut = data.draw(st.integers(0, n))
    loss = CrossEntropy(label_smoothing=smoothing, ignore_index=-1)
    shares = [loss(outputs[s], target[s]) for s in (slice(0, cut), slice(cut, n))]
    total, kept = (sum(share[i] for share in shares) for i in (0, 1))
    assert int(kept) == n - sum(ignored)
    if kept:
        whole = F.cross_entropy(outputs, target, ignore_index=-1, label_smoothing=smoothing)
        torch.testing.assert_close(total / kept, whole, rtol=1e-12, atol=1e-12)


def test_squared_error_is_half_the_sum_over_samples_and_classes():
    outputs, target = a_batch(7)
    by_hand = sum(
        0.5 * (outputs[i, k] - float(target[i] == k)) ** 2 for i in range(7) for k in range(10)
    )  # the formula as printed, one term at a time
    total, count = SquaredError()(outputs, target)
    assert count is None
    torch.testing.assert_close(total, by_hand, rtol=1e-12, atol=0)


@given(st.integers(2, 40), st.data())
def test_sum_losses_and_their_gradients_add_over_shares(n: int, data: st.DataObject):
    outputs, target = a_batch(n)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=4))), n]
    for loss in (SquaredError(), build(nn.CrossEntropyLoss(reduction="sum"))):
        whole, shared = (outputs.clone().requires_grad_() for _ in range(2))
        loss(whole, target)[0].backward()
        for lo, hi in pairwise(cuts):
            loss(shared[lo:hi], target[lo:hi])[0].backward()
        torch.testing.assert_close(shared.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_squared_error_takes_one_column_without_broadcasting():
    x, y = torch.rand(6, 1), torch.rand(6)
    torch.testing.assert_close(SquaredError()(x, y)[0], 0.5 * (x[:, 0] - y).pow(2).sum())
    with pytest.raises(BadInput, match="differ in shape"):
        SquaredError()(torch.rand(6, 2), y)


def test_l2_is_carried_and_not_counted_in_the_value():
    outputs, target = a_batch(4)
    with_l2 = build("squared_error(l2=5)")
    assert torch.equal(with_l2(outputs, target)[0], SquaredError()(outputs, target)[0])
    assert (l2(with_l2), l2(CrossEntropy()), l2(own_loss), l2(None)) == (5.0, 0.0, 0.0, 0.0)


def test_every_loss_tells_whether_it_is_a_sum():
    assert [reduction(x) for x in (CrossEntropy(), SquaredError(), own_loss, None)] == ["mean", "sum", "mean", "mean"]
    assert reduction(build(nn.MSELoss(reduction="sum"))) == "sum"
    assert reduction(build("torch.nn:MSELoss(reduction='sum')")) == "sum"


def test_a_loss_of_ones_own_is_a_function_a_factory_or_a_module():
    outputs, target = a_batch(4)
    expected = own_loss(outputs, target)
    for spec in (own_loss, f"{HERE}:own_loss", f"{HERE}:make_loss", f"{HERE}:make_loss(power=2)", make_loss(2)):
        torch.testing.assert_close(build(spec)(outputs, target), expected)
    assert isinstance(build("torch.nn:CrossEntropyLoss(label_smoothing=0.1)"), nn.CrossEntropyLoss)
    assert build(None) is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cross_entrpy", "Did you mean 'cross_entropy'"),
        ("squared_error(lambda_=5)", "no option of loss squared_error named 'lambda_'"),
        ("squared_error(l2=-1)", "l2=-1"),
        ("squared_error(l2='a')", "l2='a'"),
        ("cross_entropy(label_smoothing=2)", "outside 0 … 1"),
        ("torch.nn:MSELoss(reduction='none')", "take reduction='mean' or 'sum'"),
        (f"{HERE}:no_loss", "gave a int; the rule is"),
        (3, "gave a int; the rule is"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_in_words(spec: object, said: str):
    with pytest.raises(BadInput) as e:
        build(spec)  # type: ignore[arg-type]
    assert said in str(e.value)


def test_class_weights_without_a_count_are_warned_of(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        build(nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert "no count" in caplog.text


def test_accuracy_counts_right_predictions():
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 2.0]])
    target = torch.tensor([1, 1, 0])
    assert accuracy(outputs, target) == 2
    assert accuracy(outputs, F.one_hot(target).float()) == 2
    with pytest.raises(BadInput, match="needs classes"):
        accuracy(outputs, torch.rand(3))
