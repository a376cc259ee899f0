"""Operations and bytes of a step are those counted by hand, and nothing runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from manyhands import models
from manyhands.errors import BadInput
from manyhands.modelling import operations
from manyhands.modelling.operations import count

PRODUCTS = ("addmm", "mm", "bmm", "convolution", "convolution_backward")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


def batch(n, *shape, classes=10):
    return torch.zeros(n, *shape), torch.zeros(n, dtype=torch.long)


def products(step, phase):
    return sum(x.flops for x in step if x.name in PRODUCTS and x.phase == phase)


def test_a_perceptron_by_hand():
    step = count(
        models.build("perceptron(hidden=50)", inputs=(1, 28, 28), classes=10), *batch(100, 1, 28, 28), F.cross_entropy
    )
    first, second = 784 * 50, 50 * 10
    assert products(step, "forward") == 2 * 100 * (first + second)
    assert products(step, "backward") == 2 * 100 * (first + 2 * second)  # the images need no gradient
    assert sum(step.parameter_B.values()) == 4 * 39_760
    assert not step.untraced


def test_a_linear_layers_bytes_by_hand():
    step = count(nn.Linear(30, 20), torch.zeros(7, 30), torch.zeros(7, 20), F.mse_loss)
    (forward,) = (x for x in step if x.name == "addmm")
    assert (forward.read_B, forward.written_B) == (4 * (20 + 7 * 30 + 30 * 20), 4 * 7 * 20)
    (weights,) = (x for x in step if x.name == "mm")
    assert (weights.read_B, weights.written_B) == (4 * (7 * 20 + 7 * 30), 4 * 20 * 30)
    assert set(weights.parameters) == {"bias", "weight"}


def test_the_convolutional_network_by_hand():
    """2.84 million multiplications an image forward, 16.4 million operations with backward."""
    step = count(models.build("cnn", inputs=(1, 28, 28), classes=10), *batch(5, 1, 28, 28), F.cross_entropy)
    conv1, conv2, dense = 16 * 25 * 28**2, 32 * 16 * 25 * 14**2, 1568 * 10
    assert products(step, "forward") == 5 * 2 * (conv1 + conv2 + dense)
    assert products(step, "backward") == 5 * 2 * (conv1 + 2 * conv2 + 2 * dense)
    assert (products(step, "forward") + products(step, "backward")) / 5 == pytest.approx(16.4e6, rel=0.01)


def test_alexnet_by_hand_without_its_memory():
    with torch.device("meta"):
        step = count(
            models.build("alexnet", inputs=(3, 224, 224), classes=1000), *batch(64, 3, 224, 224), F.cross_entropy
        )
    convs = [
        64 * 363 * 55**2,
        192 * 64 * 25 * 27**2,
        384 * 192 * 9 * 13**2,
        256 * 384 * 9 * 13**2,
        256 * 256 * 9 * 13**2,
    ]
    dense = 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert products(step, "forward") == 64 * 2 * (sum(convs) + dense)
    assert products(step, "backward") == 64 * 2 * (2 * sum(convs) - convs[0] + 2 * dense)
    assert sum(step.parameter_B.values()) == 4 * 61_100_840
    assert {x.module for x in step if x.name == "convolution_backward"} == {f"features.conv{i}" for i in range(1, 6)}


def test_gpt_by_hand():
    n, length, width, layers, classes = 3, 16, 32, 2, 65
    model = models.build(f"gpt(layers={layers}, width={width})", inputs=(length,), classes=classes)
    step = count(
        model, torch.zeros(n, length, dtype=torch.long), torch.zeros(n, length, dtype=torch.long), F.cross_entropy
    )
    matrices = layers * 12 * width**2 + width * classes
    assert products(step, "forward") == 2 * n * length * matrices
    assert products(step, "backward") == 2 * products(step, "forward")
    attention = {p: sum(x.flops for x in step if x.name in ATTENTION and x.phase == p) for p in ("forward", "backward")}
    assert attention["forward"] == layers * 2 * 2 * n * length**2 * width  # scores and their product with the values
    assert attention["backward"] == 2.5 * attention["forward"]  # five products, the scores once more


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_by_hand(kind):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(7, 10, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    step = count(Last(), torch.zeros(3, 4, 7), torch.zeros(3, dtype=torch.long), F.cross_entropy)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    forward = sum(x.flops for x in step if x.phase == "forward" and x.module == "layer")
    by_hand = 2 * 3 * 4 * gates * 10 * (7 + 10)
    assert by_hand <= forward < 1.2 * by_hand  # activations besides


def test_tracing_draws_no_number_and_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    count(model, torch.zeros(4, 8), torch.zeros(4, dtype=torch.long), F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks


def test_a_model_that_no_machine_holds_is_counted():
    with torch.device("meta"):
        step = count(nn.Linear(10**6, 10**6), torch.zeros(2, 10**6), torch.zeros(2, 10**6), F.mse_loss)
    assert products(step, "forward") == 2 * 2 * 10**12


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    step = count(Tied(), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), F.cross_entropy)
    assert step.parameter_B == {"embedding.weight": 4 * 50 * 8}
    assert not step.untraced


def test_a_model_may_return_its_own_loss_and_a_loss_its_count():
    class Own(nn.Linear):
        def forward(self, x, target):
            return F.cross_entropy(super().forward(x), target)

    own = count(Own(30, 20), torch.zeros(7, 30), torch.zeros(7, dtype=torch.long))
    pair = count(
        nn.Linear(30, 20), torch.zeros(7, 30), torch.zeros(7, dtype=torch.long), lambda y, t: (F.cross_entropy(y, t), 7)
    )
    assert own.flops() == pair.flops() > 0


def test_phases_names_and_modules_add_up_to_the_whole():
    step = count(models.build("cnn", inputs=(1, 28, 28), classes=10), *batch(5, 1, 28, 28), F.cross_entropy)
    for key in (lambda x: x.name, lambda x: x.module, lambda x: x.phase):
        parts = step.by(key)
        assert sum(f for f, _ in parts.values()) == step.flops() == step.flops("forward") + step.flops("backward")
        assert sum(b for _, b in parts.values()) == step.moved_B()
    conv = next(x for x in step if x.module == "conv2" and x.phase == "forward" and x.name == "convolution")
    assert conv.options[:3] == ([1, 1], [2, 2], [1, 1])  # stride, padding, dilation
    assert conv.parameters == ("conv2.weight", "conv2.bias")
    assert conv.dtype == "float32"


def test_every_gradient_is_made_where_backward_undoes_its_layer():
    """Batch norm counts its batches, unseen by autograd; the convolution before it keeps its weights all the same."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    step = count(net, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long), F.cross_entropy)
    made = {x.name: (x.module, x.parameters) for x in step if x.phase == "backward" and x.parameters}
    assert made["convolution_backward"] == ("0", ("0.weight",))
    assert made["native_batch_norm_backward"] == ("1", ("1.weight", "1.bias"))
    assert {name for _, names in made.values() for name in names} == set(step.parameter_B)


