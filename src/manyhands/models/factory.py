"""From a description to a module.

A model factory is any callable that returns a `torch.nn.Module`, a class included. If its signature names ``inputs``
(the shape of one sample without the batch, e.g. ``(1, 28, 28)``) or ``classes`` (how many outputs), they are filled in
from the data set unless the user gave them; all else is its own option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

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


def settle(model: nn.Module, sample: Callable[[], tuple[Any, Any]], *, name: str) -> None:
    """Give lazy modules their shapes, from one ``(inputs, target)`` sample; refuse a model that cannot be stored.

    Lazy parameters are drawn here, at once, rather than in the first step. The model sees the sample as in evaluation,
    so that no running statistic moves. A model that takes its target (it returns its own loss) gets that, too.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(t) for t in tensors):
        inputs, target = sample()
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                try:
                    model(inputs)
                except TypeError:
                    model(inputs, target)
        except Exception as e:
            raise BadInput(
                f"model {name} has lazy modules, which take their shapes from data, and a sample does not pass through "
                f"it: {type(e).__name__}: {e}"
            ) from e
        finally:
            model.train(was_training)
        if any(is_lazy(t) for t in [*model.parameters(), *model.buffers()]):
            raise BadInput(f"model {name} has lazy modules that a sample does not reach; give those their shapes.")
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                f"model {name} keeps {key!r}, a {type(value).__name__}, in its state_dict: a model is stored as named "
                "tensors. Let get_extra_state return a tensor, or register a buffer instead."
            )
