"""A model that is a sequence, as the schemes of network parallelism want it, and how a module of it is replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from manyhands.contract import Block
from manyhands.errors import BadInput
from manyhands.partition.tensor.cut import Cut, frozen_alike, tied_parameters
from manyhands.partition.tensor.rules import ELEMENTWISE

#: They draw for whole channels at once, so they are no functions of single elements.
BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def elementwise(module: nn.Module) -> bool:
    """Whether it computes each element from that element alone."""
    return isinstance(module, ELEMENTWISE) and not isinstance(module, BY_CHANNEL)


def sequence(model: nn.Module, scheme: str) -> list[tuple[str, nn.Module]]:
    """Paths and modules in the order of the forward pass, those of sequences within it included."""
    if type(model) is not nn.Sequential:
        raise BadInput(
            f"tensor={scheme}: {type(model).__name__} is no nn.Sequential, so nothing tells what its modules hand on. "
            "Use rules, e.g. tensor='first=column, second=row', or auto."
        )
    found: list[tuple[str, nn.Module]] = []
    for name, module in zip(model._modules, model, strict=True):  # named_children() leaves out what comes again
        if type(module) is nn.Sequential:
            found += [(f"{name}.{path}", inner) for path, inner in sequence(module, scheme)]
        else:
            found.append((name, module))
    return found


def perceptron(model: nn.Module, scheme: str, most: int, *, draws: bool = True) -> list[tuple[str, nn.Linear]]:
    """The layers of a perceptron: of a sequence of Flatten, Linear and functions of single elements.

    Each has ``most`` outputs or more, so that as many parts of it are not empty. Without ``draws`` nothing between the
    first and the last is a dropout. Raises `BadInput` for any other model, naming the module.
    """
    layers: list[tuple[str, nn.Linear]] = []
    between: list[str] = []
    tied = tied_parameters(model)
    for path, module in sequence(model, scheme):
        if type(module) is nn.Linear:
            if module.out_features < most:
                _refuse(
                    scheme, path, f"has {module.out_features} outputs, to be cut into {most} parts", "Use fewer ranks."
                )
            shared = next((name for name in tied if name.rpartition(".")[0] == path), None)
            if shared is not None:
                _refuse(scheme, path, f"has a parameter that is also {tied[shared]}", "Cut it by rules, or not at all.")
            if between and not draws:
                _refuse(scheme, between[0], "draws random numbers, and its neurons lie on two ranks", "Leave it out.")
            layers.append((path, module))
        elif elementwise(module):
            if layers and isinstance(module, nn.Dropout | nn.AlphaDropout) and module.p > 0:
                between.append(path)
        elif not (isinstance(module, nn.Flatten) and not layers):
            _refuse(
                scheme,
                path,
                f"is a {type(module).__name__}",
                "The scheme is for a sequence of Flatten, Linear and functions of single elements, such as "
                "perceptron(hidden=(512, 512)); others are cut by rules or auto, convolutions also by spatial.",
            )
    if not layers:
        _refuse(scheme, "the model", "has no Linear layer", "There is nothing to cut.")
    return layers


def _refuse(scheme: str, path: str, why: str, what_works: str) -> None:
    raise BadInput(f"tensor={scheme}: {path} {why}. {what_works}")


def replace(model: nn.Module, path: str, made: nn.Module, blocks: Mapping[str, Block], said: str, result: Cut) -> None:
    """Put ``made`` where the module ``path`` is, and note it in ``result``; ``blocks`` by its own names."""
    module = model.get_submodule(path)
    made.train(module.training)
    frozen_alike(module, made)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)
    result.blocks |= {f"{path}.{key}": block for key, block in blocks.items()}
    result.done[path] = said


def parts(linear: nn.Linear, weight: Block, bias: Block) -> tuple[Tensor, Tensor | None, dict[str, Block]]:
    """This rank's part of a layer's weight and bias, and the blocks that say which."""
    own = weight.take(linear.weight.detach())
    if "bias" not in dict(linear.named_parameters()):
        return own, None, {"weight": weight}
    return own, bias.take(linear.bias.detach()), {"weight": weight, "bias": bias}