def test_views_move_nothing_and_an_expanded_tensor_is_what_it_was_expanded_from():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.zeros(1, 6))

        def forward(self, x):
            return x.view(2, 3, 6).transpose(0, 1) + self.row.expand(3, 2, 6)

    step = count(Views(), torch.zeros(6, 6), torch.zeros(3, 2, 6), lambda y, t: y.sum())
    added = next(x for x in step if x.name == "add")
    assert added.read_B == 4 * (36 + 6)
    assert not {x.name for x in step} & {"view", "transpose", "expand", "detach"}


class Looks(nn.Module):
    """Its course depends on a value."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(30, 20), nn.Linear(20, 10)
        self.norm = nn.BatchNorm1d(20)

    def forward(self, x):
        hidden = self.norm(self.first(x))
        return self.second(hidden if hidden.sum().item() > -1e30 else -hidden)


def test_a_model_that_looks_at_values_is_counted_by_hooks_and_says_where():
    model = Looks()
    mean = model.norm.running_mean.clone()
    step = count(model, torch.ones(7, 30), torch.zeros(7, dtype=torch.long), F.cross_entropy)
    assert "at aten._local_scalar_dense" in step.untraced
    assert "hooks" in step.untraced
    forward = 2 * 7 * (30 * 20 + 20 * 10)
    assert sum(x.flops for x in step if x.name == "linear") == forward
    assert sum(x.flops for x in step if x.name == "linear_backward") == 2 * forward
    assert torch.equal(model.norm.running_mean, mean)
    assert not model.first._forward_hooks


@pytest.mark.parametrize(
    ("looks", "says"),
    [
        (lambda x: x[x.sum(1) >= 0], "at aten.nonzero"),
        (lambda x: torch.from_numpy(x.numpy()), "after the first operator"),
    ],
)
def test_the_operator_that_ends_the_trace_is_named_with_its_module(looks, says):
    class Inner(nn.Module):
        def forward(self, x):
            return looks(x)

    step = count(
        nn.Sequential(Inner(), nn.Linear(5, 5)), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), F.cross_entropy
    )
    assert says in step.untraced
    assert "in module '0'" in step.untraced


def test_a_model_without_shapes_is_refused_and_gets_none():
    model = nn.LazyLinear(5)
    with pytest.raises(BadInput, match="lazy"):
        count(model, torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), F.cross_entropy)
    assert isinstance(model.weight, nn.UninitializedParameter)


def test_a_model_that_does_not_run_on_its_batch_is_refused():
    with pytest.raises(BadInput, match=r"cannot be counted: tracing ended after.*it raises RuntimeError"):
        count(nn.Linear(30, 20), torch.zeros(7, 31), torch.zeros(7, dtype=torch.long), F.cross_entropy)


def test_an_update_reads_and_writes_by_the_optimizers_state():
    plain, adam = (operations.update({"w": 400, "b": 40}, state=state) for state in (0, 2))
    assert (plain.read_B, plain.written_B, plain.flops) == (880, 440, 220)
    assert (adam.read_B, adam.written_B) == (4 * 440, 3 * 440)
