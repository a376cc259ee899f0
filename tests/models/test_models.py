"""The models have the published sizes, and a description that cannot work is answered in words."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.catalogue import Reference
from manyhands.data import load
from manyhands.errors import BadInput, UnknownName
from manyhands.models import build, loss_functions, models

MNIST = {"inputs": (1, 28, 28), "classes": 10}
#: Models that take samples of any shape; the others say whose samples they take, and have tests of their own.
DENSE = [name for name in models if not hasattr(models.load(name), "data")]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def a_string() -> str:
    return "not a module"


def own(classes: int, width: int = 3) -> nn.Module:
    return nn.Linear(width, classes)


def greedy(**options: object) -> nn.Module:
    assert not options, "a factory that only passes options on is offered none"
    return nn.Identity()


def needs_depth(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Identity() for _ in range(depth)))


def test_cnn_has_the_slides_28_938_parameters():
    assert parameters(build("cnn", **MNIST)) == 28_938


@given(st.integers(1, 200))
def test_perceptron_has_795_h_plus_10_parameters(h: int):
    assert parameters(build(f"perceptron(hidden={h})", **MNIST)) == 795 * h + 10


def test_logistic_has_7850_parameters():
    assert parameters(build("logistic", **MNIST)) == 7850


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("inputs", "classes"), [((1, 28, 28), 10), ((1, 8, 8), 10), ((3, 33, 21), 7)])
def test_every_model_maps_samples_to_classes(name: str, inputs: tuple[int, ...], classes: int):
    model = build(name, inputs=inputs, classes=classes)
    outputs = model(torch.rand(5, *inputs))
    outputs.sum().backward()
    assert outputs.shape == (5, classes)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", models)
def test_every_model_says_where_it_was_published_and_pickles(name: str):
    assert isinstance(models.load(name).paper, Reference)
    splits = None if name in DENSE else load(models.load(name).data)
    model = build(name, **MNIST if splits is None else {"inputs": splits.inputs, "classes": splits.classes})
    assert parameters(pickle.loads(pickle.dumps(model))) == parameters(model)


def test_hidden_layers_may_be_several():
    layers = [m for m in build("perceptron(hidden=(20, 30), activation=tanh)", **MNIST) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(784, 20), (20, 30), (30, 10)]


@pytest.mark.parametrize("inputs", [(1, 28, 28), (3, 8, 8)])
def test_channels_last_changes_the_layout_and_not_the_numbers(inputs: tuple[int, ...]):
    plain = build("cnn(channels_last=False)", inputs=inputs, classes=10).double()
    fast = build("cnn", inputs=inputs, classes=10).double()
    fast.load_state_dict(plain.state_dict())
    x = torch.rand(4, *inputs, dtype=torch.float64)
    for weight in ("conv1.weight", "conv2.weight"):  # as a replica lays them: the input alone must do
        layer = fast.get_submodule(weight.split(".")[0])
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        layer.weight.data = layer.weight.data.contiguous()
    hidden = fast[:2](x)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    assert not hidden.is_contiguous()
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)  # float64: summation order only


def test_what_the_user_gives_is_not_overwritten():
    assert build("perceptron(classes=3)", **MNIST)[-1].out_features == 3
    partial = functools.partial(own, classes=4)
    assert build(partial, **MNIST).out_features == 4
    assert build("tests.models.test_models:own(width=5)", **MNIST).in_features == 5
    assert build(greedy, **MNIST)(1) == 1
    live = nn.Linear(2, 2)
    assert build(live, **MNIST) is live


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cn", "Did you mean 'cnn'"),
        ("perceptron(hiden=5)", "Did you mean 'hidden'"),
        ("perceptron(hidden=0)", "hidden=0"),
        ("perceptron(hidden='a')", "hidden='a'"),
        ("perceptron(hidden=True)", "hidden=True"),
        ("perceptron(activation=rellu)", "Did you mean 'relu'"),
        ("cnn(inputs=(784,))", "(channels, height, width)"),
        ("cnn(inputs=(1, 3, 28))", "at least 4×4"),
        ("logistic(inputs=())", "shape of a sample"),
        ("logistic(classes=0)", "classes=0"),
        ("tests.models.test_models:a_string", "returned a str; the rule is"),
        ("tests.models.test_models:needs_depth", "(depth=…)"),
        ("tests.models.test_models:MNIST", "returned a dict; the rule is"),
        ("perceptron(50", "cannot be read"),
        (7, "is a int"),
    ],
)
def test_a_model_that_cannot_work_is_refused_in_words(spec: object, said: str):
    with pytest.raises(BadInput) as e:
        build(spec, **MNIST)  # type: ignore[arg-type]
    assert said in str(e.value)


def test_a_size_the_data_cannot_tell_is_asked_for():
    with pytest.raises(BadInput, match=r"Write cnn\(classes=…\)"):
        build("cnn", inputs=(1, 28, 28), classes=None)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(UnknownName) as e:
        build("cnn(chanels_last=True)", **MNIST)
    assert "channels_last" in e.value.choices


def test_listing_names_does_not_import_torch():
    code = (
        "import sys, manyhands.models as m, manyhands.data as d;"
        "list(m.models), list(m.loss_functions), list(m.optimizer_classes), list(m.schedule_classes), list(d.datasets);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_every_loss_has_its_name_and_paper():
    for name in loss_functions:
        loss = loss_functions.load(name)
        assert loss.name == name
        assert isinstance(loss.paper, Reference)
