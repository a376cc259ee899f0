"""The image networks of the published tables as torch modules, built on ``meta``: shapes only, for tracing.

As the programs of the tables have them, not as they are usual today: ResNet's stride in the first 1×1 convolution of
a block (He et al. 2015; TensorFlow's benchmarks) or in its 3×3 (MXNet's symbols), AlexNet with 64 (Krizhevsky 2014,
with a wider fourth layer) or 96 first channels (2012, ungrouped, with local response normalisation).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv(
    c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 beside a shortcut."""

    def __init__(self, c_in: int, width: int, stride: int, *, stride_first: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_first else (1, stride)
        self.path = nn.Sequential(
            conv(c_in, width, 1, first),
            conv(width, width, 3, second, 1),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False) if c_in != 4 * width else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        y: Tensor = self.relu(self.shortcut(x) + self.path(x))
        return y


def resnet(blocks: tuple[int, int, int, int], *, stride_first: bool = True) -> nn.Sequential:
    """ResNet-50 is (3, 4, 6, 3), ResNet-152 (3, 8, 36, 3)."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for i, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True)):
        for k in range(count):
            stride = 2 if i and not k else 1
            layers.append(Bottleneck(channels, width, stride, stride_first=stride_first))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def vgg16() -> nn.Sequential:
    """Thirteen 3×3 convolutions and three dense layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers, nn.Flatten(), *_dense(512 * 49))


def alexnet_2014() -> nn.Sequential:
    """TensorFlow's benchmark: 227×227 pixels, 64-192-384-384-256."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), *_dense(256 * 36),
    )  # fmt: skip


def alexnet_2012() -> nn.Sequential:
    """MXNet's symbol: 224×224 pixels without padding, 96-256-384-384-256, ungrouped."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, 4), nn.ReLU(), _OnePass(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), _OnePass(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), *_dense(256 * 25),
    )  # fmt: skip


class _OnePass(nn.Softplus):
    """Stands for local response normalisation, which libraries do in one pass; torch composes it of eight operators."""


def _dense(features: int) -> list[nn.Module]:
    return [
        nn.Linear(features, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, 1000),
    ]  # fmt: skip


class Branches(nn.Module):
    """Several ways side by side, their channels put together; a branch may itself end in branches."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        """Along the channels."""
        return torch.cat([way(x) for way in self.ways], 1)


def inception_v3() -> nn.Sequential:
    """Szegedy et al. 2015 (arXiv:1512.00567), 299×299 pixels, without the auxiliary classifier."""

    def pooled(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(c_in, c_out, 1))

    def a(c_in: int, n: int) -> Branches:
        return Branches(
            conv(c_in, 64, 1),
            nn.Sequential(conv(c_in, 48, 1), conv(48, 64, 5, 1, 2)),
            nn.Sequential(conv(c_in, 64, 1), conv(64, 96, 3, 1, 1), conv(96, 96, 3, 1, 1)),
            pooled(c_in, n),
        )

    def c(n: int) -> Branches:
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        return Branches(
            conv(768, 192, 1),
            nn.Sequential(conv(768, n, 1), conv(n, n, *row), conv(n, 192, *column)),
            nn.Sequential(
                conv(768, n, 1), conv(n, n, *column), conv(n, n, *row), conv(n, n, *column), conv(n, 192, *row)
            ),
            pooled(768, 192),
        )

    def e(c_in: int) -> Branches:
        def both() -> Branches:
            return Branches(conv(384, 384, (1, 3), 1, (0, 1)), conv(384, 384, (3, 1), 1, (1, 0)))

        return Branches(
            conv(c_in, 320, 1),
            nn.Sequential(conv(c_in, 384, 1), both()),
            nn.Sequential(conv(c_in, 448, 1), conv(448, 384, 3, 1, 1), both()),
            pooled(c_in, 192),
        )

    return nn.Sequential(
        conv(3, 32, 3, 2), conv(32, 32, 3), conv(32, 64, 3, 1, 1), nn.MaxPool2d(3, 2),
        conv(64, 80, 1), conv(80, 192, 3), nn.MaxPool2d(3, 2),
        a(192, 32), a(256, 64), a(288, 64),
        Branches(
            conv(288, 384, 3, 2),
            nn.Sequential(conv(288, 64, 1), conv(64, 96, 3, 1, 1), conv(96, 96, 3, 2)),
            nn.MaxPool2d(3, 2),
        ),
        c(128), c(160), c(160), c(192),
        Branches(
            nn.Sequential(conv(768, 192, 1), conv(192, 320, 3, 2)),
            nn.Sequential(conv(768, 192, 1), conv(192, 192, (1, 7), 1, (0, 3)), conv(192, 192, (7, 1), 1, (3, 0)),
                          conv(192, 192, 3, 2)),
            nn.MaxPool2d(3, 2),
        ),
        e(1280), e(2048), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000),
    )  # fmt: skip


#: By the program and the name that its table uses: how to build it, and the side of its images.
NETWORKS: dict[tuple[str, str], tuple[Callable[[], nn.Sequential], int]] = {
    ("tensorflow", "InceptionV3"): (inception_v3, 299),
    ("tensorflow", "ResNet-50"): (lambda: resnet((3, 4, 6, 3)), 224),
    ("tensorflow", "ResNet-152"): (lambda: resnet((3, 8, 36, 3)), 224),
    ("tensorflow", "AlexNet"): (alexnet_2014, 227),
    ("tensorflow", "VGG16"): (vgg16, 224),
    ("mxnet", "alexnet"): (alexnet_2012, 224),
    ("mxnet", "inception-v3"): (inception_v3, 299),
    ("mxnet", "resnet-152"): (lambda: resnet((3, 8, 36, 3), stride_first=False), 224),
}


def build(program: str, name: str) -> nn.Sequential:
    """On ``meta``: no memory is taken."""
    with torch.device("meta"):
        return NETWORKS[program, name][0]()


def batch(program: str, name: str, images: int) -> tuple[Tensor, Tensor]:
    """Images and labels without contents."""
    side = NETWORKS[program, name][1]
    return torch.empty(images, 3, side, side, device="meta"), torch.empty(images, dtype=torch.long, device="meta")
