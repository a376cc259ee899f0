"""The transformer has its published size and start, sees no later character, can be cut both ways, and learns."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import manyhands as mh
from manyhands.data import load
from manyhands.errors import BadInput
from manyhands.models import build
from manyhands.models.losses import CrossEntropy, accuracy

HERE = "tests.models.test_gpt"
TEXT = "markov(classes=4, length=16, characters=40000)"
SMALL = {"inputs": (12,), "classes": 7}


def small_in_float64(inputs: tuple[int, ...], classes: int) -> nn.Module:
    return build("gpt(layers=2, width=16, heads=2)", inputs=inputs, classes=classes).double()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def characters(n: int = 3, length: int = 12, classes: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (n, length), generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 30))
def test_the_number_of_parameters_is_the_formula(layers: int, heads: int, head_width: int, length: int, classes: int):
    w = heads * head_width
    model = build(f"gpt(layers={layers}, width={w}, heads={heads})", inputs=(length,), classes=classes)
    assert parameters(model) == (2 * classes + length + 2) * w + layers * (12 * w * w + 13 * w)


def test_its_sizes_on_tiny_shakespeare():
    for spec, published in (("gpt", 818_176), ("gpt(width=256)", 3_209_216)):
        assert parameters(build(spec, inputs=(64,), classes=65)) == published


def test_windows_go_to_logits_of_which_every_parameter_has_a_gradient():
    model = build("gpt(layers=2, width=16, heads=4)", **SMALL)
    logits = model(characters())
    assert logits.shape == (3, 7, 12)
    CrossEntropy()(logits, characters(seed=1)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(characters(length=5)).shape == (3, 7, 5)


@given(st.integers(0, 10), st.integers(0, 2**30))
def test_a_later_character_does_not_change_an_earlier_output(last: int, seed: int):
    model = small_in_float64(**SMALL)
    one = characters(seed=seed)
    other = torch.cat([one[:, : last + 1], (one[:, last + 1 :] + 1) % 7], dim=1)
    with torch.no_grad():
        a, b = model(one), model(other)
    torch.testing.assert_close(a[:, :, : last + 1], b[:, :, : last + 1], rtol=0, atol=1e-14)
    assert (a[:, :, last + 1 :] - b[:, :, last + 1 :]).abs().max() > 1e-6


def test_an_earlier_character_changes_later_outputs():
    model = small_in_float64(**SMALL)
    one = characters()
    other = one.clone()
    other[:, 0] = (other[:, 0] + 1) % 7
    assert ((model(one) - model(other)).abs().amax(dim=(0, 1)) > 1e-9).all()


def test_it_starts_as_gpt_2_does():
    torch.manual_seed(0)
    model = build("gpt(layers=3, width=128)", inputs=(64,), classes=65)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(6) if adds else 0.02
            # 8,192 draws at least: five standard errors of a deviation are 4 %.
            assert p.std().item() == pytest.approx(expected, rel=0.04), name
    logits = model(characters(8, 64, 65))
    loss = F.cross_entropy(logits, characters(8, 64, 65, seed=1))
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)  # it begins by knowing nothing


def test_cut_between_any_two_of_its_children_it_is_the_same():
    model = small_in_float64(**SMALL)
    assert [name for name, _ in model.named_children()] == [
        "embedding",
        "block1",
        "block2",
        "norm",
        "head",
        "classes_first",
    ]
    whole = model(characters())
    for at in range(1, len(model)):
        assert torch.equal(model[at:](model[:at](characters())), whole)


def rows(layer: nn.Linear, part: slice) -> nn.Linear:
    """A layer of some of the outputs."""
    cut = nn.Linear(layer.in_features, part.stop - part.start).double()
    cut.weight.data, cut.bias.data = layer.weight.data[part], layer.bias.data[part]
    return cut


def columns(layer: nn.Linear, part: slice) -> nn.Linear:
    """A layer of some of the inputs: a share of the sum, the bias left out."""
    cut = nn.Linear(part.stop - part.start, layer.out_features, bias=False).double()
    cut.weight.data = layer.weight.data[:, part]
    return cut


@pytest.mark.parametrize("parts", [2, 4])
def test_layers_that_hold_some_of_the_heads_give_their_share_of_the_sum(parts: int):
    block = build("gpt(layers=1, width=32, heads=4)", **SMALL).double().block1
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = hidden = 0
    for i in range(parts):
        share = copy.deepcopy(block)
        part = slice(i * 32 // parts, (i + 1) * 32 // parts)
        for name in ("query", "key", "value"):
            setattr(share.attention, name, rows(getattr(block.attention, name), part))
        share.attention.out = columns(block.attention.out, part)
        part = slice(i * 128 // parts, (i + 1) * 128 // parts)
        share.mlp.up, share.mlp.down = rows(block.mlp.up, part), columns(block.mlp.down, part)
        heads, hidden = heads + share.attention(x), hidden + share.mlp(x)
    # Sums of 32 and 128 products of order 1 to 1000 in float64, in another order.
    torch.testing.assert_close(heads + block.attention.out.bias, block.attention(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hidden + block.mlp.down.bias, block.mlp(x), rtol=1e-10, atol=1e-10)


def test_dropout_is_for_training_only():
    model = build("gpt(layers=1, width=16, heads=2, dropout=0.5)", **SMALL)
    assert not torch.equal(model(characters()), model(characters()))
    model.eval()
    assert torch.equal(model(characters()), model(characters()))


def test_losses_and_accuracy_are_per_character():
    logits, target = torch.randn(3, 7, 12, dtype=torch.float64), characters(seed=1)
    one_by_one = [F.cross_entropy(logits[i, :, t], target[i, t]) for i in range(3) for t in range(12)]
    torch.testing.assert_close(CrossEntropy()(logits, target), torch.stack(one_by_one).mean(), rtol=1e-12, atol=0)
    right = sum(int(logits[i, :, t].argmax() == target[i, t]) for i in range(3) for t in range(12))
    assert int(accuracy(logits, target)) == right


@pytest.mark.slow
def test_it_learns_what_two_characters_tell_and_one_does_not():
    splits = load(TEXT)
    inputs, target = splits.train.rows(torch.arange(len(splits.train)))
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs.index_put_((inputs.flatten(), target.flatten()), torch.ones((), dtype=torch.float64), accumulate=True)
    by_one = float(-(pairs * (pairs / pairs.sum(1, keepdim=True)).log()).sum() / pairs.sum())
    torch.manual_seed(0)
    model = build("gpt(layers=2, width=32, heads=2)", inputs=splits.inputs, classes=splits.classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        x, y = splits.train.rows(torch.randperm(len(inputs), generator=torch.Generator().manual_seed(step))[:32])
        optimizer.zero_grad()
        CrossEntropy()(model(x), y).backward()
        optimizer.step()
    x, y = splits.test.rows(torch.arange(len(splits.test)))
    with torch.no_grad():
        loss = float(CrossEntropy()(model(x), y))
    least = float(splits.source.rsplit(" ", 1)[1])
    # By what one character tells: 1.13 nats; the least there is: 0.79.
    assert least < loss < by_one - 0.1


def test_workers_equal_one_on_the_joined_batch():
    """Batches of 7 over 2 workers: shares of unequal size, weighted."""
    task = mh.Task(
        model=f"{HERE}:small_in_float64",
        data="markov(characters=800, length=8, classes=5)",
        optimizer="sgd(lr=0.1, momentum=0.9)",
        batch_size=7,
        steps=15,
    )
    alone, together = (mh.train(task, mh.Plan(workers=n, threads=1), progress=False) for n in (1, 2))
    for name, value in alone.state.items():
        torch.testing.assert_close(together.state[name], value, rtol=0, atol=1e-12)
    a, b = alone.history[-1], together.history[-1]
    assert b["test_accuracy"] == a["test_accuracy"]
    assert b["test_loss"] == pytest.approx(a["test_loss"], abs=1e-12)


@pytest.mark.parametrize(
    ("spec", "inputs", "said"),
    [
        ("gpt", (1, 28, 28), "data=markov, which needs no file"),
        ("gpt(width=30, heads=4)", (12,), "E.g. width=128"),
        ("gpt(layers=0)", (12,), "layers=0"),
        ("gpt(heads=0)", (12,), "heads=0"),
        ("gpt(dropout=1)", (12,), "dropout=1"),
        ("gpt(length=64)", (12,), "named 'length'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(spec: str, inputs: tuple[int, ...], said: str):
    with pytest.raises(BadInput) as e:
        build(spec, inputs=inputs, classes=7)
    assert said in str(e.value)
