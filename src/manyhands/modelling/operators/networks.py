"""Networks whose steps fill the table: small ones of every kind, in sizes that leave no wide gap between shapes.

A network comes with several batches, from the one that fits a cache to the one that does not, each with another
optimizer, since an update depends on parameters and not on samples. Steps stay below some 50 ms of a core, so that a
slot of a few tenths of a second holds enough of them. The order is that of coverage: a run cut short has something of
each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from manyhands import models

OPTIMIZERS = ("sgd(lr=0.001)", "sgd(lr=0.001, momentum=0.9)", "adam(lr=0.0001)", "adamw(lr=0.0001)")


@dataclass(frozen=True)
class Network:
    """A model as a task describes it, and what it takes; text, so that workers can be told."""

    model: str
    inputs: tuple[int, ...]
    classes: int
    batches: tuple[int, ...]
    #: Numbers of words rather than values; then each position has a class of its own, unless ``one_class``.
    words: bool = False
    one_class: bool = False

    def build(self) -> nn.Module:
        """A new one, its weights drawn."""
        return models.build(self.model, inputs=self.inputs, classes=self.classes).train()

    def samples(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets without meaning."""
        shape = (n, *self.inputs)
        inputs = torch.randint(self.classes, shape) if self.words else torch.randn(shape)
        return inputs, torch.randint(self.classes, shape if self.words and not self.one_class else (n,))


@dataclass(frozen=True)
class Cell:
    """One network at one batch, updated by one optimizer."""

    network: Network
    batch: int
    optimizer: str


_OURS = "manyhands.modelling.operators.networks"


def _perceptron(hidden: Any, inputs: int, classes: int, *batches: int, activation: str = "relu") -> Network:
    return Network(f"perceptron(hidden={hidden}, activation='{activation}')", (inputs,), classes, batches)


NETWORKS: tuple[Network, ...] = (
    _perceptron(128, 784, 10, 8, 64, 512),
    Network("cnn", (1, 28, 28), 10, (4, 32, 128)),
    Network("gpt(layers=1, width=128, heads=4)", (64,), 65, (2, 8, 24), words=True),
    Network(f"{_OURS}:lstm(width=128)", (28,), 10, (8, 32, 128), words=True, one_class=True),
    Network("alexnet(scale=0.25)", (3, 64, 64), 10, (4, 16, 64)),
    Network(f"{_OURS}:residual(width=16)", (3, 32, 32), 10, (4, 12, 32)),
    _perceptron(32, 784, 10, 16, 128, 1024),
    Network("gpt(layers=1, width=64, heads=4)", (32,), 65, (4, 16, 64), words=True),
    Network(f"{_OURS}:plain(width=16)", (3, 32, 32), 10, (8, 40)),
    Network("logistic", (784,), 10, (16, 128, 1024)),
    _perceptron((512, 512), 784, 10, 8, 64, 512),
    Network("cnn", (3, 32, 32), 10, (8, 64)),
    Network(f"{_OURS}:words(width=64)", (64,), 4000, (8, 64), words=True, one_class=True),
    Network("gpt(layers=1, width=256, heads=8)", (64,), 65, (1, 3, 8), words=True),
    Network(f"{_OURS}:lstm(width=32)", (28,), 10, (16, 64, 256), words=True, one_class=True),
    _perceptron((64, 64, 64), 64, 10, 4, 32, 256, activation="tanh"),
    Network("alexnet(scale=0.125)", (3, 64, 64), 100, (8, 32)),
    Network(f"{_OURS}:lstm(width=64)", (16,), 40, (4, 24, 96), words=True, one_class=True),
    Network(f"{_OURS}:residual(width=32)", (3, 32, 32), 100, (2, 8)),
    _perceptron((1024, 256), 256, 100, 8, 64, 256),
    Network(f"{_OURS}:plain(width=48)", (16, 16, 16), 100, (4, 16)),
    Network(f"{_OURS}:lstm(width=256)", (16,), 65, (4, 16, 48), words=True, one_class=True),
    Network("gpt(layers=1, width=96, heads=2)", (128,), 200, (2, 8), words=True),
    _perceptron((2048,), 1024, 10, 16, 128, activation="gelu"),
    Network("cnn(channels_last=False)", (1, 28, 28), 10, (4, 32)),
    _perceptron((256, 128), 32, 2, 32, 256, 2048, activation="sigmoid"),
    Network(f"{_OURS}:words(width=256)", (32,), 1000, (8, 64), words=True, one_class=True),
)


def cells(networks: Sequence[Network] = NETWORKS) -> list[Cell]:
    """Every network at its middle batch, then at the others; optimizers go round."""
    rows = []
    for i, network in enumerate(networks):
        middle = len(network.batches) // 2
        batches = [network.batches[middle], *network.batches[:middle], *network.batches[middle + 1 :]]
        rows.append([Cell(network, n, OPTIMIZERS[(i + k) % len(OPTIMIZERS)]) for k, n in enumerate(batches)])
    return [cell for cell in chain(*zip_longest(*rows)) if cell is not None]


# -- kinds that the catalogue of models does not have ------------------------------------------------------------------


class _Last(nn.Module):
    """Recurrent layers over embedded words, and classes from the last state."""

    def __init__(self, inputs: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.layer = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, classes)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.layer(self.embedding(words))
        logits: Tensor = self.output(states[:, -1])
        return logits


def lstm(inputs: tuple[int, ...], classes: int, *, width: int) -> nn.Module:
    """``(n, length) → (n, classes)``."""
    return _Last(inputs, classes, width)


class _Mean(nn.Module):
    """The mean of embedded words, twice through a layer."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, classes)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.relu(self.hidden(self.embedding(words).mean(1))))
        return logits


def words(inputs: tuple[int, ...], classes: int, *, width: int) -> nn.Module:
    """``(n, length) → (n, classes)``."""
    return _Mean(classes, width)


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        same = c_in == c_out and stride == 1
        self.past = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.past(x))


def residual(inputs: tuple[int, ...], classes: int, *, width: int) -> nn.Module:
    """A small residual network, ``(n, channels, height, width) → (n, classes)``."""
    return nn.Sequential(
        nn.Conv2d(inputs[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def plain(inputs: tuple[int, ...], classes: int, *, width: int) -> nn.Module:
    """3×3 and 1×1 convolutions without a norm, and pools, as VGG has them."""
    return nn.Sequential(
        nn.Conv2d(inputs[0], width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten(),
        nn.Linear(2 * width * (inputs[1] // 4) * (inputs[2] // 4), 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip
