"""AlexNet as of "one weird trick": few parameters and most of the work in ``features``, the reverse in ``classifier``.

    features     conv 11×11/4 → 64 · pool · conv 5×5 → 192 · pool · conv 3×3 → 384 → 256 → 256 · pool     2,469,696
    classifier   linear 9216 → 4096 → 4096 → 1000                                                        58,631,144

ReLU after each layer but the last; pools are the maximum of 3×3, every second pixel. The counts are those for 224×224
pixels in three colours. It is the net on which to see why the two halves want to be cut differently.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from manyhands.catalogue import Reference
from manyhands.checks import is_positive, whole
from manyhands.errors import BadInput
from manyhands.models.sizes import sample_shape

_CHANNELS = (64, 192, 384, 256, 256)
_HIDDEN = 4096


def alexnet(
    inputs: tuple[int, ...], classes: int, *, scale: float = 1.0, stride: int = 4, dropout: float = 0.0
) -> nn.Sequential:
    """``(n, channels, height, width) → (n, classes)``; 61,100,840 parameters for ``(3, 224, 224)`` and 1000 classes.

    ``scale`` times as many channels and hidden neurons: at 0.125 and 10 classes, 64×64 pixels, 0.3 million. ``stride``
    is the first convolution's: with 4 images have at least 63×63 pixels, with 1 at least 21×21. ``dropout`` is before
    both hidden dense layers, 0.5 in the paper; none unless asked for, so that P workers equal one.

    A `nn.Sequential` of two such: ``features``, the convolutions, and ``classifier``, the dense layers.
    """
    shape = sample_shape("alexnet", inputs)
    whole("model alexnet: classes", classes)
    whole("model alexnet: stride", stride)
    if not is_positive(scale):
        raise BadInput(f"model alexnet: scale={scale!r}; it must be a positive number, e.g. 0.125.")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadInput(f"model alexnet: dropout={dropout!r}; it must be a number from 0 to below 1.")
    if len(shape) != 3 or min(shape[1:]) < _smallest(stride):
        raise BadInput(
            f"model alexnet: inputs={shape} does not fit; with stride={stride} it takes images (channels, height, "
            f"width) of at least {_smallest(stride)}×{_smallest(stride)} pixels, with stride=1 from {_smallest(1)}×"
            f'{_smallest(1)}. E.g. --data "synthetic(inputs=(3, 64, 64))"; smaller images suit cnn.'
        )
    channels, height, width = shape
    hidden, *maps = (max(1, round(scale * n)) for n in (_HIDDEN, *_CHANNELS))
    pixels = _pixels(height, stride) * _pixels(width, stride)
    features = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, maps[0], 11, stride=stride, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(maps[0], maps[1], 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(maps[1], maps[2], 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(maps[2], maps[3], 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(maps[3], maps[4], 3, padding=1),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, 2),
    )
    classifier = OrderedDict[str, nn.Module](
        flatten=nn.Flatten(),
        dropout1=nn.Dropout(dropout),
        hidden1=nn.Linear(maps[4] * pixels, hidden),
        relu1=nn.ReLU(),
        dropout2=nn.Dropout(dropout),
        hidden2=nn.Linear(hidden, hidden),
        relu2=nn.ReLU(),
        output=nn.Linear(hidden, classes),
    )
    model = nn.Sequential(OrderedDict(features=nn.Sequential(features), classifier=nn.Sequential(classifier)))
    _initialise_(model)
    return model


vars(alexnet)["data"] = "synthetic(inputs=(3, 64, 64), samples=200)"  # what samples it takes
vars(alexnet)["paper"] = Reference(
    "A. Krizhevsky",
    "One weird trick for parallelizing convolutional neural networks",
    2014,
    "arXiv:1404.5997",
)


def _initialise_(model: nn.Module) -> None:
    """Variance 2 / inputs (He et al. 2015, arXiv:1502.01852, equation 10).

    Torch's own is a sixth of it, and after eight such layers nothing is left to tell images apart by. The output's
    deviation is 0.01, as in the paper of 2012: pools of maxima let all else grow, and the loss would start far above
    log(classes).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.get_submodule("classifier.output").get_parameter("weight"), std=0.01)


def _pixels(side: int, stride: int) -> int:
    """Of a side after ``features``: a convolution and three pools; at most 0 where there are none."""
    side = (side + 4 - 11) // stride + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _smallest(stride: int) -> int:
    """The smallest side of which a pixel is left."""
    return 14 * stride + 7
