"""From a description to a module.

A model factory is any callable that returns a `torch.nn.Module`, a class included. If its signature names ``inputs``
(the shape of one sample without the batch, e.g. ``(1, 28, 28)``) or ``classes`` (how many outputs), they are filled in
from the data set unless the user gave them; all else is its own option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from manyhands.calling import call, label
from manyhands.errors import BadInput
from manyhands.grammar import parse_call
from manyhands.models import models

ModelFactory = Callable[..., nn.Module]


def build(
    spec: str | ModelFactory | nn.Module, *, inputs: tuple[int, ...] | None = None, classes: int | None = None
) -> nn.Module:
    """The model that ``spec`` describes: text, a factory, or a live module, which is returned as it is.

        build("perceptron(hidden=100)", inputs=(1, 28, 28), classes=10)   # 79,510 parameters
        build(lambda classes: nn.LazyLinear(classes), classes=10)

    ``inputs`` and ``classes`` are None where the data set cannot tell them.
    """
    if isinstance(spec, nn.Module):
        return spec
    offered = {"inputs": inputs, "classes": classes}
    made: Any
    if isinstance(spec, str):
        said = parse_call(spec, kind="model")
        name, made = said.name, models.load(said.name)
        if callable(made) and not isinstance(made, nn.Module):
            made = call("model", name, made, said.args, said.kwargs, offered=offered)
    elif callable(spec):
        name = label(spec)
        made = call("model", name, spec, offered=offered)
    else:
        raise BadInput(
            f"model {spec!r} is a {type(spec).__name__}; a model is text such as 'cnn' or 'my_pkg.module:factory', a "
            "callable that returns a torch.nn.Module, or such a module."
        )
    if not isinstance(made, nn.Module):
        raise BadInput(
            f"model {name} returned a {type(made).__name__}; the rule is: a model factory returns a torch.nn.Module, "
            "e.g. def factory(inputs, classes): return torch.nn.Linear(inputs[0], classes)."
        )
    return made
