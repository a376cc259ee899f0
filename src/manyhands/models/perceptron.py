"""The multi-layer perceptron of the 2018 slides: 784 inputs, h hidden neurons, 10 outputs.

The slides give 795.2·h parameters, which is exact only at h = 50; with biases the count is 795h + 10. They do not name
the activation: ours is ReLU unless said otherwise.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from math import prod

from torch import nn

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.errors import UnknownName
from manyhands.models.sizes import sample_shape

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def perceptron(
    inputs: tuple[int, ...], classes: int, *, hidden: int | tuple[int, ...] = 50, activation: str = "relu"
) -> nn.Sequential:
    """``(n, *inputs) → (n, classes)``; 795h + 10 parameters for MNIST and one hidden layer of h.

    ``hidden`` is one size or several, ``hidden=(512, 512)``, one for each hidden layer. A plain `nn.Sequential`, so
    that it can be cut between any two layers.
    """
    sizes = tuple(hidden) if isinstance(hidden, tuple | list) else (hidden,)
    if activation not in ACTIVATIONS:
        raise UnknownName("activation", activation, ACTIVATIONS)
    widths = [prod(sample_shape("perceptron", inputs)), *(whole("model perceptron: hidden", h) for h in sizes)]
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (n_in, n_out) in enumerate(pairwise(widths), 1):
        layers[f"hidden{i}"] = nn.Linear(n_in, n_out)
        layers[f"activation{i}"] = ACTIVATIONS[activation]()
    layers["output"] = nn.Linear(widths[-1], whole("model perceptron: classes", classes))
    return nn.Sequential(OrderedDict(layers))


vars(perceptron)["paper"] = Reference(
    "D. E. Rumelhart, G. E. Hinton, R. J. Williams",
    "Learning representations by back-propagating errors",
    1986,
    "Nature 323, 533-536",
)
