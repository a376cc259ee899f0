"""Multinomial logistic regression: one linear layer, y = Wx + b.

With the cross entropy its loss is convex, so that every strategy must reach the same optimum: the model on which to
see what a strategy does to the *path*. With `squared_error` it is the linear least squares of the 2018 slides.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import nn

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.models.sizes import sample_shape


def logistic(inputs: tuple[int, ...], classes: int) -> nn.Sequential:
    """``(n, *inputs) → (n, classes)``; (d + 1)·classes parameters, d the product of ``inputs`` (7,850 on MNIST)."""
    d = prod(sample_shape("logistic", inputs))
    layers = {"flatten": nn.Flatten(), "output": nn.Linear(d, whole("model logistic: classes", classes))}
    return nn.Sequential(OrderedDict(layers))


vars(logistic)["paper"] = Reference(
    "D. R. Cox",
    "The regression analysis of binary sequences",
    1958,
    "Journal of the Royal Statistical Society B 20(2), 215-242",
)
