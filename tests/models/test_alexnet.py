"""AlexNet has the published sizes, takes what images its strides leave a pixel of, and learns."""

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.data import load
from manyhands.errors import BadInput
from manyhands.models import build
from manyhands.models.losses import CrossEntropy

HERE = "tests.models.test_alexnet"


class SmallInFloat64(nn.Module):
    """Takes images of float32."""

    def __init__(self, inputs: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.net = build("alexnet(scale=0.05, stride=1)", inputs=inputs, classes=classes).double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.double())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_its_halves_have_the_published_sizes_and_shapes():
    with torch.device("meta"):
        model = build("alexnet", inputs=(3, 224, 224), classes=1000)
        maps = model.features(torch.empty(2, 3, 224, 224))
        logits = model.classifier(maps)
    assert (parameters(model.features), parameters(model.classifier)) == (2_469_696, 58_631_144)
    assert (maps.shape, logits.shape) == ((2, 256, 6, 6), (2, 1000))


@pytest.mark.parametrize(("stride", "smallest"), [(1, 21), (2, 35), (4, 63)])
def test_the_smallest_images_leave_one_pixel_and_smaller_ones_are_refused(stride: int, smallest: int):
    spec = f"alexnet(scale=0.05, stride={stride})"
    for side in (smallest, smallest + 11):
        model = build(spec, inputs=(3, side, smallest), classes=10)
        logits = model(torch.rand(2, 3, side, smallest))
        logits.sum().backward()
        assert logits.shape == (2, 10)
        assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(BadInput, match=f"at least {smallest}×{smallest} pixels"):
        build(spec, inputs=(3, smallest - 1, 100), classes=10)


def test_scale_is_of_channels_and_hidden_neurons():
    model = build("alexnet(scale=0.125)", inputs=(3, 64, 64), classes=10)
    convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [8, 24, 48, 32, 32]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [512, 512, 10]
    assert parameters(model) == 325_938


def test_dropout_is_for_training_only():
    model = build("alexnet(scale=0.05, dropout=0.5)", inputs=(3, 64, 64), classes=10)
    images = torch.rand(2, 3, 64, 64)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.slow
def test_it_learns_clusters():
    splits = load("synthetic(inputs=(3, 32, 32), samples=64, classes=4, noise=0.05)")
    torch.manual_seed(0)
    model = build("alexnet(scale=0.05, stride=1)", inputs=splits.inputs, classes=splits.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, target = splits.train.rows(torch.arange(64))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = CrossEntropy()(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_workers_equal_one_on_the_joined_batch():
    task = mh.Task(
        model=f"{HERE}:SmallInFloat64",
        data="synthetic(inputs=(3, 24, 24), samples=20, classes=3)",
        optimizer="sgd(lr=0.05, momentum=0.9)",
        batch_size=7,
        steps=4,
    )
    alone, together = (mh.train(task, mh.Plan(workers=n, threads=1), progress=False) for n in (1, 2))
    for name, value in alone.state.items():
        torch.testing.assert_close(together.state[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "inputs", "said"),
    [
        ("alexnet", (1, 28, 28), "with stride=1 from 21×21"),
        ("alexnet", (784,), "(channels, height, width)"),
        ("alexnet(scale=0)", (3, 64, 64), "scale=0"),
        ("alexnet(stride=0)", (3, 64, 64), "stride=0"),
        ("alexnet(dropout=2)", (3, 64, 64), "dropout=2"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(spec: str, inputs: tuple[int, ...], said: str):
    with pytest.raises(BadInput) as e:
        build(spec, inputs=inputs, classes=7)
    assert said in str(e.value)
